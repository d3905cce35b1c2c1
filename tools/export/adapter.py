"""A run's LoRA adapter as peft keeps one: `sightline export RUN OUT --to adapter`.

    language.model.layers.0.self_attn.q_proj.lora_A.default.weight
        --> base_model.model.model.layers.0...lora_A.weight                  over the recipe's language model
        --> base_model.model.model.language_model.layers.0...lora_A.weight   over a whole model: a published one that
                                                                             was tuned, or one that --base writes

    OUT/adapter_config.json, adapter_model.safetensors    PeftModel.from_pretrained opens it; vLLM with --lora-modules
    OUT/projector.safetensors                             where the projector learnt too, in stock Llava's names; over a
                                                          published model it is in the adapter, as `modules_to_save`
    OUT/parity.json, README.md

Names in a whole model are those of `tools.export.peft_names`; of a model of native resolution the projector is the
mergers. vLLM serves a vision-language model with adapters on its
language model, and neither another projector beside nor `modules_to_save`: its base is the directory that `--base`
writes, which has the trained projector, and everything else that is no adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError
from models.common.files import new_directory
from tools.export import peft_names

if TYPE_CHECKING:
    from torch import Tensor

    from models.bundle import Check, Parity
    from tools.export.formats import ExportOptions
    from tools.export.merge import Loaded, Source
    from tools.export.reference import Trained

MARK = ".lora_"


def export(source: Source, out: Path, options: ExportOptions) -> str:
    """Write the adapter, and with `options.base` the base that it is over, and compare both with the trained model.

    Raises:
        InputError: the stage trained no LoRA, or it needs a base of its own and none is to be written.
    """
    from tools.export.card import write_card
    from tools.export.merge import load
    from tools.export.report import insist, write_parity

    _check_tuning(source)
    loaded = load(source)
    trained = loaded.trained
    if options.base is None:
        _check_base(trained)
    else:
        write_base(loaded, source, options.base, options)
    with new_directory(out) as directory:
        write_adapter(trained, directory, options.base)
        has_projector = not _is_over_published(trained, options.base) and write_projector(trained, directory)
        parity = _compare(loaded, directory, options)
        insist(parity, f"{out}: the adapter over its base differs from the trained model", options.force)
        write_parity(directory, parity)
        recipe = {**source.recipe.model_dump(mode="json"), "stage": source.stage}
        write_card(directory, "adapter", recipe, parity, options, family=_family(trained))
    beside = ", the projector beside it" if has_projector else ""
    return f"an adapter of {source.recipe.name}/{source.stage} over {_base_name(trained, options.base)}{beside}"


def _check_tuning(source: Source) -> None:
    from trainer.config.tuning import Lora

    tune = source.recipe.stage(source.stage).tune
    if source.reader is None or not isinstance(tune.language, Lora):
        kind = "untrained" if source.reader is None else f"{tune.language.kind} in this stage"
        raise InputError(
            f"{source.stage}: no adapter in it, its language model is {kind}; --to stock writes the whole model"
        )


def _is_over_published(trained: Trained, base: Path | None) -> bool:
    return base is None and trained.model.layout is not None


def _check_base(trained: Trained) -> None:
    """Raise InputError unless the adapter's base is the model, or the language model, that the recipe names."""
    is_published = trained.model.layout is not None
    whole = [name for name in trained.names if MARK not in name and not (is_published and peft_names.is_saved(name))]
    if not is_published:
        whole = [name for name in whole if name.startswith("language.")]
    if whole:
        raise InputError(
            f"{trained.where}: {min(whole)} was trained in full as well, so no published model is this adapter's base;"
            " write one with --base DIR"
        )
    if not is_published and trained.model.language.weights_directory() is None:
        kind = type(trained.model.language).__name__
        raise InputError(f"{kind}: it starts from no published model; write the adapter's base with --base DIR")


def write_base(loaded: Loaded, source: Source, base: Path, options: ExportOptions) -> None:
    """Write the bundle of what was trained without the adapters, compared with the same.

    Where `stock` can write it, it does: vLLM takes no projector of one layer, and transformers 4.57 other names of some
    towers.

    Raises:
        InputError: parity fails.
    """
    from models.opening import open_config
    from models.registered import OWN_CONFIGS
    from tools.export import published
    from tools.export.bundle import hidden_beside
    from tools.export.merge import merge_loaded

    plain = dataclasses.replace(loaded, trained=loaded.trained.without_adapters())
    with hidden_beside(base) as merged:
        merge_loaded(plain, source, merged, list(options.probes), force=options.force, memory_gb=options.memory_gb)
        config = open_config(merged)
        if isinstance(config, OWN_CONFIGS):
            merged.rename(base)
        else:
            published.export(merged, base, options)


def adapter_tensors(trained: Trained, *, base: Path | None) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors in peft's names; of parts beside the language model only over a published model."""
    from models.export import num_vocabulary_rows

    rows, modules = num_vocabulary_rows(trained.facts), _modules(trained, base)
    for name in _taken(trained, base):
        value = trained.weight(name)
        if modules is not None and ".lora_embedding_A." in name and value.shape[1] < rows:
            mean = value.mean(dim=1, keepdim=True)  # as `with_image_row` makes the row of the embedding
            value = _joined(value, mean.expand(-1, rows - value.shape[1]))
        yield peft_names.peft_name(name, modules), value.contiguous()


def _modules(trained: Trained, base: Path | None) -> peft_names.Modules | None:
    """The modules of the whole model that the adapter is over; None: it is over the language model alone."""
    if base is None and trained.model.layout is None:
        return None
    return peft_names.SQUARES if trained.facts.image.fit.grid is None else peft_names.NATIVE


def _taken(trained: Trained, base: Path | None) -> list[str]:
    """The weights of the checkpoint that go into the adapter."""
    if _is_over_published(trained, base):
        return sorted(trained.names)
    return sorted(name for name in trained.names if MARK in name and name.startswith("language."))


def _joined(left: Tensor, right: Tensor) -> Tensor:
    import torch

    return torch.cat([left, right], dim=1)


def write_adapter(trained: Trained, directory: Path, base: Path | None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which names every adapted module in full."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors = dict(adapter_tensors(trained, base=base))
    adapted = _adapted(trained, base)
    modules = sorted(module for part in adapted.values() for module in part)
    saved = sorted({peft_names.saved_module(name) for name in tensors if MARK not in name})
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    tuning: Any = trained.config.tune.language
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        use_dora=tuning.dora,
        target_modules=modules,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=_base_name(trained, base),
        modules_to_save=saved or None,
        **_patterns(trained, adapted),
    )
    config.target_modules = modules  # peft keeps a set, whose order differs from process to process
    config.save_pretrained(directory)


def _adapted(trained: Trained, base: Path | None) -> dict[str, set[str]]:
    """The modules that have an adapter, as peft finds them, by our part."""
    found: dict[str, set[str]] = {}
    for name in _taken(trained, base):
        if MARK in name:
            module = peft_names.peft_name(name, _modules(trained, base)).removeprefix(peft_names.ROOT)
            found.setdefault(name.partition(".")[0], set()).add(module.partition(MARK)[0])
    return found


def _patterns(trained: Trained, adapted: dict[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Rank and alpha of the modules of other parts than the language model.

    Raises:
        InputError: one part learnt LoRA and another DoRA, which peft has one word for.
    """
    from trainer.config.tuning import Lora

    tune = trained.config.tune
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for part, modules in sorted(adapted.items()):
        tuning, inside = getattr(tune, part), sorted(modules)
        if part == "language" or not isinstance(tuning, Lora):
            continue
        if tuning.dora != getattr(tune.language, "dora", False):
            raise InputError(
                f"{trained.where}: DoRA in one part and LoRA in another, which no adapter of peft can say; write the"
                " whole model with --to stock"
            )
        ranks |= dict.fromkeys(inside, tuning.rank)
        alphas |= dict.fromkeys(inside, tuning.alpha)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _family(trained: Trained) -> str:
    """`model_type` of the whole model: the published one, or what a bundle of ours would be."""
    from models.opening import open_config

    return "llava" if trained.model.layout is None else str(open_config(trained.model.layout).model_type)


def _base_name(trained: Trained, base: Path | None) -> str:
    """What the adapter is over; of a directory on this machine its name alone."""
    source = trained.model if trained.model.layout is not None else trained.model.language
    name = str(base) if base is not None else str(getattr(source, "path", "a new language model"))
    return Path(name).name if Path(name).is_absolute() or base is not None else name


def write_projector(trained: Trained, directory: Path) -> bool:
    """Write the projector in stock Llava's names where the checkpoint holds one; returns whether it does."""
    from safetensors.torch import save_file

    from models.export import projector_tensors
    from tools.export.merge import module_tensors

    if not any(name.startswith("projector.") for name in trained.names):
        return False
    weights = dict(module_tensors(trained, "projector", trained.projector))
    tensors = {name: value.to(trained.dtype).contiguous() for name, value in projector_tensors(trained.model, weights)}
    save_file(tensors, directory / "projector.safetensors", metadata={"format": "pt"})
    return True


def _compare(loaded: Loaded, directory: Path, options: ExportOptions) -> Parity:
    """The parity report of what peft opens against the trained model with its adapters beside its weights."""
    from models.bundle import Check, Parity
    from tools.export.answering import lack_of_memory
    from tools.export.parity import compare, device_of_this_machine, read_trained

    trained, probes = loaded.trained, list(options.probes)
    reference = "the trained model"
    lack = lack_of_memory(_bytes_whole(trained, options), device_of_this_machine(), options.memory_gb)
    if lack:
        check = Check(name="opened by peft", value=0.0, bound=None, passed=True, note=lack)
        return Parity(reference=reference, num_prompts=0, checks=(check,))
    found = _read(loaded, directory, options)
    precision = trained.config.engine.precision
    report = compare(read_trained(trained, loaded.template, probes), found, precision, reference)
    return report.model_copy(update={"checks": (*report.checks, _all_loaded())})


def _all_loaded() -> Check:
    from importlib.metadata import version

    from models.bundle import Check

    return Check(name="opened by peft", value=1.0, bound=1.0, passed=True, note=f"peft {version('peft')}")


def _bytes_whole(trained: Trained, options: ExportOptions) -> int:
    """Bytes of the base in fp32, in which it is opened."""
    from tools.export.answering import weight_bytes

    directory = options.base or trained.model.layout or trained.model.language.weights_directory()
    assert directory is not None  # `_check_base`
    return weight_bytes(directory) * (1 if trained.dtype.itemsize == 4 else 2)


def _read(loaded: Loaded, directory: Path, options: ExportOptions) -> Any:
    from models.opening import open_language, open_model, open_processor, put_adapter
    from tools.export.parity import device_of_this_machine, read_stock, read_trained

    trained, probes, device = loaded.trained, list(options.probes), device_of_this_machine()
    whole = options.base or trained.model.layout
    if whole is not None:
        model = put_adapter(open_model(whole, device).float(), directory)
        return read_stock(model, open_processor(whole), probes, device)
    base = trained.model.language.weights_directory()
    assert base is not None  # `_check_base`
    language = put_adapter(open_language(base, trained.dtype).float().to(device), directory)
    return read_trained(trained, loaded.template, probes, language)

"""GGUF -> a language model in Hugging Face format: transformers reads it, `gguf` dequantizes, every tensor is counted.

transformers refuses to save a model that it read from GGUF ("quantized with gguf and is not serializable"), so the
weights are copied into a new model of the same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.common.errors import InputError, single_line
from models.common.source import check_loaded


def write_language(source: Path, out: Path) -> str:
    """Write weights in fp32, config.json and tokenizer of the GGUF file `source` into `out`; returns a line about it.

    Raises:
        InputError: transformers does not know its architecture, or a tensor is missing or left over.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, name = source.parent, source.name
    try:
        read, report = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise InputError(f"{source}: transformers cannot read this GGUF ({single_line(error)})") from error
    check_report(source, report)
    config = type(read.config).from_dict(
        {
            key: value
            for key, value in read.config.to_dict().items()
            if key not in ("quantization_config", "_model_name_or_path")
        }
    )
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True, strict=True)
    model.tie_weights()
    num_tensors = check_tensors(source, model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{source.name}: {num_tensors} tensors, {total / 1e6:.1f} M parameters, {config.model_type}, in fp32"


def check_report(source: Path, report: Mapping[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Check that nothing was missing, left over or of another shape when transformers loaded the weights.

    Raises:
        InputError: something was; weights whose names hold one of `unused` may be missing.
    """
    check_loaded(str(source), report, unused)
    for what, names in (("unknown to transformers", "unexpected_keys"), ("of another shape", "mismatched_keys")):
        if report[names]:
            first = sorted(map(str, report[names]))[:3]
            raise InputError(f"{source}: {len(report[names])} weights are {what}: {', '.join(first)}")


def check_tensors(source: Path, model: Any) -> int:
    """Check that the file's tensors are as many, and have as many elements, as the model's; returns their number.

    transformers passes over a tensor whose name it cannot map without a word.

    Raises:
        InputError: they differ.
    """
    from gguf import GGUFReader

    stored = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(source).tensors}
    stored.pop("rope_freqs.weight", None)  # rope's factors, which transformers keeps in config.json
    kept = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sorted(stored.values()) != sorted(kept.values()):
        raise InputError(
            f"{source}: {len(stored)} tensors of {sum(stored.values()):,} elements in it, {len(kept)} of"
            f" {sum(kept.values()):,} in transformers' {type(model).__name__}: not the same model"
        )
    return len(stored)

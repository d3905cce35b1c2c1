"""A bundle with packed integer weights that vLLM opens: `sightline export RUN-or-BUNDLE OUT --to w4a16`.

    the bundle, layer by layer --GPTQ on the golden set--> 4 or 8 bits a weight, packed by compressed-tensors
    --budget: the worst layers stay in 16 bit until the logits are within it
    OUT, compared with the bundle; transformers (with compressed-tensors) and vLLM open it

Tower, projector, embedding and head stay as they are, and what config.json says of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from models.bundle import LayerReport, Manifest
from models.common.errors import InputError
from models.common.files import new_directory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.common.sharded import TensorFiles
    from tools.export.formats import ExportOptions
    from tools.export.parity import Reading


RENAMED = ("dinov2", "dinov2_with_registers")
"""Towers for which transformers' conversion_mapping.py converts one weight into two (gate and up). Its reader of packed
weights adds sources that such a converter does not take: "source keys=['mlp.weights_in.weight_packed', ..."."""


def export_w4a16(bundle: Path, out: Path, options: ExportOptions) -> str:
    """Write the bundle with 4 bits a weight; see `export`."""
    return export(bundle, out, options, "w4a16")


def export_w8a16(bundle: Path, out: Path, options: ExportOptions) -> str:
    """Write the bundle with 8 bits a weight; see `export`."""
    return export(bundle, out, options, "w8a16")


def export(bundle: Path, out: Path, options: ExportOptions, precision: Any) -> str:
    """Calibrate, write, compare.

    Raises:
        InputError: the bundle is damaged or quantized already, its class is ours alone, its layers cannot be packed,
            the budget cannot be met, or parity fails.
    """
    from models.bundle import verify
    from models.opening import open_config
    from tools.export.packed import check_package
    from tools.export.public import check_stock

    check_package()
    manifest = verify(bundle)
    if manifest.precision not in ("fp32", "fp16", "bf16"):
        raise InputError(f"{bundle}: it is {manifest.precision} already; export the merged bundle it was made from")
    config = open_config(bundle)
    check_stock(config, bundle, precision)
    if config.vision_config.model_type in RENAMED:
        raise InputError(
            f"{bundle}: a tower of type {config.vision_config.model_type} cannot be exported to {precision}:"
            " transformers joins weights of it when it opens them, and cannot beside packed ones; --to stock and"
            " `sightline quantize --to nf4` can"
        )
    with new_directory(out) as directory, TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        compression = Compression.calibrated(bundle, Path(scratch), options, precision)
        return compression.write(directory, out, manifest)


@dataclass(frozen=True)
class Compression:
    """A calibrated bundle: every layer packed, in files beside OUT, before some of them are left whole after all."""

    bundle: Path
    options: ExportOptions
    precision: Any
    config: Any
    packing: Any
    files: TensorFiles
    packed: TensorFiles
    errors: dict[str, float]
    device: torch.device

    @classmethod
    def calibrated(cls, bundle: Path, scratch: Path, options: ExportOptions, precision: Any) -> Compression:
        """Quantize every layer on the golden set, into the directory `scratch`."""
        import torch

        from models.common.sharded import ShardedWriter, TensorFiles
        from models.opening import open_config, open_processor
        from tools.export.calibrate import calibrate
        from tools.export.gptq import IntegerGrid
        from tools.export.packed import BITS, group_size, layers_to_pack, pack, scheme
        from tools.export.parity import device_of_this_machine
        from tools.export.stock import FromFiles, name_in_files, skeleton

        config, device, files = open_config(bundle), device_of_this_machine(), TensorFiles.open(bundle)
        model = skeleton(config)
        size = group_size(layers_to_pack(model), bundle)
        packing, errors, writer = scheme(BITS[precision], size), dict[str, float](), ShardedWriter(scratch)
        dtype = config.dtype or torch.float32

        grid = IntegerGrid(packing.weights, dtype)

        def keep(name: str, weight: Tensor, found: Tensor, error: float) -> None:
            errors[name] = error
            in_file = name_in_files(files, f"{name}.weight")
            for leaf, value in pack(in_file, found, grid.scales(weight), packing).items():
                writer.add(leaf, value.cpu())

        fetch = FromFiles(files, device)
        calibrate(model, fetch, open_processor(bundle), options.probes, grid=grid, device=device, keep=keep)
        writer.close()
        packed = TensorFiles.open(scratch)
        return cls(bundle, options, precision, config, packing, files, packed, errors, device)

    def write(self, directory: Path, out: Path, manifest: Manifest) -> str:
        """Choose the layers that stay whole, write, and compare with the bundle.

        Raises:
            InputError: the budget cannot be met, or parity fails.
        """
        from models.common.source import sha256_of
        from tools.export.answering import Limits, finish, weight_bytes
        from tools.export.card import write_card
        from tools.export.parity import compare, read_bundle
        from tools.export.public import without_paths

        probes, budget = list(self.options.probes), self.options.budget
        reference = read_bundle(self.bundle, probes)
        whole = self._left_whole(reference, out)
        self._write_files(directory, whole)
        parity = compare(reference, read_bundle(directory, probes), self.precision, "the merged bundle", budget)
        layers = tuple(
            LayerReport(name=name, precision=manifest.precision if name in whole else self.precision, error=error)
            for name, error in self.errors.items()
        )
        parents = {**without_paths(manifest.parents), "bundle_manifest": sha256_of(self.bundle / "sightline.json")}
        facts = {"recipe": without_paths(manifest.recipe), "precision": self.precision, "parents": parents}
        limits = Limits(self.options.force, self.options.memory_gb)
        refusal = f"{out}: too far from {self.bundle}"
        made = finish(directory, probes, parity, refusal, limits, layers=layers, **facts)
        family = self.config.model_type
        write_card(directory, self.precision, manifest.recipe, made.parity, self.options, family=family)
        sizes = f"{weight_bytes(directory) / 1e6:.1f} MB of weights (was {weight_bytes(self.bundle) / 1e6:.1f})"
        worst = max(self.errors.values())
        return (
            f"{self.precision} in groups of {self.packing.weights.group_size}, {len(whole)} of {len(layers)} layers"
            f" left whole, largest error of an output {worst:.3f}; {sizes}"
        )

    def _left_whole(self, reference: Reading, out: Path) -> set[str]:
        """The layers that stay in 16 bit: the worst 1, 2, 4, ..., counting as one what vLLM computes as one."""
        from tools.export.packed import fused_name
        from tools.export.parity import difference

        if self.options.budget is None:
            return set()
        by_fused: dict[str, list[str]] = {}
        for name in self.errors:
            by_fused.setdefault(fused_name(name), []).append(name)
        order = sorted(by_fused.values(), key=lambda names: -max(self.errors[name] for name in names))
        gap = 0.0
        powers = [1 << power for power in range(len(order).bit_length())]
        for num in sorted({0, *powers, len(order)}):
            whole = {name for names in order[:num] for name in names}
            gap, _ = difference(reference.logits, self._trial(whole).logits)
            print(f"{num} of {len(order)} layers in 16 bit: relative logit difference {gap:.3g}", flush=True)
            if gap <= self.options.budget:
                return whole
        raise InputError(f"{out}: --budget {self.options.budget} cannot be met, with all layers whole it is {gap:.3g}")

    def _trial(self, whole: set[str]) -> Reading:
        """Run the golden set through the packed model with these layers in 16 bit."""
        from models.opening import open_processor
        from tools.export.parity import read_stock
        from tools.export.stock import FromFiles, FromPacked, name_in_files, skeleton
        from tools.export.streamed import stream

        kept = {name_in_files(self.files, f"{name}.weight") for name in whole}
        plain = FromFiles(self.files, self.device)
        fetch = FromPacked(self.packed, self._settings(whole), plain, self.device, kept)
        model = stream(skeleton(self.config), fetch, self.device)
        return read_stock(model, open_processor(self.bundle), list(self.options.probes), self.device)

    def _settings(self, whole: set[str]) -> dict[str, Any]:
        from tools.export.packed import settings

        return settings(self.packing, whole)

    def _write_files(self, directory: Path, whole: set[str]) -> None:
        """The packed layers, everything else as it is in the bundle, and the documents."""
        from models.bundle_files import copy_config
        from models.common.sharded import ShardedWriter
        from tools.export.packed import LEAVES
        from tools.export.published import as_pair, copy_documents, projector_pair, stock_tensors
        from tools.export.stock import name_in_files

        chosen = {name_in_files(self.files, f"{name}.weight") for name in self.errors if name not in whole}
        pair, writer = projector_pair(self.files, self.config), ShardedWriter(directory)
        for name, value in stock_tensors(self.files, pair):
            if name not in chosen:
                writer.add(name, value)
                continue
            for leaf in LEAVES:
                writer.add(
                    f"{name.removesuffix('weight')}{leaf}", self.packed.read(f"{name.removesuffix('weight')}{leaf}")
                )
        writer.close()
        copy_config(self.bundle, directory, {**as_pair(pair), "quantization_config": self._settings(whole)})
        copy_documents(self.bundle, directory)

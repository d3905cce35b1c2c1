"""Bundle -> a smaller bundle: `python -m tools.quantize BUNDLE OUT --to nf4`, on a GPU or a CPU.

    the whole bundle, layer by layer --> logits on the golden set, and each layer's error
    --budget: the worst layers stay in 16 bit until the logits are within it
    weights, one by one --bitsandbytes--> OUT, compared with the whole bundle layer by layer

Vision tower, projector and head are not quantized, since they are small and their errors are not averaged out. The
source must be in 16 or 32 bit: weights are never merged into, or requantized from, 4 bits.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from models.bundle import LayerReport, Manifest
from models.common.errors import InputError, run_cli
from models.common.files import new_directory
from tools.export.arguments import add_golden, add_out, golden_set, out_of, writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.common.sharded import TensorFiles
    from tools.export.golden import Probe
    from tools.export.parity import Reading

Target = Literal["nf4", "int8"]


def main(argv: list[str]) -> int:
    """Quantize and report; returns 0 if the bundle is written and passes its parity check."""
    parser = argparse.ArgumentParser(prog="tools.quantize", description="Quantize a bundle.")
    parser.add_argument("bundle", type=Path, help="a merged bundle")
    add_out(parser)
    add_options(parser)
    arguments = parser.parse_args(argv)
    out = out_of(arguments)
    with writing(out):
        quantize(arguments.bundle, out, options_of(arguments))
    print(f"{out}: open it with: sightline demo {out}")
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of quantization; `tools.bundle` has the same."""
    parser.add_argument("--to", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--budget", type=float, help="largest relative logit difference; the worst layers stay 16 bit")
    parser.add_argument("--calibrate", action="store_true", help="NF4 whose rounding makes up for itself (GPTQ)")
    add_golden(parser)
    parser.add_argument("--force", action="store_true", help="write the bundle even if its parity fails")


@dataclass(frozen=True)
class Options:
    """Options of quantization: the format, the bound on the relative logit difference, and the golden set.

    With `calibrate` weights are rounded by what flows through them for the golden set. `memory_gb` is the memory for
    opening the whole result, by default what is free.
    """

    to: Target = "nf4"
    budget: float | None = None
    probes: tuple[Probe, ...] = ()
    force: bool = False
    memory_gb: float | None = None
    calibrate: bool = False


def options_of(arguments: argparse.Namespace) -> Options:
    """The options of a command line, with its golden set read.

    Raises:
        InputError: a budget that is not above 0, a golden set that cannot be read, or options that do not go together.
    """
    if arguments.budget is not None and not arguments.budget > 0:
        raise InputError(f"--budget {arguments.budget}: give a share of the logits' spread above 0, such as 0.1")
    if arguments.calibrate and (arguments.to != "nf4" or arguments.budget is not None):
        raise InputError("--calibrate: it is for --to nf4 without --budget, which tries layers rounded one by one")
    probes = tuple(golden_set(arguments))
    return Options(
        arguments.to, arguments.budget, probes, arguments.force, arguments.memory_gb, calibrate=arguments.calibrate
    )


def quantize(bundle: Path, out: Path, options: Options, *, parent: str | None = None) -> Path:
    """Write the quantized bundle to `out`, atomically.

    Args:
        parent: the source's name in the report, by default its path.

    Raises:
        InputError: the source is damaged or quantized already, the budget cannot be met, or parity fails.
    """
    from models.bundle import verify

    manifest = verify(bundle)
    if manifest.precision not in ("fp32", "fp16", "bf16"):
        raise InputError(f"{bundle}: it is {manifest.precision} already; quantize the merged bundle it was made from")
    quantization = Quantization.open(bundle, manifest, options)
    with new_directory(out) as directory:
        quantization.run(directory, out, parent or str(bundle))
    return out


class Quantization:
    """The quantization of one bundle: read it, choose the layers that stay in 16 bit, write, compare."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        options: Options,
        *,
        config: Any,
        processor: Any,
        files: TensorFiles,
        whole: list[str],
        device: torch.device,
    ) -> None:
        import torch

        from tools.export.golden import drawn

        self._bundle, self._manifest, self._options = bundle, manifest, options
        self._config, self._processor, self._files = config, processor, files
        self._whole, self._device = whole, device
        self._probes = list(options.probes) or drawn()
        self._dtype: torch.dtype = config.dtype or torch.float32

    @classmethod
    def open(cls, bundle: Path, manifest: Manifest, options: Options) -> Quantization:
        """Read the bundle's documents and its tensors' locations; its weights are read one by one later.

        Prints which layers the format cannot hold.
        """
        from models.common.sharded import TensorFiles
        from models.languages.nf4 import told
        from models.opening import open_config, open_processor
        from tools.export.bitsandbytes import left_whole
        from tools.export.parity import device_of_this_machine
        from tools.export.stock import skeleton

        config, processor, files = open_config(bundle), open_processor(bundle), TensorFiles.open(bundle)
        whole = left_whole(skeleton(config), options.to)
        if whole:
            print(told(whole), flush=True)
        parts = {"config": config, "processor": processor, "files": files, "whole": whole}
        return cls(bundle, manifest, options, **parts, device=device_of_this_machine())

    def run(self, directory: Path, out: Path, parent: str) -> None:
        """Measure the layers' errors, choose those that stay in 16 bit, write to `directory`, compare with the source.

        Raises:
            InputError: the budget cannot be met, or the result differs too much from its source.
        """
        from models.common.source import sha256_of
        from tools.export.answering import Limits, finish
        from tools.export.parity import compare, read_bundle

        options, manifest = self._options, self._manifest
        reference, errors = self._read_source()
        promoted = self._promoted(reference, errors, out)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            calibrated = self._calibrated(Path(scratch), errors) if options.calibrate else {}
            self._write(directory, promoted, calibrated)
        parity = compare(reference, read_bundle(directory, self._probes), options.to, parent, options.budget)
        parents = {"bundle": parent, "bundle_manifest": sha256_of(self._bundle / "sightline.json"), **manifest.parents}
        layers = tuple(
            LayerReport(name=name, precision=manifest.precision if name in promoted else options.to, error=error)
            for name, error in errors.items()
        )
        facts = {"recipe": manifest.recipe, "precision": options.to, "parents": parents, "layers": layers}
        limits = Limits(options.force, options.memory_gb)
        finish(directory, self._probes, parity, f"{out}: too far from {parent}", limits, **facts)
        _tell(layers, self._bundle, directory)

    def _read_source(self) -> tuple[Reading, dict[str, float]]:
        """Run the golden set through the source bundle, and measure each layer's error."""
        from tools.export.bitsandbytes import layers_to_quantize, measuring
        from tools.export.stock import open_streamed

        model = open_streamed(self._bundle, self._device)
        layers = layers_to_quantize(model, self._whole)
        with measuring(model, layers, self._options.to, self._dtype) as errors:
            reference = self._read(model)
        return reference, errors

    def _calibrated(self, scratch: Path, errors: dict[str, float]) -> dict[str, TensorFiles]:
        """By a weight's name, the files of the tensors that replace it; its layer's error is put into `errors`."""
        from models.common.sharded import ShardedWriter, TensorFiles
        from tools.export.calibrate import calibrate
        from tools.export.nf4_grid import Nf4Grid
        from tools.export.stock import FromFiles, name_in_files, skeleton

        grid, writer, names = Nf4Grid(self._dtype, self._device), ShardedWriter(scratch), []

        def keep(layer: str, weight: Tensor, found: Tensor, error: float) -> None:
            errors[layer] = error
            names.append(name_in_files(self._files, f"{layer}.weight"))
            for name, part in grid.packed(names[-1], weight, found):
                writer.add(name, part.cpu())

        model, fetch = skeleton(self._config), FromFiles(self._files, self._device)
        golden = (self._processor, self._probes)
        calibrate(model, fetch, *golden, grid=grid, device=self._device, keep=keep, chosen=set(errors))
        writer.close()
        return dict.fromkeys(names, TensorFiles.open(scratch)) if names else {}

    def _read(self, model: Any) -> Reading:
        from tools.export.parity import read_stock

        return read_stock(model, self._processor, self._probes, self._device)

    def _promoted(self, reference: Reading, errors: dict[str, float], out: Path) -> list[str]:
        """The layers that stay in 16 bit: the worst 1, 2, 4, ... until the budget is met."""
        from tools.export.bitsandbytes import worst_first
        from tools.export.parity import difference

        if self._options.budget is None:
            return []
        order, gap = worst_first(errors), 0.0
        powers = [1 << power for power in range(len(order).bit_length())]
        for num in sorted({0, *powers, len(order)}):
            gap, _ = difference(reference.logits, self._trial(order[:num]).logits)
            print(f"{num} of {len(order)} layers in 16 bit: relative logit difference {gap:.3g}", flush=True)
            if gap <= self._options.budget:
                return order[:num]
        raise InputError(f"{out}: --budget {self._options.budget} cannot be met, with all layers whole it is {gap:.3g}")

    def _trial(self, promoted: list[str]) -> Reading:
        """Run the golden set through the quantized model with these layers in 16 bit."""
        from tools.export.bitsandbytes import Quantizing
        from tools.export.stock import FromFiles, skeleton
        from tools.export.streamed import stream

        model = skeleton(self._config, self._settings(promoted))
        fetch = FromFiles(self._files, self._device)
        return self._read(stream(model, Quantizing(fetch, self._options.to, self._dtype, self._device), self._device))

    def _settings(self, promoted: list[str]) -> Any:
        """bitsandbytes' configuration with these layers in 16 bit."""
        from tools.export.bitsandbytes import settings

        return settings(self._options.to, self._dtype, [*self._whole, *promoted])

    def _write(self, directory: Path, promoted: list[str], calibrated: dict[str, TensorFiles]) -> None:
        """The weights one by one, the config, and the processor's files unchanged, so that prompts cannot change."""
        from tqdm import tqdm

        from models.bundle_files import save_config
        from models.common.sharded import ShardedWriter
        from tools.export.bitsandbytes import layers_to_quantize, packed
        from tools.export.stock import name_in_files, skeleton

        layers = layers_to_quantize(skeleton(self._config), self._whole)
        chosen = {name_in_files(self._files, f"{name}.weight") for name in layers if name not in promoted}
        writer = ShardedWriter(directory)
        for name in tqdm(self._files, desc=f"to {self._options.to}", unit="tensor"):
            if name in calibrated:
                for leaf in (leaf for leaf in calibrated[name] if leaf == name or leaf.startswith(f"{name}.")):
                    writer.add(leaf, calibrated[name].read(leaf))
                continue
            value = self._files.read(name)
            if name in chosen:
                for packed_name, part in packed(name, value.to(self._dtype), self._options.to, self._device):
                    writer.add(packed_name, part)
            else:
                writer.add(name, value)
        writer.close()
        self._config.quantization_config = self._settings(promoted)
        save_config(self._config, directory)
        for file in self._bundle.iterdir():
            is_models = file.suffix == ".safetensors" or file.name in ("config.json", "sightline.json")
            if not is_models and not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, directory / file.name)


def _tell(layers: tuple[LayerReport, ...], before: Path, after: Path) -> None:
    """Print the layers of largest error, and the weights' sizes before and after."""
    from tools.export.answering import weight_bytes

    for layer in sorted(layers, key=lambda layer: -layer.error)[:5]:
        print(f"  {layer.error:.4f}  {layer.name} ({layer.precision})")
    num_whole = sum(layer.precision in ("fp32", "fp16", "bf16") for layer in layers)
    sizes = f"{weight_bytes(after) / 1e6:.1f} MB of weights (was {weight_bytes(before) / 1e6:.1f})"
    print(f"{len(layers)} layers, {num_whole} of them left whole, the worst above by their outputs' error; {sizes}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

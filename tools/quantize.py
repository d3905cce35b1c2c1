"""Bundle -> a smaller bundle: `python -m tools.quantize BUNDLE OUT --to nf4`, on a GPU or a CPU.

    the whole bundle, layer by layer --> logits on the golden set, and each layer's error
    --budget: the worst layers stay in 16 bit until the logits are within it
    weights, one by one --bitsandbytes--> OUT, compared with the whole bundle layer by layer

Vision tower, projector and head stay as they are, since they are small and their errors are not averaged away. The
source must be whole (16 or 32 bit): weights are never merged into, or requantized from, 4 bits.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.bundle import LayerReport, Manifest
from models.errors import InputError, run_cli
from models.files import new_directory
from tools.bundles.words import add_golden, add_out, golden_set, out_of, writing

if TYPE_CHECKING:
    import torch

    from tools.bundles.golden import Probe
    from tools.parity import Reading

Target = Literal["nf4", "int8"]


def main(argv: list[str]) -> int:
    """Quantize and report; 0 when the bundle is there and its parity holds."""
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
    """What quantizing can be told; `tools.bundle` takes the same."""
    parser.add_argument("--to", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--budget", type=float, help="largest relative logit difference; the worst layers stay 16 bit")
    add_golden(parser)
    parser.add_argument("--force", action="store_true", help="write the bundle even if its parity fails")


@dataclass(frozen=True)
class Options:
    """How to quantize: to what, within which relative logit difference, measured on which golden set."""

    to: Target = "nf4"
    budget: float | None = None
    probes: tuple[Probe, ...] = ()
    force: bool = False


def options_of(arguments: argparse.Namespace) -> Options:
    """The options of a command line, its golden set read."""
    if arguments.budget is not None and not arguments.budget > 0:
        raise InputError(f"--budget {arguments.budget}: give a share of the logits' spread above 0, such as 0.1")
    return Options(arguments.to, arguments.budget, tuple(golden_set(arguments)), arguments.force)


def quantize(bundle: Path, out: Path, options: Options, *, parent: str | None = None) -> Path:
    """Write the quantized bundle; raises InputError where the source is not whole or parity fails.

    `parent` is what the report calls the source, by default its path.
    """
    from models.bundle import verify

    manifest = verify(bundle)
    if manifest.precision not in ("fp32", "fp16", "bf16"):
        raise InputError(f"{bundle}: it is {manifest.precision} already; quantize the merged bundle it was made from")
    work = Work(bundle, manifest, options)
    with new_directory(out) as directory:
        work.run(directory, out, parent or str(bundle))
    return out


class Work:
    """One bundle on its way to fewer bits."""

    def __init__(self, bundle: Path, manifest: Manifest, options: Options) -> None:
        import torch
        from transformers import AutoConfig

        from models.sharded import TensorFiles
        from tools.bundles.golden import drawn
        from tools.parity import device_of_this_machine

        self._bundle, self._manifest, self._options = bundle, manifest, options
        self._probes = list(options.probes) or drawn()
        self._device = device_of_this_machine()
        self._config = AutoConfig.from_pretrained(bundle)
        self._dtype: torch.dtype = self._config.dtype or torch.float32
        self._files = TensorFiles(bundle)

    def run(self, directory: Path, out: Path, parent: str) -> None:
        """Measure, choose, write, compare; raises InputError where the result is too far from its source."""
        from models.bundle import write_manifest
        from models.source import sha256_of
        from tools.parity import compare, failed_checks, read_bundle

        options, manifest = self._options, self._manifest
        reference, errors = self._read_source()
        promoted = self._promoted(reference, errors, out)
        self._write(directory, promoted)
        parity = compare(reference, read_bundle(directory, self._probes), options.to, parent, options.budget)
        if not parity.passed and not options.force:
            raise InputError(f"{out}: too far from {parent} ({failed_checks(parity)}); --force writes it all the same")
        parents = {"bundle": parent, "bundle_manifest": sha256_of(self._bundle / "sightline.json"), **manifest.parents}
        layers = tuple(
            LayerReport(name=name, precision=manifest.precision if name in promoted else options.to, error=error)
            for name, error in errors.items()
        )
        write_manifest(
            directory, recipe=manifest.recipe, precision=options.to, parents=parents, parity=parity, layers=layers
        )
        _tell(layers, self._bundle, directory)

    def _read_source(self) -> tuple[Reading, dict[str, float]]:
        """What the whole bundle makes of the golden set, and each layer's error on the way."""
        from tools.bundles.quantizing import layers_to_quantize, measuring
        from tools.bundles.stock import open_streamed

        model = open_streamed(self._bundle, self._device)
        with measuring(model, layers_to_quantize(model), self._options.to, self._dtype) as errors:
            reference = self._read(model)
        return reference, errors

    def _read(self, model: Any) -> Reading:
        from transformers import AutoProcessor

        from tools.parity import read_stock

        return read_stock(model, AutoProcessor.from_pretrained(self._bundle), self._probes, self._device)

    def _promoted(self, reference: Reading, errors: dict[str, float], out: Path) -> list[str]:
        """The layers that stay in 16 bit: as many of the worst, 1, 2, 4, ... as the budget asks for."""
        from tools.bundles.quantizing import worst_first
        from tools.parity import difference

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
        """The golden set through the model as it would be with these layers in 16 bit."""
        from tools.bundles.quantizing import Quantizing, settings
        from tools.bundles.stock import FromFiles, skeleton
        from tools.bundles.streamed import stream

        model = skeleton(self._config, settings(self._options.to, self._dtype, promoted))
        fetch = FromFiles(self._files, self._device)
        return self._read(stream(model, Quantizing(fetch, self._options.to, self._dtype, self._device), self._device))

    def _write(self, directory: Path, promoted: list[str]) -> None:
        """The weights one by one, the config, and the processor's files as they are, so that prompts cannot change."""
        from tqdm import tqdm

        from models.export import names_in_file
        from models.sharded import ShardedWriter
        from tools.bundles.quantizing import layers_to_quantize, packed, settings
        from tools.bundles.stock import skeleton

        layers = layers_to_quantize(skeleton(self._config))
        chosen = {names_in_file(f"{name}.weight")[0] for name in layers if name not in promoted}
        writer = ShardedWriter(directory)
        for name in tqdm(self._files, desc=f"to {self._options.to}", unit="tensor"):
            value = self._files.read(name)
            if name in chosen:
                for packed_name, part in packed(name, value.to(self._dtype), self._options.to, self._device):
                    writer.add(packed_name, part)
            else:
                writer.add(name, value)
        writer.close()
        self._config.quantization_config = settings(self._options.to, self._dtype, promoted)
        self._config.save_pretrained(directory)
        for file in self._bundle.iterdir():
            is_models = file.suffix == ".safetensors" or file.name in ("config.json", "sightline.json")
            if not is_models and not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, directory / file.name)


def _tell(layers: tuple[LayerReport, ...], before: Path, after: Path) -> None:
    """The worst layers and the sizes, for whoever watches."""
    for layer in sorted(layers, key=lambda layer: -layer.error)[:5]:
        print(f"  {layer.error:.4f}  {layer.name} ({layer.precision})")
    num_whole = sum(layer.precision in ("fp32", "fp16", "bf16") for layer in layers)
    sizes = f"{weight_bytes(after) / 1e6:.1f} MB of weights (was {weight_bytes(before) / 1e6:.1f})"
    print(f"{len(layers)} layers, {num_whole} of them left whole, the worst above by their outputs' error; {sizes}")


def weight_bytes(bundle: Path) -> int:
    """Bytes of the weight files in a bundle."""
    return sum(file.stat().st_size for file in bundle.glob("*.safetensors"))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

"""Bundle -> a smaller bundle: `python -m tools.quantize BUNDLE --to nf4 --out OUT`, on a GPU or a CPU.

bitsandbytes quantizes the language model's linear layers; vision tower, projector and head stay as they are, since they
are small and their errors are not averaged away. The source must be whole (16 or 32 bit): weights are never merged
into, or requantized from, 4 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.bundle import Precision
from models.errors import InputError, run_cli
from models.files import new_directory

KEPT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""Modules that are not quantized, by their full name in memory; without the prefix transformers would not find them."""


def main(argv: list[str]) -> int:
    """Quantize and report; 0 when the bundle is there and its parity holds."""
    parser = argparse.ArgumentParser(prog="tools.quantize", description="Quantize a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--to", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="write the bundle even if its parity fails")
    arguments = parser.parse_args(argv)
    out = quantize(arguments.bundle, arguments.out, arguments.to, force=arguments.force)
    before, after = weight_bytes(arguments.bundle), weight_bytes(out)
    sizes = f"{after / 1e6:.1f} MB of weights (was {before / 1e6:.1f})"
    print(f"{out}: {arguments.to}, {sizes}, open it with: sightline demo {out}")
    return 0


def weight_bytes(bundle: Path) -> int:
    """Bytes of the weight files in a bundle."""
    return sum(file.stat().st_size for file in bundle.glob("*.safetensors"))


def quantize(bundle: Path, out: Path, to: str, *, force: bool = False) -> Path:
    """Write the quantized bundle; raises InputError where the source is not whole or parity fails."""
    from models.bundle import verify, write_manifest
    from models.source import sha256_of
    from tools.parity import compare_bundles

    manifest = verify(bundle)
    if manifest.precision not in ("fp32", "bf16"):
        raise InputError(f"{bundle}: it is {manifest.precision} already; quantize the merged bundle it was made from")
    precision: Precision = "int8" if to == "int8" else "nf4"
    with new_directory(out) as directory:
        _write_quantized(bundle, directory, precision)
        parity = compare_bundles(bundle, directory, precision)
        if not parity.passed and not force:
            failed = [
                f"{check.name} is {check.value:.3g}, bound {check.bound}" for check in parity.checks if not check.passed
            ]
            raise InputError(f"{out}: too far from {bundle} ({'; '.join(failed)}); --force writes it all the same")
        parents = {"bundle": str(bundle), "bundle_manifest": sha256_of(bundle / "sightline.json"), **manifest.parents}
        write_manifest(directory, recipe=manifest.recipe, precision=precision, parents=parents, parity=parity)
    return out


def _write_quantized(bundle: Path, directory: Path, precision: str) -> None:
    """The model and its processor; the processor's files are copied, so that prompts and pixels cannot change."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from models.language import quantization

    dtype = AutoConfig.from_pretrained(bundle).dtype or torch.float32
    device = {"": 0} if torch.cuda.is_available() else "cpu"
    settings = quantization(precision, dtype, skip=KEPT)
    model = AutoModelForImageTextToText.from_pretrained(
        bundle, dtype=dtype, quantization_config=settings, device_map=device
    )
    model.save_pretrained(directory)
    for file in bundle.iterdir():
        is_models = file.suffix == ".safetensors" or file.name in ("config.json", "sightline.json")
        if not is_models and not file.name.endswith(".safetensors.index.json"):
            shutil.copy2(file, directory / file.name)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

"""`python -m tests.support.peak_memory BUNDLE FILE...`: what each image takes above an idle process, in MB a line.

In a process of its own, since what other tests have taken counts as its peak for ever. Linux alone.
"""

from __future__ import annotations

import sys
from pathlib import Path


def status_mb(key: str) -> float:
    """A line of /proc/self/status: VmRSS is what is taken now, VmHWM the most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1000


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(bundle: Path, files: list[Path]) -> None:
    from data_pipeline.images import fit, open_image
    from eval.predictor import Predictor
    from models.common.errors import InputError
    from models.spec import ImageSpec, PadImage
    from tests.support.shards import image_bytes

    spec = ImageSpec(size=336, patch_size=14, fit=PadImage(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    predictor = Predictor.open(bundle, device="cpu")
    predictor.chat(image_bytes(), "What?", max_new_tokens=1)
    for file in files:
        forget_peak()
        idle_mb = status_mb("VmRSS")
        try:
            fit(open_image(file), spec)
            predictor.chat(file, "What?", max_new_tokens=1)
            verdict = "taken"
        except InputError as error:
            verdict = str(error)
        print(f"{status_mb('VmHWM') - idle_mb:.0f}\t{verdict}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])

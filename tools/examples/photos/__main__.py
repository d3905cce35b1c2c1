"""`python -m tools.photos DATA`: two pretrained backbones, trained on your photos, bundled, scored, shown on a page.

DATA holds captions.json, a list of {file_name, caption}, and images/. A second start goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from models.common.errors import InputError, run_cli
from models.common.files import write_text
from tools.examples.photos.forecast import precision_of, read_forecast
from tools.examples.photos.packages import PACKAGES
from tools.examples.photos.split import read_entries
from tools.examples.photos.steps import Photos, PhotosSizes, plan, rehearsal, suite, suite_file
from tools.examples.quickstart.__main__ import add_seconds
from tools.examples.quickstart.runner import Runner
from tools.examples.quickstart.steps import Step


def main(argv: list[str]) -> int:
    """Run what is not done yet; print what it will take, the scores, the page and the bundle."""
    photos = _photos(argv)
    run = photos.run
    run.mkdir(parents=True, exist_ok=True)
    for limit in (None, *photos.sizes.num_rehearsed):
        write_text(suite_file(photos, limit), suite(photos, limit))
    num_photos = len({entry["file_name"] for entry in read_entries(photos.data)})
    if num_photos <= photos.sizes.num_held_out:
        raise InputError(
            f"{photos.data}: {num_photos} photos, of which {photos.sizes.num_held_out} are held out; more are needed"
        )
    print(f"{num_photos:,} photos of {photos.data}, {photos.sizes.num_held_out} held out with seed {photos.seed}")
    for package in PACKAGES:
        print(f"from the package index: {package.name} {package.version}, {package.licence}")
    seconds = _run(run, rehearsal(photos))
    print(f"\n{read_forecast(photos, seconds).line(photos.precision)}\n", flush=True)
    *steps, report = plan(photos)
    _run(run, steps)
    Runner(run, [*steps, report]).run()
    print(f"\n{(run / 'report.txt').read_text(encoding='utf-8').rstrip()}\n")
    print(f"page    {run / 'report.html'}\nbundle  {run / 'bundle'}")
    print(f"talk to it:  .venv/bin/sightline demo {run / 'bundle'} --examples {photos.data / 'images'}")
    return 0


def _run(run: Path, steps: Sequence[Step]) -> dict[str, float]:
    """Run what is not done of these steps, and add to RUN/seconds.json; returns each step's seconds."""
    started_s = time.monotonic()
    runner = Runner(run, steps)
    try:
        runner.run()
    finally:
        add_seconds(run, runner, time.monotonic() - started_s)
    return runner.seconds


def _photos(argv: list[str]) -> Photos:
    parser = argparse.ArgumentParser(prog="tools.photos", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path, help="a folder with captions.json and images/")
    parser.add_argument("--run", type=Path, help="where everything goes; default runs/photos, with a seed its own")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights, the order, the page's photos")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="default: bf16 where the processor has units for it",
    )
    parser.add_argument("--sizes", default="{}", help="JSON that changes tools.examples.photos.steps.PhotosSizes")
    arguments = parser.parse_args(argv)
    precision = precision_of() if arguments.precision == "auto" else arguments.precision
    sizes = PhotosSizes.model_validate_json(arguments.sizes)
    run = arguments.run or Path("runs") / ("photos" if arguments.seed == 0 else f"photos_seed_{arguments.seed}")
    return Photos(arguments.data, run, arguments.seed, precision, sizes)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

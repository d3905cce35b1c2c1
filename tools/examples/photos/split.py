"""Which photos are held out: drawn by seed, since a list's own order is no fair split.

DATA/captions.json --seed--> OUT/train.json, OUT/held_out.json      by photo, a photo's captions stay together
                          '-> OUT/golden.json                       of the first: what quantizing is measured on
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from models.common.errors import InputError, run_cli
from models.common.files import new_directory


def main(argv: list[str]) -> int:
    """Write both lists."""
    parser = argparse.ArgumentParser(prog="python -m tools.examples.photos.split", description="Split photos by seed.")
    parser.add_argument("data", type=Path, help="a folder with captions.json and images/")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--held-out", type=int, required=True, help="photos that are not trained on")
    parser.add_argument("--golden", type=int, default=48, help="captions that a quantized bundle is measured on")
    parser.add_argument("--prompt", required=True, help="what is asked about a photo")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    train, held_out = split(read_entries(arguments.data), arguments.held_out, arguments.seed)
    images = (arguments.data / "images").resolve()
    drawn = random.Random(arguments.seed).sample(train, min(arguments.golden, len(train)))
    golden = [
        {"image": str(images / entry["file_name"]), "question": arguments.prompt, "answer": entry["caption"]}
        for entry in drawn
    ]
    with new_directory(arguments.out) as out:
        for name, entries in (("train", train), ("held_out", held_out), ("golden", golden)):
            (out / f"{name}.json").write_text(json.dumps(entries, ensure_ascii=False, indent=0), encoding="utf-8")
    print(f"{len(train):,} captions to train on, {len(held_out):,} held out, drawn with seed {arguments.seed}")
    return 0


def read_entries(data: Path) -> list[dict[str, Any]]:
    """The entries {file_name, caption} of DATA/captions.json.

    Raises:
        InputError: no such folder, no such file, or another content.
    """
    file = data / "captions.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: not there; DATA is a folder with captions.json and images/") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not (data / "images").is_dir():
        raise InputError(f"{data / 'images'}: not there; DATA is a folder with captions.json and images/")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: a list of {{file_name, caption}} is needed")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file_name", "caption")):
            raise InputError(f"{file}, entry {number}: file_name and caption, two texts, are needed")
    return entries


def split(
    entries: list[dict[str, Any]], num_held_out: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(to train on, held out), each in the list's own order; `num_held_out` counts photos.

    Raises:
        InputError: too few photos.
    """
    photos = sorted({entry["file_name"] for entry in entries})
    if not 0 < num_held_out < len(photos):
        raise InputError(f"--held-out {num_held_out}: there are {len(photos)} photos, and some are needed on each side")
    chosen = set(random.Random(seed).sample(photos, num_held_out))
    return (
        [entry for entry in entries if entry["file_name"] not in chosen],
        [entry for entry in entries if entry["file_name"] in chosen],
    )


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

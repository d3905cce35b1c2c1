"""`python -m tools.shards fetch | make | index | check | show`: raw data -> WebDataset tars, and a look at them.

    python -m tools.shards fetch coco2017 raw/coco                 # or any name that a wrong one lists
    python -m tools.shards make data/llava --llava instruct.json --images train2017 --jobs 8
    python -m tools.shards make data/coco --captions captions.csv --images photos --prompt "Describe the picture."
    python -m tools.shards make data/vqa --vqa questions.json annotations.json --images train2014 --resize 336
    python -m tools.shards make data/own --folder holiday          # pictures with KEY.txt beside KEY.jpg
    python -m tools.shards index data/from_img2dataset             # tars that another program wrote
    python -m tools.shards check data/llava
    python -m tools.shards show data/llava --tokenizer models/vicuna --template vicuna_v1 --out page.html

Owns the command line alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import InputError, run_cli

if TYPE_CHECKING:
    from tools.shards.raw import RawSample


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tools.shards", description=(__doc__ or "").split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a known data set")
    fetch.add_argument("name", help="which; a wrong name lists those there are")
    fetch.add_argument("out", type=Path, help="the directory to make")
    fetch.add_argument("--base-url", metavar="URL", help="a mirror that serves the files under the same paths")
    fetch.add_argument(
        "--img2dataset-env",
        type=Path,
        metavar="DIR",
        help="an environment of img2dataset's own, made there if need be (conceptual-captions)",
    )
    make = commands.add_parser("make", help="raw data -> tars and index")
    make.add_argument("out", type=Path, help="the directory to make; must not exist")
    source = make.add_mutually_exclusive_group(required=True)
    source.add_argument("--llava", type=Path, metavar="FILE.json", help="conversations in LLaVA's format")
    source.add_argument(
        "--captions", type=Path, metavar="FILE", help="JSON, JSON Lines, CSV or parquet of file names and captions"
    )
    source.add_argument("--folder", type=Path, metavar="DIR", help="pictures, each with a .txt of the same name")
    source.add_argument("--coco", type=Path, metavar="FILE", help="COCO's caption annotations, .json or .json.gz")
    source.add_argument(
        "--vqa",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="VQAv2's questions and annotations, or the one file of TextVQA or VizWiz",
    )
    make.add_argument("--images", type=Path, metavar="DIR", help="where the pictures lie that a file names")
    make.add_argument(
        "--prompt", default="", help="the user's words before a caption, or after a picture's first question"
    )
    make.add_argument("--resize", type=int, metavar="PIXELS", help="shrink pictures to this shorter side, as JPEGs")
    make.add_argument("--samples-per-shard", type=int, default=1000)
    index = commands.add_parser("index", help="index the tars of a directory")
    index.add_argument(
        "--bad-share-limit",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="stop where more of the tars break off, or more of the samples cannot be used (default 0.05)",
    )
    check = commands.add_parser("check", help="read every sample and list what is broken")
    show = commands.add_parser("show", help="a page of samples as the model gets them")
    show.add_argument("--tokenizer", required=True, help="a directory or a hub name")
    show.add_argument("--template", default="chatml", choices=["plain", "vicuna_v1", "chatml", "llama3", "tokenizer"])
    show.add_argument("--fit", default="crop", choices=["crop", "pad", "anyres"], help="how a picture becomes squares")
    show.add_argument("--size", type=int, default=336, help="side of the square in pixels")
    show.add_argument("--patch", type=int, default=14, help="side of a patch in pixels")
    show.add_argument("--count", type=int, default=20, help="samples, spread evenly over the set")
    show.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    for command in (index, check, show):
        command.add_argument("folder", type=Path, help="a directory of tars")
    for command in (fetch, make, index, check):
        command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return top


def main(argv: list[str]) -> int:
    """Run one command; 0 is success, 1 means `check` found broken samples."""
    arguments = parser().parse_args(argv)
    if arguments.command != "show" and arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: at least 1")
    return _COMMANDS[arguments.command](arguments)


def _fetch(arguments: argparse.Namespace) -> int:
    from tools.shards.fetch import fetch_source, source_named
    from tools.shards.pictures import fetch_pictures

    source, out = source_named(arguments.name), arguments.out
    table = out / source.picture_table if source.picture_table is not None else None
    if table is None or not table.is_file():
        fetch_source(arguments.name, out, base_url=arguments.base_url, progress=not arguments.quiet)
    if table is not None:
        fetch_pictures(table, arguments.jobs, arguments.img2dataset_env)
    print(f"{out}: {source.title}; now: python -m tools.shards {source.then.replace('OUT', str(out))}")
    return 0


def _make(arguments: argparse.Namespace) -> int:
    from tools.shards.write import write_set

    samples = _samples(arguments)
    num_shards = write_set(
        arguments.out,
        samples,
        arguments.samples_per_shard,
        resize=arguments.resize,
        jobs=arguments.jobs,
        progress=not arguments.quiet,
    )
    print(f"{arguments.out}: {len(samples)} samples in {num_shards} shards")
    return 0


def _samples(arguments: argparse.Namespace) -> list[RawSample]:
    from tools.shards.annotations import read_coco, read_vqa
    from tools.shards.raw import read_captions, read_folder, read_llava

    images, prompt = arguments.images, arguments.prompt
    if arguments.folder is not None:
        return read_folder(arguments.folder, prompt)
    if images is None:
        raise InputError("--images DIR is missing: the directory in which the file names begin")
    if arguments.llava is not None:
        return read_llava(arguments.llava, images)
    if arguments.coco is not None:
        return read_coco(arguments.coco, images, prompt)
    if arguments.vqa is not None:
        if len(arguments.vqa) > 2:
            raise InputError("--vqa takes VQA's two files, questions and annotations, or the one of TextVQA or VizWiz")
        return read_vqa(arguments.vqa, images, prompt)
    return read_captions(arguments.captions, images, prompt)


def _index(arguments: argparse.Namespace) -> int:
    from data_pipeline.index import QUARANTINE_FILE, ShardIndex
    from data_pipeline.index_build import build_index

    limit = arguments.bad_share_limit
    build_index(arguments.folder, jobs=arguments.jobs, progress=not arguments.quiet, bad_share_limit=limit)
    index = ShardIndex(arguments.folder)
    print(f"{arguments.folder}: {len(index)} samples in {len(index.shard_names)} shards, {index.fingerprint}")
    if left_out := index.left_out():
        print(
            f"WARNING: {len(left_out)} samples or ends of tars, in {len({line['shard'] for line in left_out})} tars,"
            f" cannot be used and are left out: {arguments.folder / QUARANTINE_FILE} names them",
            file=sys.stderr,
        )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from data_pipeline.index import ShardIndex
    from tools.shards.check import broken_samples

    index = ShardIndex(arguments.folder)
    num_broken, left_out = 0, index.left_out()
    for line in left_out:
        print(f"{line['shard']}\t{line['key']}\t{line['reason']} (left out of the index)")
    for broken in broken_samples(index, jobs=arguments.jobs, progress=not arguments.quiet):
        num_broken += 1
        print(f"{broken.shard}\t{broken.key}\t{broken.reason}")
    rest = f"; {len(left_out)} more were left out when the set was indexed" if left_out else ""
    print(f"{arguments.folder}: {num_broken} of {len(index)} samples are broken{rest}", file=sys.stderr)
    return 1 if num_broken or left_out else 0


def _show(arguments: argparse.Namespace) -> int:
    from data_pipeline.index import ShardIndex
    from tools.shards.show import load_encoder, write_page

    index = ShardIndex(arguments.folder)
    encoder, tokenizer = load_encoder(
        index,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        fit=arguments.fit,
        size=arguments.size,
        patch_size=arguments.patch,
    )
    num_shown = write_page(index, encoder, tokenizer, arguments.count, arguments.out)
    print(f"{arguments.out}: {num_shown} of {len(index)} samples")
    return 0


_COMMANDS = {"fetch": _fetch, "make": _make, "index": _index, "check": _check, "show": _show}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

"""`python -m tools.shards fetch | make | index | check | show`: raw data -> WebDataset tars, and a page to view them.

    python -m tools.shards fetch coco2017 raw/coco                 # or any name that a wrong one lists
    python -m tools.shards make data/llava --llava instruct.json --images train2017 --jobs 8
    python -m tools.shards make data/coco --captions captions.csv --images photos --prompt "Describe the image."
    python -m tools.shards make data/vqa --vqa questions.json annotations.json --images train2014 --resize 336
    python -m tools.shards make data/llava --llava instruct.json --images train2017 --part 0/8    # one of 8 machines
    python -m tools.shards make data/own --folder holiday          # images with KEY.txt beside KEY.jpg
    python -m tools.shards index data/from_img2dataset             # tars that another program wrote
    python -m tools.shards check data/llava
    python -m tools.shards show data/llava                         # images and text; writes data/llava.html
    python -m tools.shards show data/llava --tokenizer models/vicuna --template vicuna_v1 --out page.html

Owns only the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex
    from tools.shards.raw import RawSample


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, one subcommand for each verb."""
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
    source.add_argument("--folder", type=Path, metavar="DIR", help="images, each with a .txt of the same name")
    source.add_argument("--coco", type=Path, metavar="FILE", help="COCO's caption annotations, .json or .json.gz")
    source.add_argument(
        "--vqa",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="VQAv2's questions and annotations, or the one file of TextVQA or VizWiz",
    )
    make.add_argument("--images", type=Path, metavar="DIR", help="where the images lie that a file names")
    make.add_argument(
        "--prompt", default="", help="what the user says before a caption, or after an image's first question"
    )
    make.add_argument("--outside", action="store_true", help="allow file names that lead out of --images")
    make.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images to this shorter side, as JPEGs")
    make.add_argument(
        "--skip-bad",
        type=_percent,
        default=0.0,
        metavar="PERCENT",
        help="leave out records that cannot be used, up to this share of all; OUT.bad.jsonl lists them",
    )
    make.add_argument("--samples-per-shard", type=int, default=1000)
    make.add_argument(
        "--part", type=_part, metavar="K/N", help="the K-th of N parts, from 0, into OUT/part-000K; the last joins them"
    )
    make.add_argument("--whole", action="store_true", help="with --part: the records given are this part, uncut")
    join = commands.add_parser("join", help="one set of the parts that `make --part` made")
    join.add_argument("folder", type=Path, help="the directory that holds the parts")
    join.add_argument("--parts", type=int, required=True, metavar="N", help="how many there are")
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
    _add_show_arguments(show)
    for command in (index, check, show):
        command.add_argument("folder", type=Path, help="a directory of tars")
    for command in (fetch, make, index, check):
        command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return top


def _add_show_arguments(show: argparse.ArgumentParser) -> None:
    """What a page of samples shows, and where it is written."""
    show.add_argument("--tokenizer", help="a directory or a hub name: show tokens and the mask, not just the text")
    show.add_argument(
        "--template",
        choices=["plain", "vicuna_v1", "chatml", "llama3", "tokenizer"],
        help="the chat template that the tokens are made by (default chatml)",
    )
    show.add_argument("--fit", default="crop", choices=["crop", "pad", "anyres"], help="how an image becomes squares")
    show.add_argument("--size", type=int, default=336, help="side of the square in pixels")
    show.add_argument("--patch", type=int, default=14, help="side of a patch in pixels")
    show.add_argument("--count", type=int, default=20, help="samples, spread evenly over the set")
    show.add_argument("--out", type=Path, help="the HTML file to write; default: FOLDER.html, beside the set")


def _part(text: str) -> tuple[int, int]:
    """(0, 8) from `0/8`."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is no part: 0/8 to 7/8 are the parts of eight")
    return int(number), int(count)


def _percent(text: str) -> float:
    """A share from `5` or `5%`."""
    share = float(text.removesuffix("%")) / 100
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 100 %")
    return share


def main(argv: list[str]) -> int:
    """Run one command; returns 0 on success, 1 if `check` found broken samples."""
    arguments = parser().parse_args(argv)
    if arguments.command not in ("show", "join") and arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: at least 1")
    return _COMMANDS[arguments.command](arguments)


def _fetch(arguments: argparse.Namespace) -> int:
    from tools.shards.fetch import fetch_source, source_named
    from tools.shards.images import fetch_images

    source, out = source_named(arguments.name), arguments.out
    table = out / source.image_table if source.image_table is not None else None
    if table is None or not table.is_file():
        fetch_source(arguments.name, out, base_url=arguments.base_url, progress=not arguments.quiet)
    if table is not None:
        fetch_images(table, arguments.jobs, arguments.img2dataset_env)
    print(f"{out}: {source.title}; now: python -m tools.shards {source.then.replace('OUT', str(out))}")
    return 0


def _make(arguments: argparse.Namespace) -> int:
    if arguments.part is None:
        return _make_set(arguments, (0, 1))
    from data_pipeline.index_meta import META_FILE
    from tools.shards.join import join_parts, part_name

    out, (number, num_parts) = arguments.out, arguments.part
    if not (out / META_FILE).is_file() and not (out / part_name(number)).is_dir():
        out.mkdir(parents=True, exist_ok=True)
        arguments.out = out / part_name(number)
        _make_set(arguments, (0, 1) if arguments.whole else arguments.part)
    if join_parts(out, num_parts):
        print(f"{out}: one set of {num_parts} parts")
    return 0


def _join(arguments: argparse.Namespace) -> int:
    from tools.shards.join import join_parts

    if not join_parts(arguments.folder, arguments.parts):
        raise InputError(f"{arguments.folder}: some of the {arguments.parts} parts are not there yet")
    print(f"{arguments.folder}: one set of {arguments.parts} parts")
    return 0


def _make_set(arguments: argparse.Namespace, part: tuple[int, int]) -> int:
    from tools.shards.examine import usable_samples
    from tools.shards.write import write_set

    if arguments.out.exists():
        raise InputError(f"{arguments.out} exists already: choose another directory, or remove it first")
    found, (number, num_parts) = _samples(arguments), part
    found = found[number * len(found) // num_parts : (number + 1) * len(found) // num_parts]
    if arguments.images is not None and not arguments.outside:
        _refuse_outside(found, arguments.images)
    samples = usable_samples(found, arguments.out, skip_bad=arguments.skip_bad, jobs=arguments.jobs)
    num_shards = write_set(
        arguments.out,
        samples,
        arguments.samples_per_shard,
        resize=arguments.resize,
        jobs=arguments.jobs,
        progress=not arguments.quiet,
    )
    print(f"{arguments.out}: {len(samples)} samples in {num_shards} shards")
    if num_bad := len(found) - len(samples):
        print(f"WARNING: {num_bad} records left out: {arguments.out}.bad.jsonl lists them", file=sys.stderr)
    return 0


def _refuse_outside(samples: Sequence[RawSample], images: Path) -> None:
    """Tables come from others: `../../` in one would pack any file of this machine into a data set to be shared."""
    from models.common.files import is_inside

    for sample in samples:
        for image in (image for image in sample.images if isinstance(image, Path)):
            name = os.path.relpath(os.path.normpath(image), os.path.normpath(images))  # links are their owner's
            if not is_inside(name):
                raise InputError(f"{image} is outside of --images {images}: --outside allows it, if you trust the file")


def _samples(arguments: argparse.Namespace) -> list[RawSample]:
    from tools.shards.annotations import read_coco, read_vqa
    from tools.shards.raw import read_captions, read_folder, read_llava

    images, prompt = arguments.images, arguments.prompt
    if arguments.folder is not None:
        return read_folder(arguments.folder, prompt)
    if arguments.llava is not None:
        return read_llava(arguments.llava, images)
    if arguments.captions is not None:
        return read_captions(arguments.captions, images, prompt)
    if images is None:
        raise InputError("--images DIR is missing: the directory in which the file names begin")
    if arguments.coco is not None:
        return read_coco(arguments.coco, images, prompt)
    if arguments.vqa is not None:
        if len(arguments.vqa) > 2:
            raise InputError("--vqa takes VQA's two files, questions and annotations, or the one of TextVQA or VizWiz")
        return read_vqa(arguments.vqa, images, prompt)
    raise AssertionError("argparse asks for one source")


def _index(arguments: argparse.Namespace) -> int:
    from data_pipeline.index import QUARANTINE_FILE, ShardIndex
    from data_pipeline.index_build import build_index

    limit = arguments.bad_share_limit
    build_index(arguments.folder, jobs=arguments.jobs, progress=not arguments.quiet, bad_share_limit=limit)
    index = ShardIndex.open(arguments.folder)
    print(f"{arguments.folder}: {len(index)} samples in {len(index.shard_names)} shards, {index.fingerprint}")
    if left_out := index.left_out():
        print(
            f"WARNING: {len(left_out)} samples or ends of tars, in {len({line['shard'] for line in left_out})} tars,"
            f" cannot be used and are left out: {arguments.folder / QUARANTINE_FILE} names them",
            file=sys.stderr,
        )
    _remark(index)
    return 0


def _remark(index: ShardIndex) -> None:
    from data_pipeline.unused import remarks

    for remark in remarks(index):
        print(f"WARNING: {remark}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> int:
    from data_pipeline.index import ShardIndex
    from tools.shards.check import broken_samples

    index = ShardIndex.open(arguments.folder)
    num_broken, left_out = 0, index.left_out()
    _remark(index)
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
    from tools.shards.show import image_spec, load_encoder, render_text, render_tokens, write_page

    folder: Path = arguments.folder
    if arguments.template is not None and arguments.tokenizer is None:
        raise InputError(f"--template {arguments.template} needs --tokenizer DIR: without one the text itself is shown")
    index = ShardIndex.open(folder)
    image = image_spec(arguments.fit, arguments.size, arguments.patch)
    render = render_text(image)
    if arguments.tokenizer is not None:
        template = arguments.template or "chatml"
        render = render_tokens(*load_encoder(index, tokenizer=arguments.tokenizer, template=template, image=image))
    out: Path = arguments.out or folder.resolve().with_name(f"{folder.resolve().name}.html")
    num_shown = write_page(index, render, arguments.count, out)
    print(f"{out}: {num_shown} of {len(index)} samples")
    return 0


_COMMANDS = {"fetch": _fetch, "make": _make, "join": _join, "index": _index, "check": _check, "show": _show}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

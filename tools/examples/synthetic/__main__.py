"""`python -m tools.toy VERB ...`: draw the synthetic world, pretrain its backbones, or import a llama2.c file."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from models.common.errors import InputError, run_cli


def main(argv: list[str]) -> int:
    """Parse the command line and run its verb."""
    arguments = _parser().parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.toy", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_world(verbs.add_parser("world", help="draw scenes; write images, conversations and an exam"))
    _add_clip(verbs.add_parser("clip", help="pretrain a tiny CLIP on a world, or on photos with captions"))
    _add_language(verbs.add_parser("language", help="pretrain a tiny language model on a world's text"))
    _add_vit(verbs.add_parser("vit", help="pretrain a tiny ViT on what a world's images show"))
    _add_text_encoder(verbs.add_parser("text-encoder", help="write a fresh tiny DistilBERT with a world's vocabulary"))
    _add_native(verbs.add_parser("qwen3-vl", help="pretrain a tower on worlds of several sizes; join it with a Qwen3"))
    _add_open_clip(verbs.add_parser("open-clip", help="write a tiny CLIP as open_clip saves one"))
    _add_llama2c(verbs.add_parser("import-llama2c", help="turn a llama2.c model into a Hugging Face directory"))
    return parser


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--scenes", type=int, default=9000, help="training scenes (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=500, help="scenes of the exam (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn (default %(default)s)")
    parser.add_argument("--scale", type=int, choices=(1, 2, 4), default=1, help="48 pixels times this wide and high")
    parser.set_defaults(run=_world)


def _add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", type=Path, nargs="?", help="a folder that `world` made; none with --captions")
    _add_pretraining(parser, steps=400, batch_size=128)
    photos = parser.add_argument_group("photos in place of a world")
    photos.add_argument("--captions", type=Path, metavar="FILE.json", help="a list of {file_name, caption}")
    photos.add_argument("--images", type=Path, metavar="DIR", help="where the photos lie")
    photos.add_argument("--size", type=int, default=96, help="side they are cut to, in pixels (default %(default)s)")
    photos.add_argument("--patch", type=int, default=16, help="side of a patch, in pixels (default %(default)s)")
    parser.set_defaults(run=_clip)


def _add_language(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", type=Path, help="a folder that `world` made")
    _add_pretraining(parser, steps=150, batch_size=64)
    parser.add_argument("--kind", choices=("llama", "qwen3"), default="llama", help="(default %(default)s)")
    parser.set_defaults(run=_language)


def _add_native(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("language", type=Path, help="a folder that `language --kind qwen3` made")
    _add_pretraining(parser, steps=300, batch_size=64)
    parser.add_argument("--worlds", type=Path, nargs="+", required=True, help="folders that `world` made")
    parser.set_defaults(run=_native)


def _native(arguments: argparse.Namespace) -> int:
    import torch

    from tools.examples.synthetic.native import make_native

    torch.set_num_threads(arguments.threads)
    trained = (arguments.steps, arguments.batch_size, arguments.seed)
    reached = make_native(arguments.worlds, arguments.out, *trained, language=arguments.language)
    print(f"wrote {arguments.out}: {_figures(reached)}")
    return 0


def _add_open_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clip", type=Path, help="a folder that `clip` made")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.set_defaults(run=_open_clip)


def _open_clip(arguments: argparse.Namespace) -> int:
    from tools.examples.synthetic.open_clip import write_open_clip

    write_open_clip(arguments.clip, arguments.out)
    print(f"wrote {arguments.out}: architecture.json and open_clip_model.safetensors")
    return 0


def _add_vit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", type=Path, help="a folder that `world` made")
    _add_pretraining(parser, steps=300, batch_size=128)
    parser.set_defaults(run=_vit)


def _add_text_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", type=Path, help="a folder that `world` made")
    parser.add_argument("out", type=Path, help="the folder to make, in Hugging Face format")
    parser.add_argument("--seed", type=int, default=0, help="first weights (default %(default)s)")
    parser.set_defaults(run=_text_encoder)


def _vit(arguments: argparse.Namespace) -> int:
    import torch

    from tools.examples.synthetic.encoders import pretrain_vit

    torch.set_num_threads(arguments.threads)
    reached = pretrain_vit(arguments.world, arguments.out, arguments.steps, arguments.batch_size, arguments.seed)
    print(f"wrote {arguments.out}: {_figures(reached)}")
    return 0


def _text_encoder(arguments: argparse.Namespace) -> int:
    from tools.examples.synthetic.encoders import make_text_encoder

    make_text_encoder(arguments.world, arguments.out, arguments.seed)
    print(f"wrote {arguments.out}")
    return 0


def _add_pretraining(parser: argparse.ArgumentParser, steps: int, batch_size: int) -> None:
    parser.add_argument("out", type=Path, help="the folder to make, in Hugging Face format")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="rows a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first weights and order (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="more are not reproducible (default %(default)s)")


def _clip(arguments: argparse.Namespace) -> int:
    import torch

    from tools.examples.synthetic.clip import pretrain_clip, read_world
    from tools.examples.synthetic.photos import photo_size, read_photos

    world, captions, images = arguments.world, arguments.captions, arguments.images
    if (world is None) == (captions is None) or (captions is None) != (images is None):
        raise InputError("clip: give either a world, or photos with both --captions FILE.json and --images DIR")
    read = partial(read_world, world)
    if captions is not None:
        read = partial(read_photos, captions, images, photo_size(arguments.size, arguments.patch))
    torch.set_num_threads(arguments.threads)
    reached = pretrain_clip(read, arguments.out, arguments.steps, arguments.batch_size, arguments.seed)
    print(f"wrote {arguments.out}: {_figures(reached)}")
    return 0


def _language(arguments: argparse.Namespace) -> int:
    import torch

    from tools.examples.synthetic.language import pretrain_language

    torch.set_num_threads(arguments.threads)
    trained = (arguments.steps, arguments.batch_size, arguments.seed)
    reached = pretrain_language(arguments.world, arguments.out, *trained, kind=arguments.kind)
    print(f"wrote {arguments.out}: {_figures(reached)}")
    return 0


def _add_llama2c(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="llama2.c's .bin of weights (version 0)")
    parser.add_argument("tokenizer", type=Path, help="llama2.c's tokenizer.bin, made for this model")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.set_defaults(run=_llama2c)


def _llama2c(arguments: argparse.Namespace) -> int:
    from tools.examples.synthetic.llama2c import import_llama2c

    header = import_llama2c(arguments.model, arguments.tokenizer, arguments.out)
    print(f"wrote {arguments.out}: {header.num_layers} layers of width {header.width}, {header.vocab_size} pieces")
    return 0


def _figures(reached: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in reached.items())


def _world(arguments: argparse.Namespace) -> int:
    from tools.examples.synthetic.write import write_world

    write_world(arguments.out, arguments.scenes, arguments.held_out, arguments.seed, arguments.scale)
    print(f"wrote {arguments.scenes} scenes and {arguments.held_out} held-out ones to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

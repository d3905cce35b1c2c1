"""Open a page to talk to a bundle: `python -m tools.demo BUNDLE`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from models.bundle import verify
from models.errors import InputError, run_cli


def main(argv: list[str]) -> int:
    """Serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a folder that tools.merge or tools.quantize made")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="a folder of pictures to offer on the page")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also open a public address through gradio.live")
    arguments = parser.parse_args(argv)
    _check(arguments)
    verify(arguments.bundle)
    print(f"opening {arguments.bundle} …", file=sys.stderr, flush=True)

    from eval.predictor import Predictor

    predictor = Predictor.open(arguments.bundle, device=arguments.device, verify=False)

    from tools.demo.page import Page
    from tools.demo.pictures import find_examples

    examples = find_examples(arguments.examples) if arguments.examples else []
    with tempfile.TemporaryDirectory(prefix="sightline-demo-") as folder:
        # gradio's own place is one for all of a machine's pages, which clear it of each other's pictures.
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = Page(predictor, Path(folder), examples)
        try:
            url = page.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                share=arguments.share,
                prevent_thread_lock=True,
                allowed_paths=[str(path) for path in examples],
            )
        except OSError as error:
            raise InputError(f"--port {arguments.port} is taken on {arguments.host}: give another") from error
        print(f"the page is at {url}", flush=True)
        page.blocks.block_thread()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Find what is wrong before anything heavy is loaded."""
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise InputError(f"--port {arguments.port} is no port: take one from 1 to 65535")
    if arguments.examples is not None and not arguments.examples.is_dir():
        raise InputError(f"there is no folder {arguments.examples}: --examples takes a folder of pictures")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

"""A demo page that runs inside the test's own process, over a tiny random bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from tests.support.bundles import make_bundle, picture


@contextmanager
def running_page(folder: Path, *, with_examples: bool = False) -> Iterator[str]:
    """Serve a page from `folder` and give its address; it is closed afterwards."""
    from eval.predictor import Predictor
    from tools.demo.page import Page

    predictor = Predictor.open(make_bundle(folder / "bundle"), device="cpu")
    examples = []
    for kind in ("circle", "square") if with_examples else ():
        examples.append(folder / f"{kind}.png")
        picture(kind).save(examples[-1])
    (folder / "kept").mkdir()
    with patch.dict(os.environ, GRADIO_TEMP_DIR=str(folder / "kept")):
        page = Page(predictor, folder / "kept", examples)
        try:
            yield page.launch(
                server_name="127.0.0.1", prevent_thread_lock=True, allowed_paths=[str(path) for path in examples]
            )
        finally:
            page.blocks.close(verbose=False)

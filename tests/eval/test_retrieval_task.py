"""Retrieval as a task: a dual encoder on disk, by the command, and what other models are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval.dual_encoder import DualEncoder, is_dual_encoder
from eval.recall import recalls
from eval.run import main
from eval.tasks import make_task
from eval.tasks.config import RetrievalConfig
from models.common.errors import InputError
from tests.support.benchmarks import Seer, TinyBenchmark
from tools.examples.synthetic.clip import ClipSize, build_clip, image_processor, train_tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the synthetic world's shape."""
    folder, size = tmp_path_factory.mktemp("clip"), ClipSize()
    tokenizer = train_tokenizer(["A red square.", "all is blue", "A lime square."] * 20, size)
    torch.manual_seed(0)
    build_clip(size, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(size).save_pretrained(folder)
    return folder


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(clip: Path, tiny: TinyBenchmark) -> None:
    assert is_dual_encoder(clip)
    assert not is_dual_encoder(tiny.folder)
    encoder = DualEncoder.open(clip, "cpu")
    images, texts = sorted(tiny.images.iterdir()), ["A red square.", "all is blue", "A lime square. " * 40]
    together, alone = encoder.texts(texts), torch.cat([encoder.texts([text]) for text in texts])
    assert together.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    # Matrix products of other shapes add in another order: a few of fp32's last bits.
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        encoder.images(images), torch.cat([encoder.images([image]) for image in images]), atol=1e-6, rtol=0
    )


def test_the_command_measures_all_captions_of_every_image(clip: Path, tiny: TinyBenchmark) -> None:
    out = tiny.folder / "out.json"
    words = ["--task", "retrieval", "--captions", str(tiny.captions), "--images", str(tiny.images)]
    assert main([str(clip), *words, "--device", "cpu", "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert (result["num_images"], result["num_captions"], result["num_samples"]) == (3, 6, 9)
    encoder = DualEncoder.open(clip, "cpu")
    images = encoder.images(sorted(tiny.images.iterdir()))
    texts = [text for colour in ("red", "lime", "blue") for text in (f"A {colour} square.", f"all is {colour}")]
    is_pair = torch.eye(3, dtype=torch.bool).repeat_interleave(2, dim=1)
    assert result["metrics"] == pytest.approx(recalls(images @ encoder.texts(texts).T, is_pair))
    assert result["metrics"]["text_to_image/recall_at_5"] == 1.0
    assert set(result["ties"]) == {"for", "topk"}


def test_a_model_that_answers_is_told_what_retrieval_needs(tiny: TinyBenchmark) -> None:
    Image.new("RGB", (8, 8)).save(tiny.images / "other.png")
    task = make_task(RetrievalConfig(captions=tiny.captions, images=tiny.images))
    with pytest.raises(InputError, match="give a dual encoder"):
        task.ask(Seer(), 4, range(9))

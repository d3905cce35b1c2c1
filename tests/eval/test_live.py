"""A VLM in training answers as the bundle with the same weights does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.live import LiveModel
from eval.predictor import Decoding, Predictor, Query, Turn
from models.build import build_vlm, read_metadata
from models.spec import CropImage, ImageSpec, TextSpec
from models.vision import VisionEncoder
from models.vlm import VLM
from tests.support.bundles import IMAGE_SIZE, PATCH_SIZE, image, make_bundle
from tests.support.published import make_published, published


def vlm_of(predictor: Predictor) -> VLM:
    from transformers import LlamaForCausalLM

    llava, processor = predictor.model, predictor.processor
    language = LlamaForCausalLM(llava.config.text_config).eval()
    language.model, language.lm_head = llava.model.language_model, llava.lm_head
    image = ImageSpec(
        size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        fit=CropImage(),
        mean=tuple(processor.image_processor.image_mean),
        std=tuple(processor.image_processor.image_std),
    )
    text = TextSpec(
        max_length=512,
        image_token_id=llava.config.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        vocab_size=llava.config.text_config.vocab_size,
    )
    tower = VisionEncoder(llava.model.vision_tower, feature_layer=-2, num_skipped_tokens=1)
    return VLM(tower, llava.model.multi_modal_projector, language, image=image, text=text)


@pytest.mark.parametrize(
    "decoding", [Decoding(max_new_tokens=12), Decoding(max_new_tokens=8, num_beams=2)], ids=["greedy", "beams"]
)
def test_live_answers_and_losses_are_the_bundles(tmp_path: Path, decoding: Decoding) -> None:
    bundle = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    live = Predictor(LiveModel(vlm_of(bundle)), bundle.processor, device="cpu")
    queries = [
        Query((image("circle"),), (Turn("user", "What?"),)),
        Query((), (Turn("user", "no image at all"),)),
        Query((image("circle"), image("square")), (Turn("user", "two"),)),
    ]
    assert live.answer(queries, decoding) == bundle.answer(queries, decoding)
    answers = ["A red circle", "no", "yes"]
    assert live.loss(queries, answers) == bundle.loss(queries, answers)


def test_several_images_are_read_as_llava_onevision_reads_them(tmp_path: Path) -> None:
    """Each as one square alone, beside a prompt whose only image is cut into tiles."""
    folder = make_published(tmp_path / "published", "llava_onevision")
    source = published(folder)
    vlm = build_vlm(source, read_metadata(source, 512), frozen_dtype=torch.float32, seed=0).eval()
    stock = Predictor.open(folder, device="cpu")
    live = Predictor(LiveModel(vlm), stock.processor, device="cpu")
    queries = [
        Query((image("circle", (61, 40)), image("square", (30, 90))), (Turn("user", "two"),)),
        Query((image("circle", (90, 30)),), (Turn("user", "What?"),)),
    ]
    answers = ["A red circle", "no"]
    assert live.answer(queries, Decoding(max_new_tokens=12)) == stock.answer(queries, Decoding(max_new_tokens=12))
    losses = [loss for loss, _ in stock.loss(queries, answers)]
    assert [loss for loss, _ in live.loss(queries, answers)] == pytest.approx(losses, abs=1e-5)

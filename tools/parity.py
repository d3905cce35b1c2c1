"""Is a bundle what was trained? The same prompts and pictures through both, and the differences against bounds.

trained model: our template, our pixels, our forward      bundle: stock processor, stock transformers
quantized:     the bundle it was made from                 the quantized one, both stock
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data_pipeline.encode import expand_images
from data_pipeline.images import fit
from data_pipeline.record import Turn
from data_pipeline.tokens import Tokens
from models.build import Facts
from models.bundle import Check, Parity, Precision
from models.spec import IMAGE_TOKEN, num_image_tokens
from models.vlm import VLM

LOGIT_BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2, "int8": 0.25, "nf4": 0.6}
"""Largest logit difference allowed, as a share of the reference's largest logit difference from its mean."""

GREEDY_BOUNDS: dict[Precision, float] = {"fp32": 1.0, "bf16": 0.9, "int8": 0.8, "nf4": 0.6}
"""Least share of positions at which both would choose the same token."""

PROMPTS = (
    "What is in the picture?",
    "How many are there?",
    "Describe the picture.",
    "What colour is it?",
)


@dataclass(frozen=True)
class Probe:
    """One prompt with its picture."""

    picture: Image.Image
    question: str


def probes(num: int = 8) -> list[Probe]:
    """Drawn pictures of several shapes and aspect ratios, each with a question; the same at every call."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(num):
        width, height = (int(side) for side in generator.integers(40, 400, 2))
        picture = Image.new("RGB", (width, height), tuple(int(level) for level in generator.integers(0, 256, 3)))
        draw = ImageDraw.Draw(picture)
        for _ in range(4):
            left, top = int(generator.integers(0, width)), int(generator.integers(0, height))
            box = (left, top, left + int(generator.integers(8, 200)), top + int(generator.integers(8, 200)))
            colour = tuple(int(level) for level in generator.integers(0, 256, 3))
            (draw.ellipse if generator.random() < 0.5 else draw.rectangle)(box, fill=colour)
        found.append(Probe(picture, PROMPTS[number % len(PROMPTS)]))
    return found


def open_bundle(directory: Path) -> tuple[Any, Any]:
    """A bundle's model and processor, by stock transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", device_map="cpu")
    return model.eval(), AutoProcessor.from_pretrained(directory)


def compare_with_trained(vlm: VLM, facts: Facts, template: Any, directory: Path, precision: Precision) -> Parity:
    """The parity report of a merged bundle against the model in training, adapters apart."""
    model, processor = open_bundle(directory)
    same_ids, largest_pixel, gaps, agreements = True, 0.0, [], []
    for probe in probes():
        ours = _our_prompt(probe, facts, template)
        inputs = stock_inputs(processor, probe)
        same_ids &= ours.tolist() == inputs["input_ids"][0].tolist()
        tiles = torch.tensor(fit(probe.picture, facts.image)).unsqueeze(0)
        pixels = vlm.normalise(tiles)
        largest_pixel = max(largest_pixel, float((pixels - inputs["pixel_values"]).abs().max()))
        if not same_ids:
            break
        with torch.no_grad():
            positions = torch.arange(len(ours)).unsqueeze(0)
            reference = vlm.head(vlm(ours.unsqueeze(0), positions, tiles)).float()
            found = model(**inputs).logits.float()
        gap, agreement = _difference(reference, found)
        gaps.append(gap)
        agreements.append(agreement)
    checks = (
        Check(name="prompt ids differ", value=float(not same_ids), bound=0.0, passed=same_ids),
        Check(name="largest pixel difference", value=largest_pixel, bound=1e-5, passed=largest_pixel <= 1e-5),
        *_logit_checks(gaps, agreements, precision),
    )
    return Parity(reference="the trained model", num_prompts=len(probes()), checks=checks)


def compare_bundles(reference: Path, directory: Path, precision: Precision) -> Parity:
    """The parity report of a quantized bundle against the one it was made from."""
    reference_model, reference_processor = open_bundle(reference)
    model, processor = open_bundle(directory)
    gaps, agreements, same = [], [], True
    for probe in probes():
        expected, found = stock_inputs(reference_processor, probe), stock_inputs(processor, probe)
        same &= all(torch.equal(expected[name], found[name]) for name in expected)
        with torch.no_grad():
            gap, agreement = _difference(reference_model(**expected).logits.float(), model(**found).logits.float())
        gaps.append(gap)
        agreements.append(agreement)
    checks = (
        Check(name="prompts or pixels differ", value=float(not same), bound=0.0, passed=same),
        *_logit_checks(gaps, agreements, precision),
    )
    return Parity(reference=str(reference), num_prompts=len(gaps), checks=checks)


def _our_prompt(probe: Probe, facts: Facts, template: Any) -> Tensor:
    """The prompt's ids [L] as training makes them, up to where the answer begins."""
    turns = (Turn("user", f"{IMAGE_TOKEN}\n{probe.question}"), Turn("assistant", "x"))
    prompt = list(takewhile(lambda segment: not segment.is_target, template.segments(turns)))
    ids, labels = Tokens.of(facts.tokenizer).encode_segments(prompt)
    cost = num_image_tokens(facts.image, probe.picture.width, probe.picture.height)
    expanded, _ = expand_images(ids, labels, facts.text.image_token_id, [cost])
    return torch.from_numpy(expanded).long()


def stock_inputs(processor: Any, probe: Probe) -> dict[str, Tensor]:
    """What stock transformers makes of a probe: input ids, mask and pixels.

    Rendered and tokenized in one call: in two, a tokenizer that puts a token before every text puts a second one
    before the template's own.
    """
    content = [{"type": "image", "image": probe.picture}, {"type": "text", "text": probe.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def _difference(reference: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest logit difference relative to the reference's spread, and the share of positions with the same choice.

    The bundle may have more vocabulary rows (the image token's); the trained model never had those.
    """
    shared = min(reference.shape[-1], found.shape[-1])
    reference, found = reference[..., :shared], found[..., :shared]
    spread = (reference - reference.mean(dim=-1, keepdim=True)).abs().max()
    gap = (reference - found).abs().max() / spread
    return float(gap), float((reference.argmax(-1) == found.argmax(-1)).float().mean())


def _logit_checks(gaps: list[float], agreements: list[float], precision: Precision) -> tuple[Check, Check]:
    gap = max(gaps, default=float("inf"))
    agreement = sum(agreements) / len(agreements) if agreements else 0.0
    logit_bound, greedy_bound = LOGIT_BOUNDS[precision], GREEDY_BOUNDS[precision]
    return (
        Check(name="largest relative logit difference", value=gap, bound=logit_bound, passed=gap <= logit_bound),
        Check(name="share of same choices", value=agreement, bound=greedy_bound, passed=agreement >= greedy_bound),
    )

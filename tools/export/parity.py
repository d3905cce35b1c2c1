"""Compares a bundle with the trained model: the same prompts and images through both, differences against bounds.

trained model: our template, our pixels, our forward      bundle: stock processor, stock transformers
quantized:     the bundle it was made from                the quantized one, both stock

Every model runs with one layer in memory at a time and computes in fp32. Logits are compared at all text positions: the
prompts' and the golden answers'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.encode import expand_images
from data_pipeline.record import Turn
from data_pipeline.tiles import fit_image
from data_pipeline.tokens import Tokens
from eval.pixels import stack_pixels
from models.bundle import Check, Parity, Precision
from models.opening import open_processor
from models.spec import IMAGE_TOKEN, num_image_tokens
from tools.export.golden import Probe
from tools.export.stock import open_streamed

if TYPE_CHECKING:
    from tools.export.reference import Trained


def _quantized(with_8_bits: float, with_4_bits: float) -> dict[Precision, float]:
    """The bounds of a quantity for weights in 8 and in 4 bits, whichever library holds them."""
    return {"int8": with_8_bits, "w8a16": with_8_bits, "nf4": with_4_bits, "w4a16": with_4_bits}


LOGIT_BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2, **_quantized(0.25, 0.6)}
"""Largest logit difference allowed, as a share of the reference's largest logit difference from its mean."""

GREEDY_BOUNDS: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.9, "bf16": 0.9, **_quantized(0.8, 0.6)}
"""Smallest allowed share of positions at which both choose the same token."""

SCORE_BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2, **_quantized(5e-2, 0.25)}
"""Largest change of the golden answers' loss, in nats a token, or a share of the reference's where that is above 1."""

PIXEL_BOUND = 1e-5
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Reading:
    """A model's outputs for the probes. `pixels` are each image's tiles.

    `logits` [N, V] are those at the N text positions of all probes, one after another; the K of them that predict a
    token of a golden answer are `answer_K`, the tokens `targets_K`.
    """

    prompts: list[list[int]]
    pixels: tuple[Tensor, ...]
    logits: Tensor
    answer_K: Tensor
    targets_K: Tensor

    def loss(self, vocab_size: int) -> float:
        """The golden answers' mean negative log-likelihood over the first `vocab_size` tokens, in nats a token."""
        logits_KV = self.logits[self.answer_K, :vocab_size]
        return F.cross_entropy(logits_KV, self.targets_K).item()


def device_of_this_machine() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def read_trained(trained: Trained, template: Any, probes: list[Probe], language: Any = None) -> Reading:
    """Run the probes through the trained model, in training's own classes.

    Args:
        language: a causal language model that stands for the trained one behind the embedding.
    """
    device, facts = device_of_this_machine(), trained.facts
    vlm = trained.open_streamed(device)
    decoder = vlm.language.get_decoder() if language is None else language.get_decoder()
    head = vlm.head if language is None else language.get_output_embeddings()
    prompts = [our_prompt(probe, facts, template) for probe in probes]
    fitted = [fit_image(probe.image, facts.image) for probe in probes]
    pixels = [vlm.normalise(torch.tensor(each.tiles).to(device)) for each in fitted]
    sizes = [each.size for each in fitted]
    answers = [answer_ids(facts.tokenizer, probe) for probe in probes]

    def hidden(ids_BL: Tensor, rows: slice) -> Tensor:
        inputs = vlm.decoder_inputs(ids_BL, torch.cat(pixels[rows]), sizes[rows])
        return decoder(**inputs, use_cache=False).last_hidden_state

    found = tuple(vlm.vision.processor_pixels(pixels_TCSS).cpu() for pixels_TCSS in pixels)
    return _read(hidden, head, (prompts, answers), found, facts.text.image_token_id)


def read_bundle(directory: Path, probes: list[Probe]) -> Reading:
    """Run the probes through a bundle, with its own processor and stock transformers' classes."""
    device = device_of_this_machine()
    return read_stock(open_streamed(directory, device), open_processor(directory), probes, device)


def read_stock(model: Any, processor: Any, probes: list[Probe], device: torch.device) -> Reading:
    """Run the probes through a stock model on `device`."""
    inputs = [stock_inputs(processor, probe) for probe in probes]
    prompts = [each.pop("input_ids")[0].tolist() for each in inputs]
    answers = [answer_ids(processor.tokenizer, probe) for probe in probes]

    def hidden(ids_BL: Tensor, rows: slice) -> Tensor:
        pixels = stack_pixels(inputs[rows], device)
        output = model.model(input_ids=ids_BL, **token_types(model, ids_BL), **pixels, use_cache=False)
        return output.last_hidden_state

    pixels = tuple(_by_tile(each["pixel_values"]) for each in inputs)
    return _read(hidden, model.lm_head, (prompts, answers), pixels, model.config.image_token_id)


def _by_tile(pixel_values: Tensor) -> Tensor:
    """A processor's pixels, images of several tiles as tiles; at native resolution rows of patches as they are."""
    return pixel_values.flatten(0, -4) if pixel_values.ndim > 2 else pixel_values


@torch.no_grad()
def _read(
    hidden: Callable[[Tensor, slice], Tensor],
    head: Callable[[Tensor], Tensor],
    asked: tuple[list[list[int]], list[list[int]]],
    pixels: tuple[Tensor, ...],
    image_token_id: int,
) -> Reading:
    """A model's reading of (prompts, answers); rows are padded on the right, which does not affect causal attention."""
    device = device_of_this_machine()
    prompts, answers = asked
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    texts: list[Tensor] = []
    places: list[int] = []
    num_texts = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        longest = max(len(row) for row in part)
        ids_BL = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in part], device=device)
        states_BLD = hidden(ids_BL, slice(start, start + len(part)))
        for row, states_LD, answer in zip(part, states_BLD, answers[start:], strict=False):
            is_text_L = torch.tensor(row, device=device) != image_token_id
            texts.append(states_LD[: len(row)][is_text_L])
            num_texts += len(texts[-1])
            places += range(num_texts - len(answer) - 1, num_texts - 1)
    logits_NV = head(torch.cat(texts)).float().cpu()
    targets_K = torch.tensor([token for answer in answers for token in answer])
    return Reading(prompts, pixels, logits_NV, torch.tensor(places), targets_K)


def compare(reference: Reading, found: Reading, precision: Precision, name: str, logits: float | None = None) -> Parity:
    """The parity report of `found` against `reference`; `logits` overrides the bound on the logit difference."""
    same_ids = reference.prompts == found.prompts
    pixels = pixel_difference(reference.pixels, found.pixels)
    gap, agreement, score = float("inf"), 0.0, float("inf")
    if same_ids:
        gap, agreement = difference(reference.logits, found.logits)
        score = _score_difference(reference, found)
    bound = LOGIT_BOUNDS[precision] if logits is None else logits
    greedy, score_bound = GREEDY_BOUNDS[precision], SCORE_BOUNDS[precision]
    checks = (
        Check(name="prompt ids differ", value=float(not same_ids), bound=0.0, passed=same_ids),
        Check(
            name="largest pixel difference",
            value=pixels,
            bound=PIXEL_BOUND,
            passed=pixels <= PIXEL_BOUND,
            note=f"Pillow {version('pillow')}",
        ),
        Check(name="largest relative logit difference", value=gap, bound=bound, passed=gap <= bound),
        Check(name="share of same choices", value=agreement, bound=greedy, passed=agreement >= greedy),
        Check(name="golden answers' loss difference", value=score, bound=score_bound, passed=score <= score_bound),
    )
    return Parity(reference=name, num_prompts=len(found.prompts), checks=checks)


def pixel_difference(reference: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    """The largest over all images; infinite where one has another shape."""
    pairs = list(zip(reference, found, strict=True))
    if any(left.shape != right.shape for left, right in pairs):
        return float("inf")
    return max(float((left - right).abs().max()) for left, right in pairs)


def _score_difference(reference: Reading, found: Reading) -> float:
    vocab_size = min(reference.logits.shape[-1], found.logits.shape[-1])
    before, after = reference.loss(vocab_size), found.loss(vocab_size)
    return abs(after - before) / max(1.0, before)


def difference(reference_NV: Tensor, found_NV: Tensor) -> tuple[float, float]:
    """Largest logit difference relative to the reference's spread, and the share of positions with the same choice.

    The bundle may have one more row of the vocabulary (the image token's); the trained model never had it.
    """
    shared = min(reference_NV.shape[-1], found_NV.shape[-1])
    reference, found = reference_NV[..., :shared], found_NV[..., :shared]
    spread = (reference - reference.mean(dim=-1, keepdim=True)).abs().max()
    gap = (reference - found).abs().max() / spread
    return float(gap), float((reference.argmax(-1) == found.argmax(-1)).float().mean())


def failed_checks(parity: Parity) -> str:
    """The failed checks, as text for an error message."""
    return "; ".join(
        f"{check.name}: no, {check.note}"
        if check.note and not check.value  # of yes and no
        else f"{check.name} is {check.value:.3g}, bound {check.bound:.3g}"
        for check in parity.checks
        if not check.passed and check.bound is not None
    )


def our_prompt(probe: Probe, facts: Any, template: Any) -> list[int]:
    """The prompt's ids as training makes them, up to where the answer begins."""
    turns = (Turn("user", f"{IMAGE_TOKEN}\n{probe.question}"), Turn("assistant", "x"))
    prompt = list(takewhile(lambda segment: not segment.is_target, template.segments(turns)))
    ids, labels = Tokens.of(facts.tokenizer, facts.text.image_token).encode_segments(prompt)
    cost = num_image_tokens(facts.image, probe.image.width, probe.image.height)
    expanded, _ = expand_images(ids, labels, facts.text.image_token_id, [cost])
    return [int(token) for token in expanded]


def stock_inputs(processor: Any, probe: Probe) -> dict[str, Tensor]:
    """Stock transformers' inputs for a probe: input ids, pixels, and with AnyRes the image's size.

    Rendered and tokenized in one call: in two, a tokenizer that puts a token before every text puts a second one
    before the template's own.
    """
    content = [{"type": "image", "image": probe.image}, {"type": "text", "text": probe.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return {name: value for name, value in inputs.items() if name not in ("attention_mask", "mm_token_type_ids")}


def token_types(model: Any, ids_BL: Tensor) -> dict[str, Tensor]:
    """Which tokens are an image's, for a model that wants to be told (M-RoPE); a processor knows no golden answers."""
    is_asked = "mm_token_type_ids" in inspect.signature(model.model.forward).parameters
    return {"mm_token_type_ids": (ids_BL == model.config.image_token_id).int()} if is_asked else {}


def answer_ids(tokenizer: Any, probe: Probe) -> list[int]:
    """The tokens of a probe's golden answer."""
    return list(tokenizer(probe.answer, add_special_tokens=False)["input_ids"])

"""Is a bundle what was trained? The same prompts and pictures through both, and the differences against bounds.

trained model: our template, our pixels, our forward      bundle: stock processor, stock transformers
quantized:     the bundle it was made from                the quantized one, both stock

Every model runs with one layer in memory at a time and computes in fp32. Logits are compared wherever text stands: in
the prompts and in the golden answers behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.encode import expand_images
from data_pipeline.record import Turn
from data_pipeline.tiles import fit_tiles
from data_pipeline.tokens import Tokens
from eval.prompts import stack_pixels
from models.bundle import Check, Parity, Precision
from models.spec import IMAGE_TOKEN, num_image_tokens
from tools.bundles.golden import Probe
from tools.bundles.stock import open_streamed

if TYPE_CHECKING:
    from tools.bundles.reference import Trained

LOGIT_BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2, "int8": 0.25, "nf4": 0.6}
"""Largest logit difference allowed, as a share of the reference's largest logit difference from its mean."""

GREEDY_BOUNDS: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.9, "bf16": 0.9, "int8": 0.8, "nf4": 0.6}
"""Least share of positions at which both would choose the same token."""

SCORE_BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2, "int8": 5e-2, "nf4": 0.25}
"""Largest change of the golden answers' loss, in nats a token, or a share of the reference's where that is above 1."""

PIXEL_BOUND = 1e-5
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Reading:
    """What a model makes of the probes. `pixels` are each picture's tiles.

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


def read_trained(trained: Trained, template: Any, probes: list[Probe]) -> Reading:
    """The probes through the model as training has it."""
    device, facts = device_of_this_machine(), trained.facts
    vlm = trained.open_streamed(device)
    decoder = vlm.language.get_decoder()
    prompts = [our_prompt(probe, facts, template) for probe in probes]
    pixels = [vlm.normalise(torch.tensor(fit_tiles(probe.picture, facts.image)).to(device)) for probe in probes]
    sizes = [(probe.picture.height, probe.picture.width) for probe in probes]
    answers = [_answer(facts.tokenizer, probe) for probe in probes]

    def hidden(ids_BL: Tensor, rows: slice) -> Tensor:
        embedded_BLD = vlm.embed(ids_BL, torch.cat(pixels[rows]), sizes[rows])
        return decoder(inputs_embeds=embedded_BLD, use_cache=False).last_hidden_state

    found = tuple(pixels_TCSS.cpu() for pixels_TCSS in pixels)
    return _read(hidden, vlm.head, (prompts, answers), found, facts.text.image_token_id)


def read_bundle(directory: Path, probes: list[Probe]) -> Reading:
    """The probes through a bundle, by its own processor and stock transformers' classes."""
    from transformers import AutoProcessor

    device = device_of_this_machine()
    return read_stock(open_streamed(directory, device), AutoProcessor.from_pretrained(directory), probes, device)


def read_stock(model: Any, processor: Any, probes: list[Probe], device: torch.device) -> Reading:
    """The probes through a stock model that runs on `device`."""
    inputs = [stock_inputs(processor, probe) for probe in probes]
    prompts = [each.pop("input_ids")[0].tolist() for each in inputs]
    answers = [_answer(processor.tokenizer, probe) for probe in probes]

    def hidden(ids_BL: Tensor, rows: slice) -> Tensor:
        output = model.model(input_ids=ids_BL, **stack_pixels(inputs[rows], device), use_cache=False)
        return output.last_hidden_state

    pixels = tuple(each["pixel_values"].flatten(0, -4) for each in inputs)
    return _read(hidden, model.lm_head, (prompts, answers), pixels, model.config.image_token_id)


@torch.no_grad()
def _read(
    hidden: Callable[[Tensor, slice], Tensor],
    head: Callable[[Tensor], Tensor],
    asked: tuple[list[list[int]], list[list[int]]],
    pixels: tuple[Tensor, ...],
    image_token_id: int,
) -> Reading:
    """A model's reading of (prompts, answers); rows are padded on the right, which causal attention does not see."""
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
    """The parity report of `found` against `reference`; `logits` is another bound for the logit difference."""
    same_ids = reference.prompts == found.prompts
    pixels = _pixel_difference(reference.pixels, found.pixels)
    gap, agreement, score = float("inf"), 0.0, float("inf")
    if same_ids:
        gap, agreement = difference(reference.logits, found.logits)
        score = _score_difference(reference, found)
    bound = LOGIT_BOUNDS[precision] if logits is None else logits
    greedy, score_bound = GREEDY_BOUNDS[precision], SCORE_BOUNDS[precision]
    checks = (
        Check(name="prompt ids differ", value=float(not same_ids), bound=0.0, passed=same_ids),
        Check(name="largest pixel difference", value=pixels, bound=PIXEL_BOUND, passed=pixels <= PIXEL_BOUND),
        Check(name="largest relative logit difference", value=gap, bound=bound, passed=gap <= bound),
        Check(name="share of same choices", value=agreement, bound=greedy, passed=agreement >= greedy),
        Check(name="golden answers' loss difference", value=score, bound=score_bound, passed=score <= score_bound),
    )
    return Parity(reference=name, num_prompts=len(found.prompts), checks=checks)


def _pixel_difference(reference: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    """The largest over all pictures; infinite where one has another shape."""
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
    """What failed, in words for an error's line."""
    return "; ".join(
        f"{check.name} is {check.value:.3g}, bound {check.bound:.3g}"
        for check in parity.checks
        if not check.passed and check.bound is not None
    )


def our_prompt(probe: Probe, facts: Any, template: Any) -> list[int]:
    """The prompt's ids as training makes them, up to where the answer begins."""
    turns = (Turn("user", f"{IMAGE_TOKEN}\n{probe.question}"), Turn("assistant", "x"))
    prompt = list(takewhile(lambda segment: not segment.is_target, template.segments(turns)))
    ids, labels = Tokens.of(facts.tokenizer).encode_segments(prompt)
    cost = num_image_tokens(facts.image, probe.picture.width, probe.picture.height)
    expanded, _ = expand_images(ids, labels, facts.text.image_token_id, [cost])
    return [int(token) for token in expanded]


def stock_inputs(processor: Any, probe: Probe) -> dict[str, Tensor]:
    """What stock transformers makes of a probe: input ids, pixels, and with AnyRes the picture's size.

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
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def _answer(tokenizer: Any, probe: Probe) -> list[int]:
    return list(tokenizer(probe.answer, add_special_tokens=False)["input_ids"])

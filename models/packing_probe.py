"""Whether a language model's class computes packed samples as it computes each alone; asked once, when it is loaded.

    two short samples --packed, ours--> logits      compared
                      --apart, the class's own, eager--> logits

A class that leaks would train on numbers that are silently wrong, so it is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from models.attention import Segments
from models.common.errors import InputError
from models.decoder import LAYERS, Packed
from models.own_forward import OwnForward
from models.scaled_head import output_head

PROBE_LENGTHS = (11, 6)
"""Tokens of the samples that are run packed and apart."""

BOUNDS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 5e-2}
"""Largest difference of the logits, as a share of their spread: rounding is far below, another sample far above."""


@torch.no_grad()
def check_packing(language: Any) -> None:
    """Run two short samples packed and apart, ours against the class's own, and compare the logits.

    Raises:
        InputError: they differ, or the class cannot run so; the line has the class, the reason and what works.
    """
    name = type(language).__name__
    try:
        gap, num_calls, num_layers = _gap(language)
    except InputError:
        raise
    except Exception as error:  # of another class's forward
        raise _refusal(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if num_calls != num_layers:
        raise _refusal(name, f"{num_layers - num_calls} of its {num_layers} layers do not attend as the others do")
    bound = BOUNDS.get(next(language.parameters()).dtype, BOUNDS[torch.bfloat16])
    if not gap <= bound:
        raise _refusal(name, f"packed samples see each other (logits differ by {gap:.2g} of their spread)")


def _gap(language: Any) -> tuple[float, int, int]:
    """(the largest difference of logits as a share of their spread, calls of attention, layers)."""
    was_training, before = language.training, language.config._attn_implementation
    language.eval()
    device = next(language.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(language.config.get_text_config().vocab_size)
    samples = [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in PROBE_LENGTHS]
    language.set_attn_implementation("eager")
    apart = torch.cat([language(input_ids=ids[None], use_cache=False).logits[0].float() for ids in samples])
    runner = OwnForward(language)
    ids_N = torch.cat(samples)
    starts = torch.tensor([0, *torch.tensor(PROBE_LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    packed = Packed(
        input_ids_N=ids_N,
        position_ids_N=torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS]),
        image_I=ids_N.new_zeros(0),
        segments=Segments.of(starts, PROBE_LENGTHS),
    )
    hidden_ND = runner(language.get_input_embeddings()(ids_N), packed)
    together = output_head(language)(hidden_ND).float()
    language.set_attn_implementation(before)
    language.train(was_training)
    spread = (apart - apart.mean(dim=-1, keepdim=True)).abs().max().clamp(min=1e-12)
    return float((apart - together).abs().max() / spread), runner.num_calls, runner.num_layers


def _refusal(name: str, reason: str) -> InputError:
    known = ", ".join(sorted(layer.removesuffix("DecoderLayer") for layer in LAYERS))
    return InputError(
        f"model.language: {name} cannot be trained: {reason}; take another language model (sure to work: {known})"
    )

"""Tokens without text: beam search, whose answer comes as one piece, and the bare greedy loop that others compare with.

Does not own the rows of a batch, which all else is answered by (`eval.batch`).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from eval.decoding import Decoding
from eval.kv_cache import DynamicKVCache, KVCache


@torch.no_grad()
def write_greedily(
    model: Any, inputs: dict[str, torch.Tensor], cache: KVCache, max_new_tokens: int
) -> Generator[list[int]]:
    """Yield one id per row and step, `max_new_tokens` times; a row's ids after its end token are undefined."""
    newcomers = DynamicKVCache(model)
    with evaluating(model):
        ids_B = newcomers.read(inputs).argmax(dim=-1)
        cache.join(newcomers, [length + max_new_tokens for length in newcomers.lengths])
        for _ in range(max_new_tokens - 1):
            yield ids_B.tolist()
            ids_B = cache.step(ids_B).argmax(dim=-1)
        yield ids_B.tolist()


@torch.no_grad()
def write_beams(
    model: Any,
    inputs: dict[str, torch.Tensor],
    decoding: Decoding,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    cancel: threading.Event | None = None,
) -> Generator[list[int]]:
    """The best of `num_beams` answers of each row, by transformers' beam search; yielded when all are done.

    `cancel` ends the search after a token, with what it then has.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        repetition_penalty=1.0,
    )
    inputs = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}  # made from the mask
    if "image_grid_thw" in inputs:  # and from the places of images
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    with evaluating(model):
        ids_BL = model.generate(**inputs, generation_config=config, **_until(cancel))
    yield from ids_BL[:, inputs["input_ids"].shape[1] :].T.tolist()


def _until(cancel: threading.Event | None) -> dict[str, Any]:
    """transformers' option that ends generation once `cancel` is set."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    if cancel is None:
        return {}
    is_cancelled = cancel.is_set

    class Cancelled(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), is_cancelled(), dtype=torch.bool, device=input_ids.device)

    return {"stopping_criteria": StoppingCriteriaList([Cancelled()])}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put every module into evaluation mode, and restore each one's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

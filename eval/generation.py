"""The token loop: from a batch of prompts to token ids, one step after another.

    prompts (left padded) --prefill--> cache --choose--> ids_B --step--> cache --choose--> ids_B ...
                               ^                                          |
                               +---- ChatMemory: what a chat's earlier turns left, for the next turn ----+

Owns positions and what chats have been read. Does not own keys and values (eval.readers), which token is chosen
(eval.decoding) nor when an answer ends: the loop goes on until its caller stops asking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F

from eval.decoding import Chooser, Decoding
from eval.prompts import Prompt
from eval.readers import MakeReader, Reader


@dataclass(frozen=True)
class Known:
    """A chat as the model has read it: `reader` has read exactly `ids`, whose pictures are `pixels`."""

    ids: list[int]
    pixels: dict[str, torch.Tensor]
    reader: Reader


class ChatMemory:
    """The caches of the last few chats, so that a further turn reads only what is new: no picture, no earlier turn.

    A reader is handed out to one taker and must be given back. Safe to use from several threads. The weights must not
    change meanwhile, so a model in training has none. `forget` takes the readers of chats that are forgotten.
    """

    def __init__(self, num_chats: int, image_token_id: int, forget: Callable[[Reader], None]) -> None:
        self._num_chats, self._image_token_id, self._forget = num_chats, image_token_id, forget
        self._chats: list[Known] = []
        self._lock = threading.Lock()

    def take(self, prompt: Prompt, num_positions: int) -> Known | None:
        """The longest beginning of `prompt` that is known with the same pictures, all of them in it, or None.

        Only of a reader that has room for `num_positions`.
        """
        with self._lock:
            shared = [
                self._num_shared(prompt, chat) if chat.reader.capacity >= num_positions else 0 for chat in self._chats
            ]
            if not any(shared):
                return None
            best = max(range(len(shared)), key=shared.__getitem__)
            chat, num_shared = self._chats.pop(best), shared[best]
        chat.reader.crop(num_shared)
        return Known(chat.ids[:num_shared], chat.pixels, chat.reader)

    def give(self, chat: Known) -> None:
        """Remember a chat; the one not used for longest is forgotten."""
        if not chat.reader.can_crop:
            return
        with self._lock:
            chats = [*self._chats, chat]
            self._chats = chats[-self._num_chats :]
        for forgotten in chats[: -self._num_chats]:
            self._forget(forgotten.reader)

    def _num_shared(self, prompt: Prompt, chat: Known) -> int:
        """How many first ids may be reused; 0 below half of the chat, which then is another one and stays remembered.

        The prompt's last id is read anew, for its logits.
        """
        if prompt.pixels.keys() != chat.pixels.keys():
            return 0
        if not all(torch.equal(pixels, chat.pixels[name]) for name, pixels in prompt.pixels.items()):
            return 0
        pairs = zip(prompt.ids[:-1], chat.ids, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        is_worth_it = 2 * num_shared >= len(chat.ids) and self._image_token_id not in prompt.ids[num_shared:]
        return num_shared if is_worth_it else 0


@torch.no_grad()
def write_tokens(
    model: Any, inputs: dict[str, torch.Tensor], decoding: Decoding, reader: Reader
) -> Generator[list[int]]:
    """Yield one id a row and step, for ever; a row's ids after its end mean nothing."""
    yield from _loop(model, inputs, decoding, reader)


@torch.no_grad()
def continue_chat(
    model: Any,
    prompt: Prompt,
    inputs: dict[str, torch.Tensor],
    decoding: Decoding,
    *,
    memory: ChatMemory,
    make_reader: MakeReader,
    num_positions: int,
) -> Generator[list[int]]:
    """`write_tokens` for one row: reads only what `memory` does not know, and leaves it what was read and written.

    `num_positions` is how long prompt and answer can become together.
    """
    known = memory.take(prompt, num_positions) or Known([], {}, make_reader(num_positions))
    if known.ids:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        for name in ("input_ids", "position_ids"):
            inputs[name] = inputs[name][:, len(known.ids) :]
    ids = list(prompt.ids)
    try:
        for (token_id,) in _loop(model, inputs, decoding, known.reader):
            ids.append(token_id)
            yield [token_id]
    except GeneratorExit:  # the caller has enough; after an error the reader may be torn, and is dropped
        memory.give(Known(ids[:-1], prompt.pixels, known.reader))
        raise


def _loop(model: Any, inputs: dict[str, torch.Tensor], decoding: Decoding, reader: Reader) -> Generator[list[int]]:
    inputs = dict(inputs)
    mask_BL = inputs.pop("attention_mask")
    choose = Chooser(decoding, len(mask_BL), mask_BL.device)
    with evaluating(model):
        while True:
            ids_B = choose(reader.read(inputs, mask_BL))
            yield ids_B.tolist()
            inputs = {"input_ids": ids_B[:, None], "position_ids": mask_BL.sum(dim=-1, keepdim=True)}
            mask_BL = F.pad(mask_BL, (0, 1), value=1)


@torch.no_grad()
def write_beams(
    model: Any, inputs: dict[str, torch.Tensor], decoding: Decoding, *, end_ids: Sequence[int], pad_id: int
) -> Generator[list[int]]:
    """The best of `num_beams` answers of each row, by transformers' beam search; yielded when all are done."""
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
    with evaluating(model):
        ids_BL = model.generate(**inputs, generation_config=config)
    yield from ids_BL[:, inputs["input_ids"].shape[1] :].T.tolist()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

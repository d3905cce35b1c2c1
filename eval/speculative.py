"""Self-speculative decoding: a model's own heads propose the next tokens, one forward verifies them.

    known ids | last token, draft 1, draft 2, ...  --one forward--> the greedy choice at each of them
    drafts are kept up to the first wrong one, which is replaced by the right token  --heads--> new drafts

So every token is the one that greedy decoding would have chosen, whatever the heads propose (Stern et al. 2018;
Gloeckle et al. 2024, section 3.2). It is used while it is faster, which it is where several positions cost little more
than one; the speculation gate turns it off. Owns the two caches (the model's and the heads') and the statistics. One
row, greedy; does not own when an answer ends. D the model's width, L positions, V the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eval.decoding import Decoding
from eval.generation import evaluating
from models.cache_argument import cache_option

PROBED_STEPS = 8
"""Forwards of one token at the beginning of an answer, with which those of several tokens are compared."""
JUDGED_STEPS = 16
"""Forwards of several tokens before the first comparison, and between two comparisons."""


@dataclass
class Speculation:
    """Statistics over all answers: forwards of the model, the tokens they gave, proposed tokens by head."""

    num_tokens: int = 0
    num_forwards: int = 0
    """Forwards of the model, those over prompts excluded."""
    num_guessed: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    num_switched_off: int = 0
    """Answers in which speculation was turned off."""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward: 1 without speculation, at most the number of heads + 1."""
        return self.num_tokens / self.num_forwards if self.num_forwards else 1.0

    @property
    def acceptance(self) -> list[float]:
        """By head: the share of its proposals that were kept; one after a wrong proposal counts as wrong."""
        return [kept / max(1, made) for kept, made in zip(self.num_accepted, self.num_guessed, strict=True)]

    def count(self, num_guessed: int, num_kept: int) -> None:
        """Count one forward over proposals, of which some were kept."""
        more = [0] * (num_guessed - len(self.num_guessed))
        self.num_guessed, self.num_accepted = self.num_guessed + more, self.num_accepted + more
        for place in range(num_guessed):
            self.num_guessed[place] += 1
            self.num_accepted[place] += place < num_kept
        self.num_forwards += 1
        self.num_tokens += num_kept + 1


class SpeculationGate:
    """Decides whether speculation is faster: seconds per token with it against seconds per token without.

    The first steps of an answer run without it, later ones with it for as long as a token takes less time. `clock`
    None: always on.
    """

    def __init__(self, clock: Callable[[], float] | None = time.perf_counter) -> None:
        self._clock = clock
        self._plain_s: list[float] = []
        self._guessing_s, self._num_tokens, self._num_steps = 0.0, 0, 0
        self.is_over = False

    def should_guess(self) -> bool:
        """Whether the next forward should verify proposals."""
        return self._clock is None or (not self.is_over and len(self._plain_s) >= PROBED_STEPS)

    def now(self) -> float:
        """The clock's reading in seconds, for differences that `told` takes; 0.0 without a clock."""
        return self._clock() if self._clock is not None else 0.0

    def told(self, seconds: float, num_tokens: int, *, with_guesses: bool) -> None:
        """Record a forward's seconds, its heads' included, and the tokens that it gave."""
        if self._clock is None:
            return
        if not with_guesses:
            self._plain_s.append(seconds)
            return
        self._guessing_s, self._num_tokens = self._guessing_s + seconds, self._num_tokens + num_tokens
        self._num_steps += 1
        if self._num_steps == JUDGED_STEPS:
            # The median: the first forwards of an answer may wait for kernels to be compiled or loaded.
            plain_s = sorted(self._plain_s)[len(self._plain_s) // 2]
            self.is_over = self._guessing_s >= plain_s * self._num_tokens
            self._guessing_s, self._num_tokens, self._num_steps = 0.0, 0, 0


def can_speculate(decoding: Decoding, num_rows: int) -> bool:
    """Whether these rows can be decoded speculatively: a single row, greedily."""
    return num_rows == 1 and decoding.temperature == 0 and decoding.num_beams == 1 and decoding.speculate != "never"


@torch.no_grad()
def write_speculatively(
    model: Any, inputs: dict[str, Tensor], counts: Speculation, gate: SpeculationGate | None = None
) -> Generator[list[int]]:
    """`generation.write_tokens` for one row, greedily, by a model with `future` heads: yields [id] without end."""
    from transformers import DynamicCache

    if inputs["input_ids"].shape[0] != 1:
        raise ValueError("one row: rows of a batch would accept different numbers of guesses")
    gate = gate or SpeculationGate()
    inputs = {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}
    cache = DynamicCache(config=model.config)
    with evaluating(model):
        heads = _Heads(model)
        states_LD = _read(model, inputs, cache)
        tokens = [_choices(model, states_LD[-1:])[0]]
        yield tokens
        heads.learn(states_LD, [*inputs["input_ids"][0, 1:].tolist(), *tokens], inputs)
        while True:
            started_s, guessing = gate.now(), gate.should_guess()
            guesses = heads.guess() if guessing else []
            ids = [tokens[-1], *guesses]
            states_LD = _read(model, {"input_ids": torch.tensor([ids], device=states_LD.device)}, cache)
            chosen = _choices(model, states_LD)
            num_kept = next((at for at, guess in enumerate(guesses) if guess != chosen[at]), len(guesses))
            if num_kept < len(guesses):
                cache.crop(num_kept - len(guesses))
            tokens = chosen[: num_kept + 1]
            heads.learn(states_LD[: num_kept + 1], tokens)
            counts.count(len(guesses), num_kept)
            was_over = gate.is_over
            gate.told(gate.now() - started_s, len(tokens), with_guesses=guessing)
            counts.num_switched_off += gate.is_over and not was_over
            for token in tokens:
                yield [token]


class _Heads:
    """A model's heads with their cache; positions are processed when the next proposals are needed."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache()
        self._states: list[Tensor] = []
        self._following: list[Tensor] = []

    def learn(self, states_LD: Tensor, following: list[int], images: dict[str, Tensor] | None = None) -> None:
        """Add verified positions: their states, and the token after each.

        In a prompt, image tokens are replaced by their images' features.
        """
        self._states.append(states_LD)
        if not self._model.future.reads_next:
            self._following.append(states_LD)
            return
        ids = torch.tensor([following], device=states_LD.device)
        if images is not None and "pixel_values" in images:
            whole = torch.cat([images["input_ids"], ids[:, -1:]], dim=1)
            self._following.append(embed_prompt(self._model, {**images, "input_ids": whole})[0, 1:])
        else:
            self._following.append(self._model.get_input_embeddings()(ids)[0])

    def guess(self) -> list[int]:
        """The proposed tokens after the last verified one: the most likely token at each position."""
        states_1LD = torch.cat(self._states).unsqueeze(0)
        next_1LD = torch.cat(self._following).unsqueeze(0)
        self._states, self._following = [], []
        seen = self._cache.get_seq_length()
        length = states_1LD.shape[1]
        mask = torch.ones(length, seen + length, dtype=torch.bool, device=states_1LD.device).tril(seen)
        found = self._model.future(states_1LD, next_1LD, attention_mask=mask[None, None], cache=self._cache)
        return _choices(self._model, torch.cat([states[0, -1:] for states in found]))


def embed_prompt(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The input embeddings of a LLaVA's language model for a prompt with images: [1, L, D]."""
    ids = inputs["input_ids"]
    options = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
    features = model.get_image_features(
        pixel_values=inputs["pixel_values"],
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        **options,
    ).pooler_output
    embedded = model.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id).unsqueeze(-1)
    return embedded.masked_scatter(is_image, torch.cat(list(features)).to(embedded.dtype))


def _read(model: Any, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    """The last hidden states [L, D] of new ids, whose keys and values go into the cache."""
    states: Tensor = model.model(**inputs, use_cache=True, **cache_option(cache)).last_hidden_state[0]
    return states


def _choices(model: Any, states_LD: Tensor) -> list[int]:
    """The greedy choice at each position."""
    chosen: list[int] = model.lm_head(states_LD).argmax(-1).tolist()
    return chosen

"""The decoder from scratch and its heads equal plain arithmetic; packed, cached and saved they are the same again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from models.attention import Segments
from models.cache_argument import NAMES
from models.decoder import Packed, PackedDecoder
from models.mtp.heads import build_heads
from models.mtp.parallel import ParallelFuture
from models.mtp.sequential import SequentialFuture
from models.scratch_decoder import ScratchDecoderConfig, ScratchDecoderForCausalLM
from tests.support import scratch_decoder as plain

HEADS, EPSILON = 4, 1e-5
SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
IDS = ([5, 9, 2, 44, 7], [3, 8], [11, 12, 13, 14, 15, 16])
SAME = {"rtol": 1e-4, "atol": 1e-5}  # fp32; sums in another order


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = ScratchDecoderConfig(
        **SHAPE, num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=EPSILON, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return ScratchDecoderForCausalLM(config).eval()


def packed(lengths: list[int]) -> Packed:
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return Packed(
        input_ids_N=torch.zeros(sum(lengths), dtype=torch.int64),
        position_ids_N=torch.cat([torch.arange(length) for length in lengths]),
        image_I=torch.zeros(0, dtype=torch.int64),
        segments=Segments.of(starts, lengths),
    )


@torch.no_grad()
def test_states_and_logits_equal_plain_arithmetic(model: Any) -> None:
    ids = IDS[0]
    states = plain.hidden(model, plain.embed(model, ids))
    logits = torch.stack([model.model.embed_tokens.weight @ state for state in states])
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], logits, **SAME)


@torch.no_grad()
def test_packed_samples_equal_plain_arithmetic_one_by_one(model: Any) -> None:
    embedded = [torch.stack(plain.embed(model, ids)) for ids in IDS]
    found = PackedDecoder(model)(torch.cat(embedded), packed([len(ids) for ids in IDS]))
    expected = torch.cat([torch.stack(plain.hidden(model, list(each))) for each in embedded])
    torch.testing.assert_close(found, expected, **SAME)
    wanted_K = torch.tensor([0, 4, 5, 12])
    some = replace(packed([len(ids) for ids in IDS]), wanted_K=wanted_K)
    torch.testing.assert_close(PackedDecoder(model)(torch.cat(embedded), some), expected[wanted_K], **SAME)


@torch.no_grad()
def test_the_heads_equal_plain_arithmetic_and_keep_samples_apart(model: Any) -> None:
    torch.manual_seed(1)
    states = [torch.randn(len(ids), 32) for ids in IDS]
    following = [torch.randn(len(ids), 32) for ids in IDS]
    segments = packed([len(ids) for ids in IDS]).segments
    for config in (ParallelFuture(num_tokens=3), SequentialFuture()):
        heads = build_heads(config, model.config)
        found = heads(torch.cat(states)[None], torch.cat(following)[None], segments=segments)
        by_sample = [_reference(config, heads, *pair) for pair in zip(states, following, strict=True)]
        for number, states_1ND in enumerate(found):
            expected = torch.cat([torch.stack(each[number]) for each in by_sample])
            torch.testing.assert_close(states_1ND[0], expected, **SAME)


def _reference(config: Any, heads: Any, states_LD: Tensor, next_LD: Tensor) -> list[list[Tensor]]:
    if isinstance(config, ParallelFuture):
        return plain.parallel(heads, list(states_LD), HEADS, EPSILON)
    return [plain.sequential(heads, list(states_LD), list(next_LD), HEADS, EPSILON)]


@torch.no_grad()
def test_generation_with_a_cache_and_padding_equals_generation_without(model: Any) -> None:
    ids, mask = torch.tensor([[0, 0, 0, 3, 8], [5, 9, 2, 44, 7]]), torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, start in enumerate((3, 0)):
        alone = ids[row, start:].tolist()
        for token in generated[row, 5:].tolist():
            if alone[-1] == 1:
                break
            assert int(model(torch.tensor([alone]), use_cache=False).logits[0, -1].argmax()) == token
            alone.append(token)


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_come_by_either_name(model: Any, name: str) -> None:
    """transformers 5.24 passes them as `cache`, 5.23 as `past_key_values`: both read what stands before."""
    ids = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids).logits
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=each, **{name: cache}).logits for each in ids.split(3, dim=1)]
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **SAME)


def test_it_saves_and_opens_as_any_causal_language_model(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([IDS[2]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight

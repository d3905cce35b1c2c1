"""Decoders of transformers over packed samples: they compute what each sample alone does, or they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Segments
from models.attention_terms import Terms, attend_with
from models.build import check_names
from models.common.errors import InputError
from models.decoder import Packed, PackedDecoder, is_known, packed_decoder
from models.languages.pretrained import PretrainedLanguage
from models.own_forward import OwnForward
from models.packing_probe import check_packing
from models.scaled_head import output_head

LENGTHS = (9, 4, 14)
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 4.0}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "head_dim": 8}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TAKEN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5, "head_dim": 8},
    "granite": SCALED,
    "gemma2": {**CAPPED, "sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "cohere2": {"sliding_window": 5, "logit_scale": 0.25},
    "smollm3": {},
    "phi3": {},
    "olmo2": {},
    "helium": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **NO_DROPOUT},
}
"""Windows shorter than the samples, caps that the scores reach."""

REFUSED = {
    "stablelm": "StableLmForCausalLM cannot be trained: .* hand on where packed samples begin",
    "qwen3_next": "Qwen3NextForCausalLM cannot be trained: 3 of its 3 layers do not attend",
    "falcon": "FalconForCausalLM cannot be trained",
    "mamba": "MambaForCausalLM",
}


def language_of(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **TAKEN.get(kind, {})}))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and sinks that are all alike would hide what is left out
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval()


def packed(samples: list[Tensor], wanted_K: Tensor | None = None) -> Packed:
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return Packed(
        input_ids_N=torch.cat(samples),
        position_ids_N=torch.cat([torch.arange(length) for length in LENGTHS]),
        image_I=torch.zeros(0, dtype=torch.int64),
        segments=Segments.of(starts, LENGTHS),
        wanted_K=wanted_K,
    )


def run(loss: Tensor, model: Any) -> dict[str, Tensor]:
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", TAKEN)
def test_packed_is_what_each_sample_alone_is_to_its_class(kind: str) -> None:
    """Logits and gradients against the class's own eager forward, and again with layers computed twice."""
    model = language_of(kind)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(1, 96, (length,), generator=generator) for length in LENGTHS]
    targets_N = torch.randint(96, (sum(LENGTHS),), generator=generator)
    model.set_attn_implementation("eager")
    apart_NV = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples])
    expected = run(F.cross_entropy(apart_NV, targets_N), model)
    check_packing(model)
    decoder = packed_decoder(model)
    assert isinstance(decoder, PackedDecoder if kind == "mistral" else OwnForward)
    model.train()
    for num_recomputed in (0, 2):
        if num_recomputed:
            decoder.recompute(num_recomputed)
        embedded_ND = model.get_input_embeddings()(torch.cat(samples))
        together_NV = output_head(model)(decoder(embedded_ND, packed(samples)))
        torch.testing.assert_close(together_NV, apart_NV, rtol=1e-4, atol=1e-4 * float(apart_NV.abs().max()))
        found = run(F.cross_entropy(together_NV, targets_N), model)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_wanted_positions_are_those_of_all(kind: str) -> None:
    model = language_of(kind)
    samples = [torch.arange(1, length + 1) for length in LENGTHS]
    decoder, wanted_K = packed_decoder(model), torch.tensor([2, 8, 9, 20])
    embedded_ND = model.get_input_embeddings()(torch.cat(samples))
    everywhere_ND = decoder(embedded_ND, packed(samples))
    torch.testing.assert_close(decoder(embedded_ND, packed(samples, wanted_K)), everywhere_ND[wanted_K])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_leaks_is_refused_by_name(kind: str) -> None:
    model = language_of(kind)
    with pytest.raises(InputError, match=REFUSED[kind]):
        check_packing(model)


def test_a_class_that_leaks_is_found_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is called as often as it should be, and one call sees everything."""
    from models import attention

    exact, calls = attention._one_by_one, []

    def leaking(states: Any, segments: Segments, *others: Any) -> Tensor:
        calls.append(segments)
        joined = replace(segments, lengths=(sum(segments.lengths),))
        return exact(states, joined if len(calls) == 2 else segments, *others)

    monkeypatch.setattr(attention, "_one_by_one", leaking)
    monkeypatch.setattr(attention, "_UNCOMPILED", {})  # an earlier test of this process may have compiled
    with pytest.raises(InputError, match="OlmoForCausalLM cannot be trained: packed samples see each other"):
        check_packing(language_of("olmo"))


def test_generation_has_caps_and_sinks_too() -> None:
    """With the attention function that training leaves in the model, and without packing."""
    for kind in ("gemma2", "gpt_oss"):
        model, ids_BL = language_of(kind), torch.arange(1, 13)[None]
        model.set_attn_implementation("eager")
        expected = model.generate(ids_BL, max_new_tokens=6, do_sample=False)
        packed_decoder(model)
        assert torch.equal(model.generate(ids_BL, max_new_tokens=6, do_sample=False), expected)


def test_an_argument_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(ValueError, match="position_bias, which is not applied"):
        Terms.of({"position_bias": torch.zeros(1), "use_cache": False})
    with pytest.raises(ValueError, match="not causal"):
        Terms.of({"is_causal": False})


def test_without_terms_it_is_causal_attention() -> None:
    states = tuple(torch.randn(1, heads, 7, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    plain = F.scaled_dot_product_attention(*states, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend_with(states, Terms(), 0.3), plain)


def test_matrices_that_are_joined_in_memory_are_refused(tmp_path: Path) -> None:
    """Mixtral's experts: a merge would not find them in the files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mixtral", **SHAPE, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    language = PretrainedLanguage(path=str(tmp_path))
    model = language.load_model(torch.float32)
    assert not is_known(model)
    check_packing(model)
    with pytest.raises(InputError, match=r"MixtralForCausalLM has model.layers.* could not be merged"):
        check_names(model, language)


def test_weights_that_no_bundle_can_hold_are_refused(tmp_path: Path) -> None:
    """GPT-2 is exact, and Llava would not find its weights."""
    language_of("gpt2").save_pretrained(tmp_path)
    language = PretrainedLanguage(path=str(tmp_path))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel names a weight transformer\..*no bundle can hold"):
        check_names(language.load_model(torch.float32), language)

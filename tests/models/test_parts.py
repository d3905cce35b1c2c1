"""What parts say of themselves is what they build: shapes, tokens, and what goes into a bundle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.source import PartFacts
from models.languages.pretrained import PretrainedLanguage
from models.languages.scratch import DecoderLanguage
from models.languages.text import load_tokenizer
from models.mtp.base import MtpConfig
from models.mtp.heads import build_heads
from models.mtp.parallel import ParallelFuture
from models.mtp.sequential import SequentialFuture
from models.projectors.base import ProjectorConfig, new_projector
from models.projectors.linear import LinearProjector
from models.projectors.mlp import MlpProjector
from models.projectors.perceiver import PerceiverProjector
from models.projectors.pixel_shuffle import PixelShuffleProjector
from models.projectors.qformer import QFormerProjector
from models.shapes import llama_shape
from tests.support.backbones import make_language
from tests.support.qformer import make_text_encoder

V, D, P = 24, 40, 16
"""Widths of encoder and language model, features a tile."""
PROJECTORS = [
    LinearProjector(),
    LinearProjector(init_gain=0.5),
    MlpProjector(),
    PerceiverProjector(num_queries=3, num_layers=2, num_heads=4),
    PixelShuffleProjector(factor=2),
]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language(tmp_path_factory.mktemp("language") / "model")


def sizes_of(module: nn.Module) -> Counter[tuple[int, int]]:
    return Counter((each.in_features, each.out_features) for each in module.modules() if isinstance(each, nn.Linear))


@pytest.mark.parametrize("config", PROJECTORS, ids=lambda config: config.kind)
def test_a_projectors_shape_has_the_matrices_that_it_builds(config: ProjectorConfig) -> None:
    built = new_projector(config, V, D)
    assert Counter((each.inputs, each.outputs) for each in config.shape(V, D, P).linears) == sizes_of(built)
    with torch.no_grad():
        tokens = built(torch.randn(2, P, V))
    assert tokens.shape == (2, config.num_tokens(P), D)
    by_default = ProjectorConfig.shape(config, V, D, P)
    assert Counter((each.inputs, each.outputs) for each in by_default.linears) == sizes_of(built)


def test_a_q_formers_shape_has_the_matrices_without_its_text_side(tmp_path: Path) -> None:
    config = QFormerProjector(path=str(make_text_encoder(tmp_path)), num_queries=4, cross_attention_every=2)
    facts = read_json(tmp_path, "config.json")
    exported = type("Exported", (), {"projector_text": facts})
    built = config.build_exported(V, D, exported)
    assert Counter((each.inputs, each.outputs) for each in config.shape(V, D, P).linears) == sizes_of(built)
    assert config.export_config()["projector_text"] == facts
    whole = dict(config.build(V, D, lambda path: PartFacts(facts, path, None)).named_parameters())
    assert dict(config.export_tensors(whole)).keys() == dict(built.named_parameters()).keys() < whole.keys()


@pytest.mark.parametrize("config", [c for c in PROJECTORS if c.llava_activation], ids=lambda config: config.kind)
def test_a_stock_projector_is_exported_as_llavas(config: ProjectorConfig) -> None:
    """Llava's two layers, with the activation that the configuration names, give what ours gives."""
    built = new_projector(config, V, D)
    tensors = dict(config.export_tensors({name: value.detach() for name, value in built.named_parameters()}))
    stock = nn.ModuleDict({"linear_1": nn.Linear(V, D), "linear_2": nn.Linear(D, D)})
    stock.load_state_dict(tensors)
    activation = {"linear": nn.Identity(), "gelu": nn.GELU()}[config.llava_activation or ""]
    features = torch.randn(2, P, V)
    assert torch.equal(stock["linear_2"](activation(stock["linear_1"](features))), built(features))
    assert config.export_config() == {}


@pytest.mark.parametrize("config", [ParallelFuture(num_tokens=4), SequentialFuture()], ids=lambda config: config.kind)
def test_the_shape_of_heads_has_the_matrices_that_they_build(config: MtpConfig) -> None:
    from transformers import LlamaConfig

    facts = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=9)
    built = build_heads(config, facts)
    shape = config.shape(llama_shape(facts.to_dict()))
    assert (built.num_drafts, shape.num_layers) == (config.num_drafts, config.num_drafts)
    found = Counter((each.inputs, each.outputs) for each in shape.layer_linears for _ in range(shape.num_layers))
    assert found == sizes_of(built)


def test_a_new_decoder_says_what_it_is_drawn_with(language: Path) -> None:
    config = DecoderLanguage(tokenizer=str(language), num_layers=2, num_heads=2, width=16, max_positions=64)
    tokenizer = load_tokenizer(config.tokenizer_path)
    made, facts = config.transformers_config(tokenizer), config.facts().config
    assert {key: getattr(made, key) for key in facts} == facts
    decoder = config.draw(made)
    assert decoder.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert (config.weights_directory(), config.weights_digest(), config.published_dtype()) == (None, None, None)
    assert config.text_spec(tokenizer, 64).vocab_size == len(tokenizer)
    with pytest.raises(InputError, match=r"data\.max_length: 65 is more than model\.language\.max_positions"):
        config.text_spec(tokenizer, 65)


def test_a_pretrained_language_model_says_what_its_files_say(language: Path) -> None:
    config = PretrainedLanguage(path=str(language))
    tokenizer = load_tokenizer(config.tokenizer_path)
    assert config.published_dtype() == "float32"
    assert config.weights_directory() == language
    assert len(config.weights_digest() or "") == 64
    model = config.load_model(torch.bfloat16)
    assert (model.dtype, model.training, config.draw(model.config)) == (torch.bfloat16, False, None)
    assert config.shape().vocabulary == model.get_input_embeddings().weight.shape[0]
    with pytest.raises(InputError, match=r"data\.max_length: 513 is more than the 512 positions"):
        config.text_spec(tokenizer, 513)

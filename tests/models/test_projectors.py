"""Projectors: the Q-Former is DistilBERT where it reads and BLIP-2's where it sees; the others make what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import read_metadata
from models.common.documents import read_json
from models.common.errors import InputError
from models.projectors.base import new_projector
from models.projectors.mlp import MlpProjector
from models.projectors.perceiver import PerceiverProjector
from models.projectors.pixel_shuffle import PixelShuffleProjector, merge_squares
from models.projectors.qformer import QFormer, QFormerProjector
from models.spec import num_image_tokens
from tests.support.qformer import NUM_QUERIES, make_text_encoder, qformer_recipe
from trainer.config.recipe import Recipe

VISION_WIDTH, LANGUAGE_WIDTH = 24, 40
# fp32; the same sums in another order
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("text"))


def build(text_encoder: Path, every: int = 1) -> QFormer:
    torch.manual_seed(0)
    config = QFormerProjector(path=str(text_encoder), num_queries=NUM_QUERIES, cross_attention_every=every)
    qformer = new_projector(config, VISION_WIDTH, LANGUAGE_WIDTH)
    assert isinstance(qformer, QFormer)
    for parameter in qformer.parameters():  # far from what would make a difference small
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return qformer


def texts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    is_text = torch.arange(7) < torch.tensor([[7], [4], [2]])
    return ids.masked_fill(~is_text, 0), is_text


@torch.no_grad()
def test_it_starts_as_the_text_encoder(text_encoder: Path) -> None:
    """A text without its image goes through DistilBERT's own layers."""
    from transformers import DistilBertModel

    torch.manual_seed(0)
    qformer = new_projector(QFormerProjector(path=str(text_encoder)), VISION_WIDTH, LANGUAGE_WIDTH)
    assert isinstance(qformer, QFormer)
    ids, is_text = texts()
    expected = DistilBertModel.from_pretrained(text_encoder).eval()(ids, attention_mask=is_text.long())
    torch.testing.assert_close(qformer.read(ids, is_text)[is_text], expected.last_hidden_state[is_text], **ROUNDING)


def as_blip2(qformer: QFormer, facts: dict[str, int], every: int) -> Any:
    """transformers' Blip2QFormerModel with the weights of ours."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    model = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=facts["dim"],
            intermediate_size=facts["hidden_dim"],
            num_hidden_layers=facts["n_layers"],
            num_attention_heads=facts["n_heads"],
            encoder_hidden_size=VISION_WIDTH,
            cross_attention_frequency=every,
            use_qformer_text_input=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()
    ours, found = qformer.state_dict(), {}
    for name in model.state_dict():
        place = name.replace("encoder.layer.", "blocks.").replace("layernorm.", "query_norm.")
        for theirs, mine in (
            (".crossattention.output.LayerNorm", ".cross_attention.norm"),
            (".crossattention.output.dense", ".cross_attention.attention.output"),
            (".crossattention.attention.", ".cross_attention.attention."),
            (".attention.output.LayerNorm", ".attention_norm"),
            (".attention.output.dense", ".attention.output"),
            (".attention.attention.", ".attention."),
            (".intermediate_query.dense", ".feed_forward.up"),
            (".output_query.dense", ".feed_forward.down"),
            (".output_query.LayerNorm", ".feed_forward.norm"),
            (".intermediate.dense", ".text.up"),
            (".output.dense", ".text.down"),
            (".output.LayerNorm", ".text.norm"),
        ):
            if theirs in place and "cross_attention.attention.output" not in place:
                place = place.replace(theirs, mine)
                break
        found[name] = ours[place]
    model.load_state_dict(found)
    return model


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2])
def test_it_sees_and_matches_as_transformers_blip2_does(text_encoder: Path, every: int) -> None:
    qformer = build(text_encoder, every)
    peer = as_blip2(qformer, read_json(text_encoder, "config.json"), every)
    features, (ids, is_text) = torch.randn(3, 5, VISION_WIDTH), texts()
    queries = qformer.queries(3)
    image = qformer.vision_norm(features)
    seen = peer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(qformer.see(features), seen, **ROUNDING)
    assert qformer.text is not None
    words = qformer.text.words(ids) + qformer.text.positions(torch.arange(7))
    qformer.text.norm.load_state_dict(qformer.query_norm.state_dict())  # BLIP-2 has one norm for both
    together = peer(
        query_embeds=torch.cat([queries, words], dim=1),
        query_length=NUM_QUERIES,
        attention_mask=torch.cat([torch.ones(3, NUM_QUERIES), is_text.float()], dim=1),
        encoder_hidden_states=image,
    ).last_hidden_state
    torch.testing.assert_close(qformer.match(features, ids, is_text), together[:, :NUM_QUERIES], **ROUNDING)


@torch.no_grad()
def test_a_caption_s_words_see_the_image_and_what_came_before(text_encoder: Path) -> None:
    qformer = build(text_encoder)
    features, (ids, is_text) = torch.randn(3, 5, VISION_WIDTH), texts()
    whole = qformer.caption(features, ids, is_text)
    for length in range(1, 7):
        begun = qformer.caption(features, ids[:, :length], is_text[:, :length])
        torch.testing.assert_close(whole[:, :length][is_text[:, :length]], begun[is_text[:, :length]], **ROUNDING)
    assert not torch.allclose(whole, qformer.caption(features + 1.0 * torch.randn(3, 5, VISION_WIDTH), ids, is_text))
    other_start = ids.clone()
    other_start[:, 0] = 3  # the decoder has a start of its own
    torch.testing.assert_close(qformer.caption(features, other_start, is_text), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [PerceiverProjector(num_queries=3, num_layers=2, num_heads=4), PixelShuffleProjector(factor=2)],
    ids=lambda config: config.kind,
)
def test_a_projector_makes_as_many_tokens_as_its_configuration_says(
    config: PerceiverProjector | PixelShuffleProjector,
) -> None:
    torch.manual_seed(0)
    projector = new_projector(config, VISION_WIDTH, LANGUAGE_WIDTH)
    features = torch.randn(2, 16, VISION_WIDTH)
    tokens = projector(features)
    assert tokens.shape == (2, config.num_tokens(16), LANGUAGE_WIDTH)
    tokens.square().sum().backward()
    assert all(bool(parameter.grad is not None and parameter.grad.any()) for parameter in projector.parameters())
    torch.testing.assert_close(projector(features[1:]), tokens[1:], **ROUNDING)


@torch.no_grad()
def test_the_perceiver_attends_to_features_and_latents() -> None:
    """Against PyTorch's own multi-head attention, layer by layer; the order of features says nothing."""
    torch.manual_seed(0)
    config = PerceiverProjector(num_queries=3, num_layers=2, num_heads=4)
    projector = new_projector(config, VISION_WIDTH, LANGUAGE_WIDTH)
    features = torch.randn(2, 16, VISION_WIDTH)
    latents = projector.queries(2)
    for layer in projector.layers:
        own = layer.attention
        peer = torch.nn.MultiheadAttention(VISION_WIDTH, 4, batch_first=True)
        peer.in_proj_weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
        peer.in_proj_bias.copy_(torch.cat([own.query.bias, own.key.bias, own.value.bias]))
        peer.out_proj.load_state_dict(own.output.state_dict())
        asked = layer.latent_norm(latents)
        source = torch.cat([layer.feature_norm(features), asked], dim=1)
        latents = latents + peer(asked, source, source, need_weights=False)[0]
        latents = latents + layer.feed_forward(latents)
    expected = projector.output(projector.norm(latents))
    torch.testing.assert_close(projector(features), expected, **ROUNDING)
    torch.testing.assert_close(projector(features.flip(1)), expected, **ROUNDING)


def test_pixel_shuffle_puts_neighbours_side_by_side() -> None:
    features = torch.arange(16.0).view(1, 16, 1)
    merged = merge_squares(features, 2)[0].tolist()
    assert merged == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_features_that_are_no_grid_are_refused() -> None:
    for num_features in (17, 25):
        with pytest.raises(InputError, match=rf"{num_features} features are no grid of 2 x 2 squares"):
            PixelShuffleProjector(factor=2).num_tokens(num_features)


def test_the_data_pipeline_counts_queries_and_reads_with_the_q_former_s_words(tmp_path: Path) -> None:
    model = Recipe.model_validate(qformer_recipe(tmp_path, Path("none"))).model
    spoken, read = read_metadata(model, 64), read_metadata(model, 64, "projector")
    assert num_image_tokens(spoken.image, 99, 7) == num_image_tokens(read.image, 99, 7) == NUM_QUERIES
    assert read.tokenizer.eos_token == "[SEP]"
    with pytest.raises(InputError, match=r"69 is more than the 68 positions"):
        read_metadata(model, 69, "projector")
    plain = model.model_copy(update={"projector": MlpProjector()})
    with pytest.raises(InputError, match="mlp reads no text"):
        read_metadata(plain, 64, "projector")

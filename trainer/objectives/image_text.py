"""BLIP-2's image-text objectives (Li et al. 2023, section 3.1): contrast, matching, captioning.

    images --queries see--> [N, Q, W] --+
    texts ----layers read---> [N, W] -----+-- gather from all ranks --> similarities [N, M] --> ITC
                                                  '--> hard negatives --> image and text together --> ITM
    image, then its text word by word ---------------------------------------------------------> ITG

The loss is a sum over the rank's own pairs. Each is compared with the pairs of the whole global batch, whose features
come from all ranks with their gradients; so 2 ranks give what 1 rank gives. With accumulation it would be compared with
a micro-batch of each rank, and the loss would depend on how rows are split: `check_rows_at_once` refuses it.

N pairs of this rank, M of all ranks, P features an image, V the encoder's width, Q queries, L text positions, K words
to be predicted, W the Q-Former's width, E the width in which they are compared.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.batch import Batch
from models.config import ModelSource, Reader
from models.projectors.qformer import QFormer
from models.projectors.qformer_text import TextSide
from models.shapes import Counts, ModelShape, PartFlops
from models.spec import num_image_tokens
from models.vlm import VLM
from trainer.config.objective import ObjectiveConfig
from trainer.config.tuning import Frozen, TuningPlan
from trainer.flops.image_text import pair_flops
from trainer.flops.image_text_memory import pair_activations
from trainer.objectives.gather import RowsByRank
from trainer.objectives.loss_sum import BatchLoss, Embeddings, LossSum


class ImageText(ObjectiveConfig):
    """Contrast (ITC), matching (ITM) and captioning (ITG) of images and their texts, as in BLIP-2.

    Negatives come from the whole global batch, whatever the number of GPUs; so a rank must compute its rows at once
    (`batch.micro_rows`), and accumulation is refused. `label_smoothing` is for ITC and ITG.
    """

    kind: Literal["image_text"] = "image_text"
    losses: Annotated[tuple[Literal["itc", "itm", "itg"], ...], Field(strict=False, min_length=1)] = ("itc",)
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    reader: ClassVar[Reader] = "projector"
    compares_rows: ClassVar[bool] = True

    def build(self) -> BatchLoss:
        """See `ObjectiveConfig.build`."""
        return ImageTextLoss(self)

    def check_model(self, model: ModelSource) -> None:
        """Raise ValueError unless the projector reads text."""
        if model.projector.text_encoder is None:
            raise ValueError(
                f"{self.kind} teaches a projector that reads text, and model.projector.kind is {model.projector.kind};"
                " set it to qformer"
            )

    def flops(self, shape: ModelShape, plan: TuningPlan, counts: Counts) -> dict[str, PartFlops]:
        """FLOPs of vision encoder and projector; the language model is not run."""
        assert shape.pairs is not None, "check_model has refused other projectors"
        vision_learns = not isinstance(plan.vision, Frozen)
        return pair_flops(shape.vision, shape.pairs, self.losses, counts, vision_learns=vision_learns)

    def activation_bytes(
        self, shape: ModelShape, plan: TuningPlan, counts: Counts, *, element: int, num_recomputed: int
    ) -> dict[str, float]:
        """Bytes of the projector's passes; there is no decoder layer to recompute."""
        del plan, num_recomputed
        assert shape.pairs is not None, "check_model has refused other projectors"
        return {"activations": pair_activations(shape.pairs, self.losses, counts, element)}


@dataclass(frozen=True)
class Pairs:
    """This rank's pairs. A rank without any has one blank pair, which is not real."""

    features_NPV: Tensor
    ids_NL: Tensor
    is_text_NL: Tensor
    is_real_N: Tensor
    rows_N: Tensor
    keys: tuple[str, ...]
    by_rank: RowsByRank

    @classmethod
    def of(cls, vlm: VLM, batch: Batch) -> Pairs:
        """Take a batch of the `pair` template apart: each sample is its image tokens, then its text."""
        device = batch.device
        num_beside = num_image_tokens(vlm.image, 1, 1)
        keys = tuple(
            f"{shard}/{key}"
            for shards, names in zip(batch.shards, batch.keys, strict=True)
            for shard, key in zip(shards, names, strict=True)
        )
        tiles_TSSC, rows_N = batch.images.tiles_TSSC, batch.images.tile_rows_T
        if keys:
            ids_N = batch.layout.without_padding(batch.tokens.input_ids_BL)
            texts = [part[num_beside:] for part in ids_N.split(list(batch.layout.segment_lengths))]
        else:
            tiles_TSSC = torch.zeros(1, vlm.image.size, vlm.image.size, 3, dtype=torch.uint8, device=device)
            rows_N, texts = torch.zeros(1, dtype=torch.int64, device=device), [rows_N.new_zeros(2)]
        return cls(
            features_NPV=vlm.vision(vlm.normalise(tiles_TSSC)),
            ids_NL=pad_sequence(texts, batch_first=True),
            is_text_NL=pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).bool(),
            is_real_N=torch.full((len(texts),), bool(keys), device=device),
            rows_N=rows_N,
            keys=keys or ("",),
            by_rank=RowsByRank.exchange_counts(len(texts), device),
        )


@dataclass(frozen=True)
class Similarities:
    """Of this rank's pairs with those of all ranks that are real and finite, at `columns_M` of the gathered ones."""

    to_texts_NM: Tensor
    to_images_NM: Tensor
    columns_M: Tensor
    own_N: Tensor
    """Each pair's own column; 0 where it has none."""

    @classmethod
    def of(cls, found: tuple[Tensor, Tensor, Tensor], pairs: Pairs) -> Similarities:
        """The largest similarity over an image's queries, scaled. A non-finite pair does not affect other rows.

        `found` are images [N, Q, E], texts [N, E] and the scale.
        """
        images_NQE, texts_NE, scale = found
        by_rank = pairs.by_rank
        all_images, all_texts = by_rank.gather_features(images_NQE), by_rank.gather_features(texts_NE)
        is_finite_M = torch.isfinite(all_images.detach().flatten(1)).all(1) & torch.isfinite(all_texts.detach()).all(1)
        is_kept_M = by_rank.gather_features(pairs.is_real_N.long()).bool() & is_finite_M
        is_kept_M = is_kept_M if bool(is_kept_M.any()) else torch.ones_like(is_kept_M)
        columns_M = is_kept_M.nonzero().squeeze(1)
        return cls(
            to_texts_NM=scale * similarity(images_NQE, all_texts[columns_M]),
            to_images_NM=scale * similarity(all_images[columns_M], texts_NE).T,
            columns_M=columns_M,
            own_N=(is_kept_M.cumsum(0) - 1)[by_rank.own].clamp(min=0),
        )

    def contrast(self, smoothing: float) -> Tensor:
        """ITC [N]: the mean of both directions' cross-entropies."""
        both = [
            F.cross_entropy(scores_NM, self.own_N, reduction="none", label_smoothing=smoothing)
            for scores_NM in (self.to_texts_NM, self.to_images_NM)
        ]
        return (both[0] + both[1]) / 2

    def negatives(self, scores_NM: Tensor, salt: str, keys: tuple[str, ...]) -> Tensor:
        """A hard negative for each pair, as indices of all ranks' pairs [N]; more similar ones are more likely.

        The random number is derived from the sample's name, so that the choice does not depend on the ranks.
        """
        others_NM = scores_NM.detach().scatter(1, self.own_N.unsqueeze(1), -torch.inf)
        shares_NM = torch.nan_to_num(others_NM.softmax(1)).cumsum(1)
        lots = [zlib.crc32(f"{salt}/{key}".encode()) / 2**32 for key in keys]
        drawn_N1 = torch.tensor(lots, device=shares_NM.device).unsqueeze(1) * shares_NM[:, -1:]
        places_N = torch.searchsorted(shares_NM, drawn_N1, right=True).squeeze(1).clamp(max=len(self.columns_M) - 1)
        return self.columns_M[places_N]


def similarity(images_NQE: Tensor, texts_ME: Tensor) -> Tensor:
    """[N, M] in fp32: the largest over the queries, as in BLIP-2."""
    with torch.autocast(texts_ME.device.type, enabled=False):
        return torch.einsum("nqe,me->nmq", images_NQE.float(), texts_ME.float()).amax(-1)


class ImageTextLoss:
    """Any of the three losses, with equal weights: ITC and ITM as means over pairs, ITG over words."""

    def __init__(self, config: ImageText) -> None:
        self._losses = frozenset(config.losses)
        self._smoothing = config.label_smoothing

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """The sums over this rank's pairs. Every rank must call it equally often, with pairs or without."""
        qformer = vlm.projector
        assert isinstance(qformer, QFormer), "read_metadata has refused other projectors"
        assert qformer.text is not None
        pairs = Pairs.of(vlm, batch)
        losses, embeddings = [torch.zeros_like(pairs.rows_N, dtype=torch.float32)], None
        is_right_N = torch.zeros_like(pairs.is_real_N)
        if self._losses & {"itc", "itm"}:
            words_NW = qformer.read(pairs.ids_NL, pairs.is_text_NL)[:, 0]
            found = qformer.text.contrast(qformer.see(pairs.features_NPV), words_NW)
            similarities = Similarities.of(found, pairs)
            is_right_N = similarities.to_texts_NM.argmax(1) == similarities.own_N
            embeddings = Embeddings(*(value.detach() for value in found))
        if "itc" in self._losses:
            losses.append(similarities.contrast(self._smoothing))
        if "itm" in self._losses:
            losses.append(matching(qformer, qformer.text, pairs, similarities))
        if "itg" in self._losses:
            losses.append(captioning(qformer, qformer.text, pairs, self._smoothing))
        loss_N = torch.stack(losses).sum(0)
        loss_N = torch.where(pairs.is_real_N, loss_N, 0.0 * loss_N)
        sums_B = loss_N.new_zeros(len(batch.keys)).index_add(0, pairs.rows_N, loss_N.detach())
        return LossSum(loss_N.sum(), (is_right_N & pairs.is_real_N).sum(), sums_B, _real(embeddings, pairs.is_real_N))


def matching(qformer: QFormer, side: TextSide, pairs: Pairs, similarities: Similarities) -> Tensor:
    """ITM [N]: whether image and text belong together, for each pair and with a wrong image and a wrong text."""
    by_rank = pairs.by_rank
    all_features, (all_ids, all_masks) = (
        by_rank.gather_features(pairs.features_NPV),
        by_rank.gather_texts(pairs.ids_NL, pairs.is_text_NL),
    )
    wrong_text_N = similarities.negatives(similarities.to_texts_NM, "text", pairs.keys)
    wrong_image_N = similarities.negatives(similarities.to_images_NM, "picture", pairs.keys)
    own_N = torch.arange(len(all_ids), device=all_ids.device)[by_rank.own]
    images = torch.cat([own_N, wrong_image_N, own_N])
    texts = torch.cat([own_N, own_N, wrong_text_N])
    queries = qformer.match(all_features[images], all_ids[texts], all_masks[texts])
    logits = side.matching(queries).float().mean(1)
    fits = torch.zeros_like(texts)
    fits[: len(own_N)] = 1
    losses_3N = F.cross_entropy(logits, fits, reduction="none").view(3, -1)
    if len(similarities.columns_M) == 1:  # a batch of one pair has no negatives
        return losses_3N[0] + 0.0 * losses_3N[1:].sum(0)
    return losses_3N.mean(0)


def captioning(qformer: QFormer, side: TextSide, pairs: Pairs, smoothing: float) -> Tensor:
    """ITG [N]: the text after its image, scaled so that all ranks' sum is pairs x the mean over tokens."""
    states_NLW = qformer.caption(pairs.features_NPV, pairs.ids_NL, pairs.is_text_NL)
    is_target_NL = pairs.is_text_NL[:, 1:] & pairs.is_real_N.unsqueeze(1)
    is_computed_NL = pairs.is_text_NL[:, 1:]
    logits_KV = side.captioning(states_NLW[:, :-1][is_computed_NL])
    targets_K = pairs.ids_NL[:, 1:][is_computed_NL]
    losses_K = F.cross_entropy(logits_KV, targets_K, reduction="none", label_smoothing=smoothing)
    rows_K = is_computed_NL.nonzero()[:, 0]
    counts = pairs.by_rank.all_reduce(torch.stack([pairs.is_real_N.sum(), is_target_NL.sum()]))
    per_word = counts[0] / counts[1].clamp(min=1)
    return losses_K.new_zeros(len(pairs.ids_NL)).index_add(0, rows_K, losses_K) * per_word


def _real(embeddings: Embeddings | None, is_real_N: Tensor) -> Embeddings | None:
    if embeddings is None:
        return None
    return Embeddings(embeddings.images_NQE[is_real_N], embeddings.texts_NE[is_real_N], embeddings.scale)

"""Pictures and texts brought together (Li et al. 2023, BLIP-2, section 3.1): contrast, matching, captioning.

    pictures --queries see--> [N, Q, W] --+
    texts ----layers read---> [N, W] -----+-- pool over the ranks --> similarities [N, M] --> ITC
                                                  '--> hard negatives --> picture and text together --> ITM
    picture, then its text word by word ---------------------------------------------------------> ITG

The loss is a sum over the rank's own pairs. The other side of a comparison is the pool, the pairs of the whole global
batch, whose features come from all ranks with their gradients; so 2 ranks give what 1 rank gives. With accumulation the
pool would be a micro-batch of each rank, and the loss would depend on how rows are split: `check_pool` refuses it.

N pairs of this rank, M of all ranks, P features a picture, V the encoder's width, Q queries, L text positions, K words
to be predicted, W the Q-Former's width, E the width in which they are compared.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.batch import Batch
from models.errors import InputError
from models.projectors.qformer import QFormer
from models.projectors.qformer_text import TextSide
from models.spec import num_image_tokens
from models.vlm import VLM
from trainer.config import ImageText, StageConfig
from trainer.loss_sum import Embeddings, LossSum
from trainer.pool import Pool


def check_pool(config: StageConfig, world_size: int, where: str) -> None:
    """Raise InputError where the stage compares the rows of a batch and a rank would take its own in several goes."""
    rows = -(-config.batch.global_rows // world_size)
    if isinstance(config.objective, ImageText) and rows > config.batch.micro_rows:
        raise InputError(
            f"{where}.batch.micro_rows: {config.batch.micro_rows}, but image_text compares all rows of a batch with"
            f" each other, so a rank must take its {rows} at once: raise it to {rows}, lower global_rows, or take more"
            " GPUs"
        )


@dataclass(frozen=True)
class Pairs:
    """This rank's pairs, and the pool they belong to. A rank without any has one blank pair, which is not real."""

    features_NPV: Tensor
    ids_NL: Tensor
    is_text_NL: Tensor
    is_real_N: Tensor
    rows_N: Tensor
    keys: tuple[str, ...]
    pool: Pool

    @classmethod
    def of(cls, vlm: VLM, batch: Batch) -> Pairs:
        """Take a batch of the `pair` template apart: each sample is its image tokens, then its text."""
        device = batch.input_ids_BL.device
        num_beside = num_image_tokens(vlm.image, 1, 1)
        keys = tuple(
            f"{shard}/{key}"
            for shards, names in zip(batch.shards, batch.keys, strict=True)
            for shard, key in zip(shards, names, strict=True)
        )
        tiles_TSSC, rows_N = batch.tiles_TSSC, batch.tile_rows_T
        if keys:
            ids_N = batch.input_ids_BL.flatten()[batch.real_N]
            texts = [part[num_beside:] for part in ids_N.split(list(batch.segment_lengths))]
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
            pool=Pool.meet(len(texts), device),
        )


@dataclass(frozen=True)
class Similarities:
    """Of this rank's pairs with the pairs of the pool that are real and finite, which stand at `columns_M` of it."""

    to_texts_NM: Tensor
    to_pictures_NM: Tensor
    columns_M: Tensor
    own_N: Tensor
    """Each pair's own column; 0 where it has none."""

    @classmethod
    def of(cls, found: tuple[Tensor, Tensor, Tensor], pairs: Pairs) -> Similarities:
        """The largest similarity over a picture's queries, scaled. A pair that is not finite spoils no other's row.

        `found` are pictures [N, Q, E], texts [N, E] and the scale.
        """
        pictures_NQE, texts_NE, scale = found
        pool = pairs.pool
        all_pictures, all_texts = pool.gather(pictures_NQE), pool.gather(texts_NE)
        is_finite_M = torch.isfinite(all_pictures.detach().flatten(1)).all(1) & torch.isfinite(all_texts.detach()).all(
            1
        )
        is_kept_M = pool.gather(pairs.is_real_N.long()).bool() & is_finite_M
        is_kept_M = is_kept_M if bool(is_kept_M.any()) else torch.ones_like(is_kept_M)
        columns_M = is_kept_M.nonzero().squeeze(1)
        return cls(
            to_texts_NM=scale * similarity(pictures_NQE, all_texts[columns_M]),
            to_pictures_NM=scale * similarity(all_pictures[columns_M], texts_NE).T,
            columns_M=columns_M,
            own_N=(is_kept_M.cumsum(0) - 1)[pool.own].clamp(min=0),
        )

    def contrast(self, smoothing: float) -> Tensor:
        """ITC [N]: the mean of both directions' cross-entropies."""
        both = [
            F.cross_entropy(scores_NM, self.own_N, reduction="none", label_smoothing=smoothing)
            for scores_NM in (self.to_texts_NM, self.to_pictures_NM)
        ]
        return (both[0] + both[1]) / 2

    def negatives(self, scores_NM: Tensor, salt: str, keys: tuple[str, ...]) -> Tensor:
        """A wrong partner for each pair, as places in the pool [N], the more similar the likelier.

        Drawn by a number that follows from the sample's name, so that the choice does not depend on the ranks.
        """
        others_NM = scores_NM.detach().scatter(1, self.own_N.unsqueeze(1), -torch.inf)
        shares_NM = torch.nan_to_num(others_NM.softmax(1)).cumsum(1)
        lots = [zlib.crc32(f"{salt}/{key}".encode()) / 2**32 for key in keys]
        drawn_N1 = torch.tensor(lots, device=shares_NM.device).unsqueeze(1) * shares_NM[:, -1:]
        places_N = torch.searchsorted(shares_NM, drawn_N1, right=True).squeeze(1).clamp(max=len(self.columns_M) - 1)
        return self.columns_M[places_N]


def similarity(pictures_NQE: Tensor, texts_ME: Tensor) -> Tensor:
    """[N, M] in fp32: the largest over the queries, as in BLIP-2."""
    with torch.autocast(texts_ME.device.type, enabled=False):
        return torch.einsum("nqe,me->nmq", pictures_NQE.float(), texts_ME.float()).amax(-1)


class ImageTextLoss:
    """Any of the three losses, with equal weights: ITC and ITM as means over pairs, ITG over words."""

    def __init__(self, config: ImageText) -> None:
        self._losses = frozenset(config.losses)
        self._smoothing = config.label_smoothing

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """The sums over this rank's pairs. Every rank must call it as often as the others, with pairs or without."""
        qformer = vlm.projector
        assert isinstance(qformer, QFormer), "read_facts has refused other projectors"
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
    """ITM [N]: whether picture and text belong together, for each pair and with a wrong picture and a wrong text."""
    pool = pairs.pool
    all_features, (all_ids, all_masks) = (
        pool.gather(pairs.features_NPV),
        pool.gather_texts(pairs.ids_NL, pairs.is_text_NL),
    )
    wrong_text_N = similarities.negatives(similarities.to_texts_NM, "text", pairs.keys)
    wrong_picture_N = similarities.negatives(similarities.to_pictures_NM, "picture", pairs.keys)
    own_N = torch.arange(len(all_ids), device=all_ids.device)[pool.own]
    pictures = torch.cat([own_N, wrong_picture_N, own_N])
    texts = torch.cat([own_N, own_N, wrong_text_N])
    queries = qformer.match(all_features[pictures], all_ids[texts], all_masks[texts])
    logits = side.matching(queries).float().mean(1)
    fits = torch.zeros_like(texts)
    fits[: len(own_N)] = 1
    losses_3N = F.cross_entropy(logits, fits, reduction="none").view(3, -1)
    if len(similarities.columns_M) == 1:  # a pool of one pair has nothing wrong to offer
        return losses_3N[0] + 0.0 * losses_3N[1:].sum(0)
    return losses_3N.mean(0)


def captioning(qformer: QFormer, side: TextSide, pairs: Pairs, smoothing: float) -> Tensor:
    """ITG [N]: the text word by word behind its picture, so divided that the pool's sum is pairs x the words' mean."""
    states_NLW = qformer.caption(pairs.features_NPV, pairs.ids_NL, pairs.is_text_NL)
    is_target_NL = pairs.is_text_NL[:, 1:] & pairs.is_real_N.unsqueeze(1)
    is_computed_NL = pairs.is_text_NL[:, 1:]
    logits_KV = side.captioning(states_NLW[:, :-1][is_computed_NL])
    targets_K = pairs.ids_NL[:, 1:][is_computed_NL]
    losses_K = F.cross_entropy(logits_KV, targets_K, reduction="none", label_smoothing=smoothing)
    rows_K = is_computed_NL.nonzero()[:, 0]
    counts = pairs.pool.sum(torch.stack([pairs.is_real_N.sum(), is_target_NL.sum()]))
    per_word = counts[0] / counts[1].clamp(min=1)
    return losses_K.new_zeros(len(pairs.ids_NL)).index_add(0, rows_K, losses_K) * per_word


def _real(embeddings: Embeddings | None, is_real_N: Tensor) -> Embeddings | None:
    if embeddings is None:
        return None
    return Embeddings(embeddings.pictures_NQE[is_real_N], embeddings.texts_NE[is_real_N], embeddings.scale)

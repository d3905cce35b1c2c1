"""A projector that reads text (a Q-Former), in training, as the encoder that `eval.tasks.retrieval` asks.

Images and texts are encoded as in training: an image's tile, and the text between the tokenizer's begin and end tokens.

N images or texts, Q queries, E the width in which they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.encode import Encoder
from data_pipeline.images import open_image
from data_pipeline.record import Turn
from data_pipeline.tiles import fit_tiles
from eval.images import StoredImage
from eval.live import InterruptedAnswerError
from models.projectors.qformer import QFormer
from models.projectors.qformer_text import TextSide
from models.spec import IMAGE_TOKEN, num_image_tokens
from models.vlm import VLM


class PairEncoder:
    """Embeds images, a vector for each query, and texts; all have length 1.

    Args:
        encoder: of the stage's held-out samples, which knows its template and its limits.
        autocast: compute in this dtype over fp32 weights, as training does; float32: in the weights' own dtype.
        should_stop: called before every batch; True raises `InterruptedAnswerError`.
    """

    def __init__(
        self,
        vlm: VLM,
        encoder: Encoder,
        *,
        autocast: torch.dtype,
        device: torch.device,
        should_stop: Callable[[], bool],
    ) -> None:
        self._vlm, self._encoder = vlm, encoder
        self._autocast, self._device, self._should_stop = autocast, device, should_stop

    @torch.no_grad()
    def images(self, sources: Sequence[Path | StoredImage]) -> Tensor:
        """The vectors of images, [N, Q, E] float32 on the CPU."""
        opened = [open_image(source if isinstance(source, Path) else source.read()) for source in sources]
        tiles = np.concatenate([fit_tiles(image, self._encoder.image) for image in opened])
        qformer, side = self._parts()
        with self._computing():
            features_NPV = self._vlm.vision(self._vlm.normalise(torch.from_numpy(tiles).to(self._device)))
            queries_NQW = qformer.see(features_NPV)
            return side.contrast.of_images(queries_NQW).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """The vectors of texts, [N, E] float32 on the CPU; what is longer than `max_length` is cut, as published."""
        ids = [self._ids(text) for text in texts]
        ids_NL = pad_sequence(ids, batch_first=True).to(self._device)
        is_text_NL = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).bool().to(self._device)
        qformer, side = self._parts()
        with self._computing():
            return side.contrast.of_texts(qformer.read(ids_NL, is_text_NL)[:, 0]).cpu()

    def _ids(self, text: str) -> Tensor:
        encoder = self._encoder
        turns = [Turn("user", IMAGE_TOKEN), Turn("assistant", encoder.control_tokens.mark(text))]
        ids, _ = encoder.tokens.encode_segments(encoder.template.segments(turns))
        ids = ids[ids != encoder.tokens.image_token_id]
        limit = encoder.max_length - num_image_tokens(encoder.image, 1, 1)
        kept = ids if len(ids) <= limit else np.concatenate([ids[: limit - 1], ids[-1:]])
        return torch.from_numpy(kept.astype(np.int64))

    def _parts(self) -> tuple[QFormer, TextSide]:
        qformer = self._vlm.projector
        assert isinstance(qformer, QFormer), "read_metadata has refused other projectors"
        assert qformer.text is not None
        return qformer, qformer.text

    def _computing(self) -> torch.autocast:
        if self._should_stop():
            raise InterruptedAnswerError
        return torch.autocast(self._device.type, self._autocast, enabled=self._autocast != torch.float32)

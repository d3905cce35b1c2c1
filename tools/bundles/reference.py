"""The trained model, adapters apart, with one layer in memory at a time: what a merged bundle is compared with.

    base files, projector, checkpoint --> the model in training's own classes --> hidden states

The base is whole (16 or 32 bit) also where training held it in 4 or 8: that is what adapters are merged into. Computes
in fp32, as `tools.bundles.stock` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.build import Facts
from models.config import ModelConfig, PretrainedLanguage
from models.sharded import TensorFiles
from models.source import directory_of
from models.vision import VisionEncoder
from tools.bundles.streamed import stream, without_weights

if TYPE_CHECKING:
    from models.vlm import VLM
    from trainer.checkpoint import CheckpointReader
    from trainer.config import StageConfig


class Base:
    """A language model before training: its configuration, and its tensors by their names, read one by one."""

    def __init__(self, config: Any, tensors: TensorFiles | dict[str, Tensor], where: str) -> None:
        self.config, self.where = config, where
        self._tensors = tensors

    @classmethod
    def in_directory(cls, directory: Path) -> Base:
        """A pretrained one."""
        from transformers import AutoConfig

        return cls(AutoConfig.from_pretrained(directory), TensorFiles(directory), str(directory))

    @classmethod
    def in_memory(cls, decoder: Any) -> Base:
        """One that was drawn at random; a tied head is the embedding."""
        tensors = {name: value.detach() for name, value in decoder.named_parameters()}
        return cls(decoder.config, tensors, "the new decoder")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors.read(name) if isinstance(self._tensors, TensorFiles) else self._tensors[name].clone()


@dataclass(frozen=True)
class Trained:
    """What was trained: the model's parts, the stage that trained them, and the checkpoint (None: as it would start).

    `dtype` is what the frozen weights are held in. `vision` is the encoder, whole: towers are small beside what they
    see for, and hub layouts of them differ too much to be read name by name. `projector` has its weights.
    """

    model: ModelConfig
    config: StageConfig
    facts: Facts
    reader: CheckpointReader | None
    dtype: torch.dtype
    vision: VisionEncoder
    projector: nn.Module
    future: nn.Module | None
    language: Base

    @classmethod
    def load(
        cls, model: ModelConfig, config: StageConfig, facts: Facts, reader: CheckpointReader | None, *, seed: int
    ) -> Trained:
        """Read the encoder and make the new parts; `seed` draws those that no checkpoint holds."""
        from models.build import new_parts
        from models.vision import load_vision
        from trainer.step import DTYPES

        dtype = DTYPES[config.engine.precision]
        vision, pretrained = load_vision(model.vision, dtype), None
        if isinstance(model.language, PretrainedLanguage):
            pretrained = Base.in_directory(directory_of(model.language.path))
        new = new_parts(model, facts, vision.width, pretrained.config if pretrained is not None else None, seed=seed)
        language = pretrained or Base.in_memory(new.decoder)
        trained = cls(model, config, facts, reader, dtype, vision, new.projector, new.future, language)
        for part, module in trained.whole_parts():
            for name, parameter in module.named_parameters():
                if f"{part}.{name}" in trained.names:
                    parameter.data = trained.weight(f"{part}.{name}")
        return trained

    def whole_parts(self) -> list[tuple[str, nn.Module]]:
        """The parts that are held whole, by their names in the model."""
        future = [("future", self.future)] if self.future is not None else []
        return [("vision", self.vision), ("projector", self.projector), *future]

    @property
    def names(self) -> frozenset[str]:
        """What the checkpoint holds."""
        return frozenset(self.reader.names()) if self.reader is not None else frozenset()

    def weight(self, name: str) -> Tensor:
        """A weight of the checkpoint, in fp32."""
        assert self.reader is not None
        return self.reader.weight(name)

    def open_streamed(self, device: torch.device) -> VLM:
        """The model on `device`; its weights come as they are needed."""
        from models.build import new_parts
        from models.vlm import VLM
        from trainer.tuning import apply_plan

        encoder, model = self.vision, self.model
        width = int(encoder.width)
        with without_weights():
            vision = _like(encoder)
            language = _language(self.language.config)
            new = new_parts(model, self.facts, width, language.config, seed=0)
        vlm = VLM(vision, new.projector, language, image=self.facts.image, text=self.facts.text, future=new.future)
        if self.reader is not None:
            with without_weights():
                apply_plan(vlm, self.config.tune, seed=0)
        stream(vlm, self._fetcher(), device)
        return vlm

    def _fetcher(self) -> Any:
        held: dict[str, Tensor] = {
            f"{part}.{name}": value
            for part, module in self.whole_parts()
            for name, value in module.state_dict().items()
        }
        files, names = self.language, self.names

        def fetch(name: str, owner: nn.Module) -> Tensor:
            del owner
            if name in held:
                return held[name].float()
            if name in names:
                return self.weight(name)
            plain = name.replace(".base_layer.", ".")
            if plain in names:  # it learnt in full before it got an adapter
                return self.weight(plain)
            in_file = plain.removeprefix("language.")
            if in_file not in files and in_file == "lm_head.weight":  # tied
                return fetch("language.model.embed_tokens.weight", nn.Identity())
            return files.read(in_file).to(self.dtype).float()

        return fetch


def _like(encoder: VisionEncoder) -> VisionEncoder:
    model = type(encoder.model)(encoder.model.config)
    return VisionEncoder(
        model, feature_layer=encoder.feature_layer, num_skipped_tokens=encoder.num_skipped_tokens
    ).eval()


def _language(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()

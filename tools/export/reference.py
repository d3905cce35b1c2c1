"""The trained model with unmerged adapters, one layer in memory at a time: the reference for a merged bundle.

    base files, projector, checkpoint --> the model in training's own classes --> hidden states

The base is in 16 or 32 bit even where training held it in 4 or 8, since adapters are merged into that. Computes
in fp32, as `tools.export.stock` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.build import ModelMetadata, open_tensors
from models.common.errors import InputError
from models.common.tensors import Tensors
from models.config import ModelSource
from models.languages.base import LanguageConfig
from models.native.tower import NativeTower
from models.vision import VisionEncoder
from tools.export.streamed import stream, without_weights

if TYPE_CHECKING:
    from models.vlm import VLM
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.config.schema import StageConfig


class Base:
    """A language model before training: its configuration, and its tensors by their names, read one by one."""

    def __init__(self, config: Any, tensors: Tensors | dict[str, Tensor], where: str) -> None:
        self.config, self.where = config, where
        self._tensors = tensors

    @classmethod
    def of(cls, language: LanguageConfig) -> Base | None:
        """Read the configuration of a pretrained model, and its tensors' locations; None of one that is new."""
        tensors = open_tensors(language)
        if tensors is None:
            return None
        return cls(language.transformers_config(None), tensors, str(language.weights_directory()))

    @classmethod
    def in_memory(cls, decoder: Any) -> Base:
        """Take the weights of a randomly initialized model; a tied head is the embedding."""
        tensors = {name: value.detach() for name, value in decoder.named_parameters()}
        return cls(decoder.config, tensors, "the new decoder")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check(self, language: nn.Module) -> None:
        """Raise InputError unless the files have every weight of the model, in its shape."""
        if isinstance(self._tensors, dict):
            return
        for name, parameter in language.named_parameters():
            if name == "lm_head.weight" and name not in self._tensors:
                continue  # tied
            found, expected = list(self._tensors.shape(name)), list(parameter.shape)
            if found != expected:
                raise InputError(f"{self.where}: {name} has shape {found}, its config.json wants {expected}")

    def read(self, name: str) -> Tensor:
        """Read one tensor by its name in the language model."""
        return self._tensors[name].clone() if isinstance(self._tensors, dict) else self._tensors.read(name)


@dataclass(frozen=True)
class Trained:
    """A trained model: its parts, the stage that trained them, and the checkpoint (None: as it would start).

    `dtype` is that of the frozen weights. `vision` is the whole encoder: towers are small compared with language
    models, and their hub layouts differ too much to be read name by name. `projector` has its weights.
    """

    model: ModelSource
    config: StageConfig
    facts: ModelMetadata
    reader: CheckpointReader | None
    dtype: torch.dtype
    vision: VisionEncoder | NativeTower
    projector: nn.Module
    mtp: nn.Module | None
    language: Base

    @classmethod
    def load(
        cls,
        model: ModelSource,
        config: StageConfig,
        facts: ModelMetadata,
        reader: CheckpointReader | None,
        *,
        seed: int,
    ) -> Trained:
        """Read the encoder and make the new parts; `seed` initializes those that no checkpoint holds."""
        from models.build import new_parts
        from trainer.checkpoint.initial_weights import adapted_name
        from trainer.engine.train_step import DTYPES

        dtype = DTYPES[config.engine.precision]
        vision, pretrained = model.vision.load(dtype), Base.of(model.language)
        if pretrained is not None:
            with without_weights():
                pretrained.check(_language(pretrained.config))
        new = new_parts(model, facts, vision.width, pretrained.config if pretrained is not None else None, seed=seed)
        language = pretrained or Base.in_memory(new.decoder)
        trained = cls(model, config, facts, reader, dtype, vision, new.projector, new.mtp, language)
        for part, module in trained.whole_parts():
            for name, parameter in module.named_parameters():
                whole = (f"{part}.{name}", adapted_name(f"{part}.{name}"))
                full_name = next((each for each in whole if each in trained.names), "")
                if not full_name:
                    continue
                value = trained.weight(full_name)
                if value.shape != parameter.shape:
                    found, expected = list(value.shape), list(parameter.shape)
                    raise InputError(f"{trained.where}: {full_name} has shape {found}, the recipe's {expected}")
                parameter.data = value
        return trained

    def whole_parts(self) -> list[tuple[str, nn.Module]]:
        """The parts that are kept in memory, by their names in the model."""
        mtp = [("future", self.mtp)] if self.mtp is not None else []
        return [("vision", self.vision), ("projector", self.projector), *mtp]

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights that the checkpoint holds; none for a stage as it would start."""
        return frozenset(self.reader.names()) if self.reader is not None else frozenset()

    @property
    def where(self) -> str:
        """The checkpoint, for messages."""
        return str(self.reader.directory) if self.reader is not None else "the stage as it would start"

    def without_adapters(self) -> Trained:
        """The same model as it would be without what its language model's adapters learnt."""
        from trainer.config.tuning import Frozen

        tune = self.config.tune.model_copy(update={"language": Frozen()})
        config = self.config.model_copy(update={"tune": tune})
        return replace(self, config=config, reader=self.reader and self.reader.without("language.", ".lora_"))

    def weight(self, name: str) -> Tensor:
        """A weight of the checkpoint, in fp32."""
        assert self.reader is not None
        return self.reader.weight(name)

    def open_streamed(self, device: torch.device) -> VLM:
        """The model on `device`; its weights are loaded when they are needed."""
        from models.build import new_parts
        from models.vlm import VLM
        from trainer.config.tuning import Lora
        from trainer.engine.tuning import add_adapters

        encoder, model = self.vision, self.model
        width = int(encoder.width)
        with without_weights():
            vision = encoder.without_weights()
            language = _language(self.language.config)
            new = new_parts(model, self.facts, width, language.config, seed=0)
        vlm = VLM(vision, new.projector, language, image=self.facts.image, text=self.facts.text, mtp=new.mtp)
        vlm.requires_grad_(False)
        for part in ("vision", "projector", "language") if self.reader is not None else ():
            tuning = getattr(self.config.tune, part)
            if isinstance(tuning, Lora):
                with without_weights():
                    add_adapters(getattr(vlm, part), tuning, seed=0)
        stream(vlm, self._fetcher(), device)
        return vlm

    def _fetcher(self) -> Any:
        held: dict[str, Tensor] = {
            f"{part}.{name}": value
            for part, module in self.whole_parts()
            for name, value in module.state_dict().items()
        }
        from trainer.checkpoint.initial_weights import adapted_name

        files, names = self.language, self.names

        def fetch(name: str, owner: nn.Module) -> Tensor:
            del owner
            plain = name.replace(".base_layer.", ".")
            if plain in held:
                return held[plain].float()
            if name in names:
                return self.weight(name)
            for whole in (plain, adapted_name(plain)):
                if whole in names:  # it was fully trained before it got an adapter
                    return self.weight(whole)
            in_file = plain.removeprefix("language.")
            if in_file not in files and in_file == "lm_head.weight":  # tied
                return fetch("language.model.embed_tokens.weight", nn.Identity())
            return files.read(in_file).to(self.dtype).float()

        return fetch


def _language(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    ).eval()

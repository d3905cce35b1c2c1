"""The trained model, adapters apart, with one layer in memory at a time: what a merged bundle is compared with.

    base files, projector, checkpoint --> the model in training's own classes --> hidden states

The base is whole (16 or 32 bit) also where training held it in 4 or 8: that is what adapters are merged into. Computes
in fp32, as `tools.bundles.stock` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.build import Facts
from models.config import ModelConfig, PretrainedLanguage, TransformersVision
from models.sharded import TensorFiles
from models.source import directory_of
from models.vision import VisionEncoder
from tools.bundles.streamed import stream, without_weights

if TYPE_CHECKING:
    from models.vlm import VLM
    from trainer.checkpoint import CheckpointReader
    from trainer.config import StageConfig


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
    language: Path

    @classmethod
    def load(
        cls, model: ModelConfig, config: StageConfig, facts: Facts, reader: CheckpointReader | None, *, seed: int
    ) -> Trained:
        """Read the encoder and the projector; `seed` draws a projector that no checkpoint holds."""
        from models.projectors import build_projector
        from models.source import read_json
        from models.vision import load_vision

        assert isinstance(model.vision, TransformersVision)
        assert isinstance(model.language, PretrainedLanguage), "check_exportable has seen to that"
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        language = directory_of(model.language.path)
        vision = load_vision(model.vision, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = build_projector(
                model.projector, vision.width, int(read_json(language, "config.json")["hidden_size"])
            )
        trained = cls(model, config, facts, reader, dtype, vision, projector, language)
        for part, module in (("vision", vision), ("projector", projector)):
            for name, parameter in module.named_parameters():
                if f"{part}.{name}" in trained.names:
                    parameter.data = trained.weight(f"{part}.{name}")
        return trained

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
        from models.vlm import VLM
        from trainer.tuning import apply_plan

        encoder, model = self.vision, self.model
        width = int(encoder.width)
        with without_weights():
            vision = _like(encoder)
            language = _language(self.language)
            projector = _projector(model, width, int(language.config.hidden_size))
        vlm = VLM(vision, projector, language, image=self.facts.image, text=self.facts.text)
        if self.reader is not None:
            with without_weights():
                apply_plan(vlm, self.config.tune, seed=0)
        stream(vlm, self._fetcher(), device)
        return vlm

    def _fetcher(self) -> Any:
        held: dict[str, Tensor] = {
            f"{part}.{name}": value
            for part, module in (("vision", self.vision), ("projector", self.projector))
            for name, value in module.state_dict().items()
        }
        files, names = TensorFiles(self.language), self.names

        def fetch(name: str, owner: nn.Module) -> Tensor:
            del owner
            if name in held:
                return held[name].float()
            if name in names:
                return self.weight(name)
            in_file = name.removeprefix("language.").replace(".base_layer.", ".")
            if in_file not in files and in_file == "lm_head.weight":  # tied
                return fetch("language.model.embed_tokens.weight", nn.Identity())
            return files.read(in_file).to(self.dtype).float()

        return fetch


def _like(encoder: VisionEncoder) -> VisionEncoder:
    model = type(encoder.model)(encoder.model.config)
    return VisionEncoder(
        model, feature_layer=encoder.feature_layer, num_skipped_tokens=encoder.num_skipped_tokens
    ).eval()


def _projector(model: ModelConfig, vision_width: int, language_width: int) -> nn.Module:
    from models.projectors import build_projector

    return build_projector(model.projector, vision_width, language_width)


def _language(directory: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()

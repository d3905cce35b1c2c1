"""The ordinary way to train the same model: stock modules, rows padded to the longest, all logits, AdamW.

    Dinov2Model (every layer) -> projector -> LlamaForCausalLM (with peft's adapters) -> its own loss -> AdamW

Frozen weights are in the stage's dtype and learnt ones in fp32 under autocast, as in ours. `OrdinaryLoop` is a plain
loop, `TrainerLoop` transformers' Trainer over the same module. Owns the peer of `tools.dev.bench.train`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.sample import Encoded
from models.spec import CLIP_MEAN, CLIP_STD, IGNORE_INDEX
from trainer.config.tuning import Lora

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP_NORM = 1.0


class OrdinaryModel(nn.Module):
    """Vision tower, projector and language model; the projector learns, and adapters where `lora` says which."""

    def __init__(
        self,
        vision: Any,
        projector: nn.Module,
        language: Any,
        *,
        feature_layer: int,
        image_token: int,
        lora: Lora | None,
    ) -> None:
        super().__init__()
        self.vision = vision.requires_grad_(False).eval()
        self.projector = projector
        self.language = language.requires_grad_(False)
        if lora is not None:
            from peft import LoraConfig, get_peft_model

            self.language = get_peft_model(
                language,
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=int(lora.alpha),
                    lora_dropout=lora.dropout,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
        self.feature_layer, self.image_token = feature_layer, image_token

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """The mean loss of rows [B, L] with their pictures [B, 3, S, S]."""
        with torch.no_grad():
            states = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states
        image = self.projector(states[self.feature_layer][:, 1:])
        embedded = self.language.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.image_token).unsqueeze(-1)
        embedded = embedded.masked_scatter(is_image, image.to(embedded.dtype))
        found = self.language(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels, use_cache=False)
        return {"loss": found.loss}


def padded(samples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows padded at their end to the longest, and their normalised pictures."""
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length], mask[row, :length] = torch.from_numpy(sample.input_ids.astype(np.int64)), 1
        labels[row, :length] = torch.from_numpy(sample.labels.astype(np.int64))
    pixels = torch.from_numpy(np.concatenate([sample.tiles for sample in samples])).float() / 255.0
    pixels = ((pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixels": pixels}


class OrdinaryLoop:
    """A loop as one writes it."""

    def __init__(self, model: OrdinaryModel, precision: str, device: torch.device) -> None:
        self._model, self._dtype, self._device = model.to(device).train(), PRECISIONS[precision], device
        self._model.vision.eval()
        self._learning = [value for value in model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(self._learning, lr=1e-3)

    def step(self, samples: Sequence[Encoded]) -> float:
        """One update over these samples as one batch; the loss before it."""
        batch = {name: value.to(self._device) for name, value in padded(samples).items()}
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            loss = self._model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learning, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


class TrainerLoop:
    """transformers' Trainer; what it does before its first step is not counted."""

    def __init__(self, model: OrdinaryModel, precision: str, device: torch.device) -> None:
        self._model, self._precision, self._device = model, precision, device

    def seconds(self, samples: Sequence[Encoded], num_steps: int) -> float:
        """Of one step over these samples as one batch, the mean of `num_steps` after a first one."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        ends: list[float] = []
        device = self._device

        class Clock(TrainerCallback):
            def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ends.append(time.perf_counter() if device.type == "cuda" else time.process_time())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=num_steps + 1,
                per_device_train_batch_size=len(samples),
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                max_grad_norm=CLIP_NORM,
                bf16=self._precision == "bf16",
                use_cpu=device.type == "cpu",
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            data: Any = list(samples)
            Trainer(self._model, arguments, train_dataset=data, data_collator=padded, callbacks=[Clock()]).train()
        return (ends[-1] - ends[0]) / num_steps

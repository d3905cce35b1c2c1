"""What an adapter's tensors are called in adapter_model.safetensors, by their names in a checkpoint.

    language.model.layers.0.self_attn.q_proj.lora_A.default.weight
        --> base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight   in a whole model
    vision.model.encoder.layers.0.mlp.fc1.lora_B.default.weight
        --> base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_B.weight
    projector.linear_1.weight
        --> base_model.model.model.multi_modal_projector.linear_1.weight                    one of `modules_to_save`
    projector.merger.mlp.0.weight
        --> base_model.model.model.visual.merger.mlp.0.weight                               at native resolution

Modules of a whole model have the names that transformers 5 gives Llava's and Qwen-VL's; source: peft's
`get_peft_model_state_dict`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ROOT = "base_model.model."


class Modules(NamedTuple):
    """Where a whole model of transformers has the modules of a part of ours."""

    language: str = "model.language_model."
    vision: str = "model.vision_tower."
    projector: str = "model.multi_modal_projector."


SQUARES = Modules()
NATIVE = Modules(vision="model.visual.", projector="model.visual.")

_SAVED = re.compile(r"multi_modal_projector|visual\.merger|visual\.deepstack_merger_list\.\d+")
"""A projector's modules that peft saves as they are: of a list each by itself, since a list computes nothing."""


def peft_name(name: str, modules: Modules | None) -> str:
    """A checkpoint's name of a weight -> its name in adapter_model.safetensors.

    Args:
        modules: those of the whole model that the adapter is over; None: it is over a language model.
    """
    part, _, plain = name.partition(".")
    plain = plain.replace(".default.weight", ".weight").removesuffix(".default")
    plain = plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    if modules is not None and (part == "projector" or plain.startswith("model.")):
        prefix: str = getattr(modules, part)
        plain = prefix + plain.removeprefix("model.")
    return ROOT + plain


def is_saved(name: str) -> bool:
    """Whether a weight that was trained in full has a place in an adapter over a published model.

    The projector as a whole has one; `image_newline` is a parameter of the model, and peft saves modules.
    """
    return name.startswith("projector.") and not name.startswith("projector.newline.")


def saved_module(peft_name: str) -> str:
    """The word of `modules_to_save` for a weight of the projector, by its name in adapter_model.safetensors."""
    found = _SAVED.search(peft_name)
    assert found is not None, peft_name  # `is_saved`
    return found[0]

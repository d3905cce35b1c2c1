"""What an adapter's tensors are called in adapter_model.safetensors, by their names in a checkpoint.

    language.model.layers.0.self_attn.q_proj.lora_A.default.weight
        --> base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight   in a whole model
    vision.model.encoder.layers.0.mlp.fc1.lora_B.default.weight
        --> base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_B.weight
    projector.linear_1.weight
        --> base_model.model.model.multi_modal_projector.linear_1.weight                    one of `modules_to_save`

Modules of a whole model have the names that transformers 5 gives Llava's; source: peft's `get_peft_model_state_dict`.
"""

from __future__ import annotations

ROOT = "base_model.model."
PROJECTOR = "multi_modal_projector"
PARTS = {
    "language": "model.language_model.",
    "vision": "model.vision_tower.",
    "projector": f"model.{PROJECTOR}.",
}
"""A part of ours -> where its modules are in a whole model."""


def peft_name(name: str, *, is_whole_model: bool) -> str:
    """A checkpoint's name of a weight -> its name in adapter_model.safetensors."""
    part, _, plain = name.partition(".")
    plain = plain.replace(".default.weight", ".weight").removesuffix(".default")
    plain = plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    if is_whole_model and (part == "projector" or plain.startswith("model.")):
        plain = PARTS[part] + plain.removeprefix("model.")
    return ROOT + plain


def is_saved(name: str) -> bool:
    """Whether a weight that was trained in full has a place in an adapter over a published model.

    The projector as a whole has one; `image_newline` is a parameter of the model, and peft saves modules.
    """
    return name.startswith("projector.") and not name.startswith("projector.newline.")

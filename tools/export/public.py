"""What may leave this machine: documents without the paths of the machine that made them, and what other programs have
no class for.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from models.common.errors import InputError


def without_paths(value: Any) -> Any:
    """The same JSON value; an absolute path in it becomes its last part."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
        return PurePosixPath(value).name
    return value


def check_stock(config: Any, directory: Path, format_name: str) -> None:
    """Raise InputError for a bundle whose class only this project has."""
    from models.registered import OWN_CONFIGS

    if not isinstance(config, OWN_CONFIGS):
        return
    parts = []
    if config.projector is not None:
        parts.append(f"the projector {config.projector.get('kind')!r}")
    if getattr(config, "future", None):
        parts.append("heads for further tokens")
    if config.text_config.model_type.startswith("sightline"):
        parts.append("the decoder from scratch")
    if getattr(config, "num_register_tokens", None):
        parts.append(f"the registers of its {config.vision_config.model_type} tower")
    name = (config.architectures or [type(config).__name__])[0]
    raise InputError(
        f"{directory}: {name} cannot be exported to {format_name}: no other program computes"
        f" {' and '.join(parts) or 'its parts'}; `sightline.load` opens the bundle as it is, and a model whose"
        " projector is mlp or linear, over a tower without registers, can be exported"
    )

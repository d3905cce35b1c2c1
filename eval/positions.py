"""Which positions a model counts. Owns the refusal of those that are not counted here."""

from __future__ import annotations

from typing import Any

from models.common.errors import InputError


def check_positions(model: Any) -> None:
    """Raise InputError where a token's position is its row and column in an image (M-RoPE)."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise InputError(
            f"{type(model).__name__}: its positions by row and column (M-RoPE) are not counted here, so that it does"
            " not answer; open the merged directory with its own class in transformers, or with vLLM"
        )

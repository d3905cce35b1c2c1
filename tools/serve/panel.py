"""The facts about a bundle, as the page shows them.

Owns HTML for the header and the panel. Everything that comes from a manifest is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from statistics import median

from eval.predictor import Predictor
from models.bundle import Check, Manifest

_MARK = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="#6366f1" stroke-width="1.8" aria-hidden="true">'
    '<path d="M2 12c3-5 6.5-7.5 10-7.5S19 7 22 12c-3 5-6.5 7.500-10 7.500S5 17 2 12z"/>'
    '<circle cx="12" cy="12" r="3"/><path d="M12 1v3M12 20v3"/></svg>'
)


def header(predictor: Predictor) -> str:
    """The page's title, and the bundle's name."""
    manifest = predictor.manifest
    chips = [_recipe(manifest), manifest.precision] if manifest else []
    marks = "".join(f'<span class="chip">{escape(chip)}</span>' for chip in [*chips, str(predictor.device)])
    return f'<header class="sightline">{_MARK}<h1>Sightline</h1><div class="chips">{marks}</div></header>'


def facts(predictor: Predictor, speeds: Sequence[float] = ()) -> str:
    """The table of what the bundle is, how fast it was (`speeds`, tokens/s) and its parity with its source."""
    rows = [*_facts(predictor), ("Speed", _speed(speeds))]
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{table}</table>{_parity(predictor.manifest)}'


def notice(text: str) -> str:
    """A one-line error message, visible and announced to screen readers."""
    return f'<p class="notice" role="alert">{escape(text)}</p>' if text else ""


def status(text: str) -> str:
    """The line under the chat."""
    return f'<p class="status" role="status">{escape(text)}</p>' if text else ""


def _facts(predictor: Predictor) -> Iterator[tuple[str, str]]:
    config, manifest = predictor.model.config, predictor.manifest
    if manifest:
        yield "Recipe", _recipe(manifest)
        yield "Precision", manifest.precision
    vision, language = getattr(config, "vision_config", None), config.get_text_config()
    if vision is not None:
        yield "Vision", f"{vision.model_type}, {vision.image_size} px, patch {vision.patch_size}"
    yield "Language", f"{language.model_type}, {language.num_hidden_layers} layers of {language.hidden_size}"
    yield "Parameters", _count(predictor.model.num_parameters())
    yield "Context", f"{language.max_position_embeddings:,} tokens"
    yield "Device", str(predictor.device)


def _parity(manifest: Manifest | None) -> str:
    if manifest is None:
        return ""
    rows = "".join(_check(check) for check in manifest.parity.checks)
    reference = escape(manifest.parity.reference)
    return f'<table class="facts parity"><caption>Parity with {reference}</caption>{rows}</table>'


def _check(check: Check) -> str:
    name = escape(check.name[:1].upper() + check.name[1:])
    note = f'<span class="bound">{escape(check.note)}</span>' if check.note else ""
    if check.bound is None:
        return f"<tr><th>{name}</th><td>{note or f'{check.value:.3g}'}</td></tr>"
    mark = '<span class="passed">✓</span>' if check.passed else '<span class="failed">✗</span>'
    bound = f'<span class="bound">bound {check.bound:.3g}</span>'
    return f"<tr><th>{name}</th><td>{check.value:.3g} {mark}{bound}{note}</td></tr>"


def _recipe(manifest: Manifest) -> str:
    return " / ".join(str(manifest.recipe[key]) for key in ("name", "stage") if key in manifest.recipe)


def _speed(speeds: Sequence[float]) -> str:
    if not speeds:
        return "measured with the first answer"
    answers = "1 answer" if len(speeds) == 1 else f"median of {len(speeds)} answers"
    return f"{median(speeds):.1f} tokens/s ({answers})"


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

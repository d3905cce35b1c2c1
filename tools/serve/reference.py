"""The page /docs: every address with its fields, out of the app's own OpenAPI description.

One page without scripts, styles or pictures from elsewhere, so that it opens where there is no internet; FastAPI's own
pages load Swagger's from a CDN. Programs read /openapi.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}"
    "code{font-family:ui-monospace,monospace}"
)


def reference_page(description: Mapping[str, Any], openapi_url: str) -> str:
    """The page, from an OpenAPI description."""
    title = escape(f"{description['info']['title']} {description['info']['version']}")
    sections = "".join(
        _section(path, method, operation)
        for path, operations in description["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{escape(description['info'].get('description', ''))} "
        f'For programs: <a href="{escape(openapi_url)}">openapi.json</a>.</p>{sections}</html>'
    )


def _section(path: str, method: str, operation: Mapping[str, Any]) -> str:
    text = f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content.get("schema", {})
        needed = schema.get("required", ())
        rows = "".join(_row(name, field, name in needed) for name, field in schema.get("properties", {}).items())
        text += f"<p>Body: <code>{escape(kind)}</code></p>{_table(rows)}"
    rows = "".join(
        _row(each["name"], each.get("schema", {}), each.get("required", False))
        for each in operation.get("parameters", ())
    )
    return text + (_table(rows) if rows else "")


def _table(rows: str) -> str:
    return f"<table><tr><th>field<th>type<th>needed</tr>{rows}</table>"


def _row(name: str, field: Mapping[str, Any], is_needed: bool) -> str:
    kinds = escape(" or ".join(dict.fromkeys(_kinds(field))))
    return f"<tr><td><code>{escape(name)}</code><td>{kinds}<td>{'yes' if is_needed else ''}</tr>"


def _kinds(field: Mapping[str, Any]) -> Iterator[str]:
    for each in field.get("anyOf", ()):
        yield from _kinds(each)
    if "$ref" in field:
        yield str(field["$ref"]).rpartition("/")[2]
    elif field.get("type") == "array":
        yield f"list of {' or '.join(dict.fromkeys(_kinds(field.get('items', {})))) or 'anything'}"
    elif "type" in field:
        bounds = [f"{word} {field[key]:g}" for key, word in _BOUNDS.items() if isinstance(field.get(key), int | float)]
        yield " ".join([str(field["type"]), *bounds])
    elif "oneOf" in field:
        yield " or ".join(kind for each in field["oneOf"] for kind in _kinds(each))


_BOUNDS = {"minimum": "from", "maximum": "to", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}

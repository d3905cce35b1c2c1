"""Settings of the documentation, which `make docs` builds into build/docs with warnings as errors.

The pages are Markdown (MyST). The reference is made from the docstrings, which are written for readers of the code:
Google's sections, pictures indented by four, names in single backticks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sightline_packages import VERSION  # noqa: E402

project = "Sightline"
author = "The Sightline maintainers"
copyright = "2026, the Sightline maintainers"
release = version = VERSION

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.apidoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["reference/*/modules.rst"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block"]
# ref.python: a field of several classes is named in a docstring, where napoleon looks for a type.
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure", "ref.python"]

default_role = "code"  # single backticks in docstrings are code, as in Markdown
# gradio: pydantic refuses the reload in which Sphinx sets TYPE_CHECKING. lmms_eval: has an environment of its own.
autodoc_mock_imports = ["gradio", "lmms_eval"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_include_init_with_doc = False

INTERNAL = ("dev", "examples", "serve")
"""Packages of tools/ that are for this project's developers, and the server: a running one describes its addresses at
/docs, and pydantic refuses the reload in which Sphinx sets TYPE_CHECKING."""

apidoc_separate_modules = False
apidoc_module_first = True
apidoc_no_headings = False
apidoc_modules: list[dict[str, Any]] = [
    {
        "path": f"../{package}",
        "destination": f"reference/{package}",
        "exclude_patterns": [f"../{package}/{name}/**" for name in INTERNAL] if package == "tools" else [],
        "separate_modules": False,
        "module_first": True,
    }
    for package in ("models", "data_pipeline", "trainer", "eval", "tools")
]

toc_object_entries = False  # the sidebar is made for each page: with every function in it that takes minutes
html_theme = "furo"
html_title = f"Sightline {VERSION}"
linkcheck_timeout = 20
linkcheck_retries = 2


def keep_pictures(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:  # noqa: PLR0917 (Sphinx's)
    """Make a literal block of each picture in a docstring, and escape what reST would read in the rest of it.

    A picture is indented by four behind an empty line; Google's sections are indented too, but right below their
    heading. A Markdown table is shown as it is written.
    """
    kept: list[str] = []
    in_picture = False
    for number, line in enumerate(lines):
        is_drawn = line.startswith(("    ", "| "))
        if is_drawn and not in_picture and not lines[number - 1].strip():
            kept += ["::", ""]
            in_picture = True
        elif line.strip() and not is_drawn:
            if in_picture and kept[-1].strip():
                kept.append("")
            in_picture = False
        kept.append(f"    {line}" if line.startswith("| ") else line if in_picture else escape(line))
    lines[:] = kept


def escape(line: str) -> str:
    """No substitutions between bars, and `Name`s may be followed by a letter."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    parts[2::2] = [rf"\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]
    return "".join(parts)


def setup(app: Sphinx) -> None:
    """Before napoleon, which reads sections (its priority is 500)."""
    app.connect("autodoc-process-docstring", keep_pictures, priority=400)

"""Installs a package as pip would, without pip: its files and its entry points in a directory of the import path."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent / "outside_package" / "outside_parts"
POINTS = {
    "sightline.projectors": {"gated": "outside_parts.gated:GatedProjector"},
    "sightline.objectives": {"focal": "outside_parts.focal:Focal"},
}


def write_entry_points(site: Path, distribution: str, points: Mapping[str, Mapping[str, str]]) -> None:
    """A package's metadata, as in an environment's site-packages."""
    folder = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [
        line
        for group, targets in points.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in targets.items()), "")
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def install_outside_parts(site: Path) -> Path:
    """The package of `outside_package`, in `site`, which a process then has on its import path."""
    write_entry_points(site, "outside-parts", POINTS)
    shutil.copytree(PACKAGE, site / PACKAGE.name)
    return site

"""`python -m tools.bench.data`, `.step`, …: the modules of `tools.dev.bench` under the names in the docs."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "dev" / "bench")]

"""Preflight's output: facts and tables as they are found, faults at the end with the exit code.

Owns only the layout. A fault is a reason not to queue the job; unchecked items are always listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Report:
    """Collects findings, and prints them at once."""

    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def title(self, text: str) -> None:
        """Begin a section."""
        print(f"\n{text}", flush=True)

    def fact(self, text: str) -> None:
        """Print a finding that does not prevent a start."""
        print(f"  {text}", flush=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Rows of cells, the first column to the left, the others to the right."""
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            print(f"  {row[0].ljust(widths[0])}  {'  '.join(cells)}", flush=True)

    def fault(self, text: str) -> None:
        """Record a reason not to start; repeated ones are dropped."""
        if text not in self.faults:
            self.faults.append(text)

    def leave_out(self, text: str) -> None:
        """Record what could not be checked on this machine, and why."""
        self.unchecked.append(text)

    def close(self) -> int:
        """Print faults and unchecked items; returns the exit code."""
        if self.unchecked:
            self.title("not checked")
            for text in self.unchecked:
                self.fact(text)
        fine = f"no fault in what was checked; {len(self.unchecked)} of the checks could not be made here, see above"
        self.title("faults" if self.faults else fine if self.unchecked else "nothing stands in the way")
        for text in self.faults:
            self.fact(text)
        return 1 if self.faults else 0


def gigabytes(num_bytes: float) -> str:
    """In GB of 1e9 bytes, or in MB of 1e6 below a tenth of one."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def millions(count: int) -> str:
    """A number of parameters, exact, and in millions."""
    return f"{count:,} ({count / 1e6:.1f}M)"

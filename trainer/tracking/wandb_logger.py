"""Weights & Biases, which is a copy: the JSONL files are the truth, and what it missed is sent from them later.

RUN/STAGE/wandb.json    the run's id, the last step that was sent of each channel, and what run they are of

server there    -> what the JSONL files have beyond the last step sent -> every step as it comes
server away     -> a warning; training goes on; a thread tries again now and then, and so does the next start
away to the end -> an offline copy of everything that was not sent, for `wandb sync`
a wrong key     -> the only thing that asks the user to log in, and ends the start
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import TypedDict

from models.common.documents import read_as
from models.common.errors import InputError, single_line
from models.common.files import read_lines, write_json
from trainer.config.schema import WandbConfig
from trainer.tracking.loggers import Histogram, Metrics
from trainer.validation.answers_page import Answered, caption_of

logger = logging.getLogger(__name__)

RETRY_S = 300.0
"""Between two tries to reach a server that was away."""

INIT_TIMEOUT_S = 30.0
"""How long the start waits for the server; wandb's own limit is 90 s."""

_FILES = {"metrics": "metrics.jsonl", "validation": "validation.jsonl"}
"""Channels that a JSONL file holds, by their names in wandb.json."""

_KEY_FAULT = re.compile(r"\b40[13]\b|unauthori[sz]ed|permission denied|not logged in|api[_ ]key", re.I)
"""How the server, or wandb before it asks, says that it does not know this user: its errors have no kinds for it."""

_AWAY = re.compile(
    r"connection|timed? ?out|deadline|unreachable|no such host|resolv|cannot be reached|\b5\d\d\b|EOF|TLS|proxy", re.I
)


class WandbAwayError(Exception):
    """The server, or wandb's own service, did not answer; the message is one line."""


@dataclass(frozen=True)
class Account:
    """Begins a wandb run, online or offline, always the same one of a stage."""

    directory: Path
    config: WandbConfig
    title: str
    recipe: dict[str, Any]

    def begin(self, run_id: str, mode: Literal["online", "offline"]) -> Any:
        """wandb's run.

        Raises:
            InputError: wandb does not let this user in, or refuses the settings.
            WandbAwayError: it cannot be reached.
        """
        try:
            import wandb
        except ImportError as error:
            raise InputError(f"tracking.wandb: {single_line(error)}; pip install wandb, or leave it out") from error
        try:
            return wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                mode=mode,
                dir=str(self.directory),
                name=self.title,
                id=run_id,
                resume="allow",
                config=self.recipe,
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S),
            )
        except Exception as error:
            with suppress(Exception):
                wandb.teardown()  # its service would call the id of a run that could not begin "in use" ever after
            raise _told(error) from error


def _told(error: Exception) -> InputError | WandbAwayError:
    """What an error of wandb means. Its AuthenticationError also stands for a server that could not be asked."""
    import wandb

    line = single_line(error)
    is_refused = isinstance(error, wandb.errors.AuthenticationError) or _KEY_FAULT.search(line) is not None
    if is_refused and _AWAY.search(line) is None:
        return InputError(f"tracking.wandb: {line}; log in with `wandb login`, or set mode: offline")
    if isinstance(error, wandb.errors.UsageError):
        return InputError(f"tracking.wandb: {line}")
    return WandbAwayError(line)


class WandbLogger:
    """A step that was sent before a kill is not sent again: wandb keeps what it was told first."""

    def __init__(self, account: Account, run_id: str, sent: dict[str, int], digest: str) -> None:
        self._account, self._id, self._sent, self._digest = account, run_id, sent, digest
        self._run: Any = None
        self._arrived: Any = None
        """A run that the thread has begun, for the main thread to take."""
        self._is_closed = threading.Event()
        self._beginning = threading.Lock()
        """Held where a run begins: wandb takes an id once at a time."""

    @classmethod
    def open(
        cls, directory: Path, config: WandbConfig, title: str, recipe: dict[str, Any], resumed_at: int
    ) -> WandbLogger:
        """Begin the run, or go on with the one whose id lies in RUN/STAGE/wandb.json.

        A start from step 0 with another recipe begins another run: what wandb was told before is of other numbers.

        Raises:
            InputError: wandb does not let this user in.
        """
        file = directory / "wandb.json"
        kept = _read(file)
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        if resumed_at == 0 and kept.get("recipe", digest) != digest:
            kept = {}
        account = Account(directory, config, title, recipe)
        opened = cls(account, kept.get("id") or secrets.token_hex(4), kept.get("sent", {}), digest)
        opened._keep()
        try:
            opened._take(account.begin(opened._id, config.mode))
        except WandbAwayError as error:
            logger.warning(
                f"tracking.wandb: {error}; training goes on, the JSONL files are complete, and wandb is sent later"
            )
            threading.Thread(target=opened._try_again, name="wandb", daemon=True).start()
        return opened

    def log(self, step: int, metrics: Metrics, channel: str) -> None:
        """See `MetricsLogger`."""
        self._send(step, metrics, channel)

    def log_answers(self, step: int, answers: Sequence[Answered]) -> None:
        """See `MetricsLogger`."""
        import wandb

        images = [wandb.Image(each.example.image, caption=caption_of(each)) for each in answers]
        self._send(step, {"validation/answers": images}, "answers")

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See `MetricsLogger`."""
        import wandb

        shown = {
            name: wandb.Histogram(np_histogram=(np.asarray(value.counts), np.asarray(value.edges)))
            for name, value in histograms.items()
        }
        self._send(step, shown, "histograms")

    def log_page(self, step: int, name: str, file: Path) -> None:
        """See `MetricsLogger`."""
        import wandb

        self._send(step, {name: wandb.Html(file.read_text(encoding="utf-8"))}, name)

    def close(self) -> None:
        """See `MetricsLogger`; what no server has taken is left as an offline run."""
        self._is_closed.set()
        with self._beginning:
            self._take(self._arrived)
            if self._run is None:
                self._leave_offline()
            else:
                self._run.finish()

    def _leave_offline(self) -> None:
        """wandb.json goes on to say what the server has: a start that goes on sends the rest by itself."""
        if not any(True for _ in self._missing()):
            return
        run = self._account.begin(self._id, "offline")
        for step, values, _ in self._missing():
            run.log(values, step=step)
        folder = Path(run.dir).parent
        run.finish()
        logger.warning(f"tracking.wandb: the server was away to the end; `wandb sync {folder}` sends this stage")

    def _try_again(self) -> None:
        """Thread: until the server is there, the user is refused or the log is closed."""
        while not self._is_closed.wait(RETRY_S):
            try:
                with self._beginning:
                    if not self._is_closed.is_set():
                        self._arrived = self._account.begin(self._id, self._account.config.mode)
                return
            except WandbAwayError:
                continue
            except InputError as error:
                logger.warning(f"{error}; the JSONL files are complete")
                return

    def _take(self, run: Any) -> None:
        """Go on with a run that has begun, after what it missed."""
        if run is None or self._run is not None:
            return
        self._run = run
        for step, values, channel in self._missing():
            self._send(step, values, channel)

    def _missing(self) -> Iterator[tuple[int, dict[str, Any], str]]:
        """(step, values, channel) of the JSONL lines that were not sent, by rising steps."""
        lines = [
            (int(line["step"]), {name: value for name, value in line.items() if name != "step"}, channel)
            for channel, name in _FILES.items()
            for line in read_lines(self._account.directory / name)
            if isinstance(line, dict) and line.get("step", -1) > self._sent.get(channel, -1)
        ]
        yield from sorted(lines, key=lambda line: line[0])

    def _send(self, step: int, values: Mapping[str, Any], channel: str) -> None:
        if self._run is None:
            self._take(self._arrived)
        if self._run is None or step <= self._sent.get(channel, -1):
            return
        self._run.log(dict(values), step=step)
        self._sent[channel] = step
        self._keep()

    def _keep(self) -> None:
        write_json(self._account.directory / "wandb.json", {"id": self._id, "sent": self._sent, "recipe": self._digest})


class _Kept(TypedDict, total=False):
    """wandb.json."""

    id: str
    sent: dict[str, int]
    recipe: str


def _read(file: Path) -> dict[str, Any]:
    """What an earlier start has kept; nothing where it cannot be read, which begins another run."""
    try:
        return dict(read_as(file, _Kept))
    except (OSError, InputError):
        return {}

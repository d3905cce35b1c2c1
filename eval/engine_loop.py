"""The engine's thread: everything that touches the model, in turns.

    drop cancelled -> admit newcomers -> join -> one step of all rows -> leave -> the callers' events

Requests are admitted first come, first served, as long as the keys and values that all running rows may come to need
fit into their budget; so no row is ever put back. Owns admission, and what happens after an error. Does not own how
rows are answered together (`eval.batch`), the queue (`eval.waiting`) nor what callers see (`eval.engine`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from eval.batch import Batch, Pieces, Row
from eval.decoding import Decoding
from eval.generation import evaluating
from eval.kv_cache import DynamicKVCache, KVCache
from eval.predictor import Predictor
from eval.prompts import Prompt
from eval.requests import EngineDead, EngineLimits, Request
from eval.static_cache import StaticKVCache
from eval.waiting import BROKEN, CLOSING, CLOSING_S, WaitingLine
from models.common.memory import is_out_of_memory

logger = logging.getLogger(__name__)

CUT_OFF = "the server is closing, and this answer ends before its end: ask again in a minute"
"""What an answer is told that was being written when the time after SIGTERM was over."""
MAX_FAULTS = 3
"""Steps in a row that may fail before the engine gives up."""


class EngineLoop:
    """The running rows and their requests. Only `run` may be called, and counters read, from outside.

    Args:
        total_positions: the budget of keys and values, in tokens.
        after_step: called after the events of a step.
    """

    def __init__(
        self,
        predictor: Predictor,
        limits: EngineLimits,
        line: WaitingLine,
        *,
        total_positions: int,
        after_step: Callable[[], None],
    ) -> None:
        self.running: dict[Row, Request] = {}
        self.finished = {"stop": 0, "length": 0, "cancelled": 0, "failed": 0}
        self.num_prompt_tokens = self.num_tokens = 0
        self.reader = predictor.make_reader(limits.feature_bytes, limits.chat_bytes)
        self._predictor, self._limits, self._line = predictor, limits, line
        self._total_positions, self._after_step = total_positions, after_step
        self._max_rows, self._num_faults = limits.rows, 0
        self.batch = self._new_batch()

    def run(self) -> None:
        """Answer until the line is closed, or nothing works any more."""
        try:
            with torch.no_grad(), evaluating(self._predictor.model):
                self._warm_up()
                self._line.open()
                while self._line.wait_for_work(lambda: bool(self.running)):
                    self._turn()
        except Exception:
            logger.exception("the engine has stopped")
            self._line.close(BROKEN)
        finally:
            self._line.close()
            self._end_all()

    def promised_positions(self) -> int:
        """The positions that all who run may come to need; from any thread."""
        rows = list(self.running)
        searching = sum(row.decoding.num_beams * row.need for row in rows if row.decoding.num_beams > 1)
        return searching + self.batch.cache.num_positions([row.need for row in rows if row.decoding.num_beams == 1])

    def _warm_up(self) -> None:
        """Take a step with every number of rows that has a graph of its own, so that no caller waits for its recording.

        A cache of fixed size takes its memory here.
        """
        batch = Batch(self._predictor.reader, self.batch.cache)
        size, prompt = 1, Prompt([min(self._predictor.end_ids)])
        while size <= self._limits.rows and self.batch.cache.num_positions([2] * size) <= self._total_positions:
            rows = [self._predictor.row(prompt, Decoding(max_new_tokens=2)) for _ in range(size)]
            batch.join(rows)
            batch.step()
            batch.drop(rows)
            size *= 2

    def _turn(self) -> None:
        for request in self._line.take_cancelled():
            self._end(request)
        self._leave()
        newcomers = self._line.take(self._fits)
        if newcomers:
            self._admit(newcomers)
        if self.batch.rows:
            self._step()
        self._after_step()

    def _fits(self, request: Request, taken: list[Request]) -> bool:
        """Whether a request can join now, beside those that were taken before it."""
        if request.row.decoding.num_beams > 1:
            need = request.row.decoding.num_beams * request.row.need
            return not taken and self.batch.needs() + need <= self._total_positions
        rows = [other.row for other in (*taken, request)]
        longest = max(len(row.prompt.ids) for row in rows)
        return (
            all(row.decoding.num_beams == 1 for row in rows)
            and (len(rows) <= self._limits.newcomers or not self.batch.rows)
            and len(self.batch.rows) + len(rows) <= self._max_rows
            and (len(rows) == 1 or len(rows) * longest <= self._limits.newcomer_tokens)
            and self.batch.can_join
            and self.batch.needs(rows) <= self._total_positions
        )

    def _admit(self, newcomers: list[Request]) -> None:
        rows = [request.row for request in newcomers]
        for request in newcomers:
            request.admitted()
            self.running[request.row] = request
            self.num_prompt_tokens += len(request.row.prompt.ids)
        try:
            if rows[0].decoding.num_beams > 1:
                self._search(rows[0])
                self._end(newcomers[0])
            else:
                self._publish(self.batch.join(rows))
        except Exception as error:
            self._newcomers_failed(newcomers, error)
        self._leave()

    def _search(self, row: Row) -> None:
        """Answer by beam search, while the other rows wait: the best answer is known only at the end."""
        for new in self._predictor.search([row]):
            for _, text in new:
                self._tell(self.running[row], partial(self.running[row].piece, text))
        self.num_tokens += len(row.text.ids)

    def _step(self) -> None:
        try:
            pieces = self.batch.step()
        except Exception as error:
            self._step_failed(error)
            return
        self._num_faults = 0
        self._publish(pieces)
        self._leave()

    def _leave(self) -> None:
        try:
            left = self.batch.leave()
        except Exception as error:
            self._running_fail(error)
            return
        for row in left:
            self._end(self.running[row])

    def _publish(self, pieces: Pieces) -> None:
        self.num_tokens += len(pieces)
        for row, text in pieces:
            self._tell(self.running[row], partial(self.running[row].piece, text))

    def _end(self, request: Request) -> None:
        self._tell(request, request.end)
        self.running.pop(request.row, None)
        self.finished[request.row.text.reason] += 1
        self._line.answered()

    def _fail(self, request: Request, error: Exception, retry_after_s: float | None = None) -> None:
        self._tell(request, partial(request.fail, error, retry_after_s))
        self.running.pop(request.row, None)
        self.finished["failed"] += 1

    def _tell(self, request: Request, tell: Callable[[], None]) -> None:
        """Call a caller's code; what it raises ends its own answer alone."""
        try:
            tell()
        except Exception:
            logger.exception("a caller could not take an event of its answer, which ends")
            request.cancel()

    def _newcomers_failed(self, newcomers: list[Request], error: Exception) -> None:
        """The running rows go on, for newcomers are in a cache of their own. Only memory may be there later."""
        self._report(error, f"{len(newcomers)} newcomers fail")
        is_memory = is_out_of_memory(error)
        for request in newcomers:
            self._fail(request, error, self._line.retry_after_s() if is_memory else None)
        if not is_memory and not self._works():
            self._count_fault()

    def _step_failed(self, error: Exception) -> None:
        """Memory: the newest row fails, and fewer run from now on. Anything else: all fail, and caches are dropped."""
        if not is_out_of_memory(error) or self.batch.is_torn:
            self._running_fail(error)
            return
        newest = list(self.running.values())[-1]
        self._max_rows = max(1, len(self.batch.rows) // 2)
        self._report(error, f"the newest row fails, and {self._max_rows} run together from now on")
        self._fail(newest, error, self._line.retry_after_s())
        self.batch.drop([newest.row])

    def _running_fail(self, error: Exception) -> None:
        self._report(error, f"{len(self.running)} running rows fail")
        for row, request in list(self.running.items()):
            if row.has_ended:
                self._end(request)
            else:
                self._fail(request, error)
        self._forget()
        self._count_fault()

    def _count_fault(self) -> None:
        self._num_faults += 1
        if self._num_faults >= MAX_FAULTS:
            logger.error(f"{MAX_FAULTS} steps in a row failed: nothing is answered any more")
            self._line.close(BROKEN)

    def _works(self) -> bool:
        """Whether the model can still read a token: what failed was then the newcomers' own."""
        try:
            position_bytes(self._predictor)
        except Exception:
            return False
        return True

    def _report(self, error: Exception, outcome: str) -> None:
        logger.error(f"a step of the model failed, {outcome}", exc_info=error)
        if self._predictor.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        """Drop all caches."""
        counts = self.batch.counts
        self.batch = self._new_batch()
        self.batch.counts = counts
        for memory in (self.reader.features, self.reader.chats):
            if memory is not None:
                memory.clear()

    def _end_all(self) -> None:
        why = self._line.why
        for request in list(self.running.values()):
            self._fail(request, EngineDead(CUT_OFF if why == CLOSING else why, CLOSING_S), CLOSING_S)
        for request in self._line.take_all():
            self._fail(request, EngineDead(why, CLOSING_S), CLOSING_S)
        self._forget()
        self._after_step()

    def _new_batch(self) -> Batch:
        model, device = self._predictor.model, self._predictor.device
        cache: KVCache = DynamicKVCache(model)
        if self._predictor.is_fixed:
            cache = StaticKVCache(
                model, num_rows=self._limits.rows, total_positions=self._total_positions, device=device
            )
        return Batch(self.reader, cache)


@torch.no_grad()
def position_bytes(predictor: Predictor) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    cache = DynamicKVCache(predictor.model)
    token = torch.tensor([[min(predictor.end_ids)]], device=predictor.device)
    with evaluating(predictor.model):
        cache.read({"input_ids": token, "attention_mask": torch.ones_like(token)})
    return cache.num_bytes

"""The thread that owns the engine, and what it hands to the event loop."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from kvtool.runtime.memory import give_back
from kvtool.runtime.requests import Drawn, Request, Scored
from kvtool.runtime.scheduler import Counters, Scheduler
from kvtool.server.errors import ApiError
from kvtool.server.metrics import Metrics
from kvtool.text import StopText, TextStream

_SPEED_SECONDS = 5.0  # over which tokens/s are shown
_IDLE_SECONDS = 1.0  # until freed memory goes back to the system


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer.

    Attributes:
        finish: `stop` or `length` with the last one.
        error: It ends here because something went wrong.
    """

    text: str = ""
    scored: Scored | None = None
    finish: str | None = None
    error: ApiError | None = None


class Answer:
    """A request, the text that comes of it, and where that goes.

    Attributes:
        index: Which of the choices of an HTTP request it is.
        deltas: `(index, delta)`, shared by all choices; touched by the event loop alone.
    """

    def __init__(
        self,
        request: Request,
        stops: Sequence[str],
        tokenizer: Any,
        deltas: asyncio.Queue[tuple[int, Delta]],
        index: int = 0,
    ) -> None:
        self.request, self.index, self.deltas = request, index, deltas
        self._stream, self._stops = TextStream(tokenizer), StopText(stops)
        self.last: float | None = None  # when its last token came

    def add(self, drawn: Drawn) -> Delta:
        """What is to be said after one more token."""
        token, finish = drawn.token, drawn.finish
        hidden = token is None or token in self.request.stop_ids
        text = self._stops.push("" if hidden or token is None else self._stream.push(token))
        if finish is not None and not self._stops.stopped:
            text += self._stops.push(self._stream.flush())
            text += self._stops.flush()
        return Delta(text, drawn.scored, "stop" if self._stops.stopped else finish)


@dataclass(frozen=True)
class State:
    """How things stand between two steps; sizes in bytes.

    Attributes:
        shared: Bytes of prefixes kept for later.
        stored_tokens: Of all running requests.
        bytes_per_token, native_bytes_per_token: What a further token costs, here and in the
            uncompressed cache of the same precision.
        tokens_per_second: Drawn in the last seconds.
        bandwidth: Bytes of weights and caches per second of decoding, in the last seconds.
        requests: Prompt tokens, new tokens and bytes of each running request.
    """

    running: int
    waiting: int
    used: int
    shared: int
    budget: int
    stored_tokens: int
    piece: int
    bytes_per_token: float
    native_bytes_per_token: float
    tokens_per_second: float
    bandwidth: float
    counters: Counters
    requests: list[tuple[int, int, int]]

    @property
    def share(self) -> float:
        return self.used / self.budget

    @property
    def native_bytes(self) -> float:
        """What the running requests would take without compression."""
        return self.native_bytes_per_token * self.stored_tokens

    @property
    def compression(self) -> float:
        """Uncompressed bytes over real ones, of running requests; 1 where there is none."""
        own = self.used - self.shared
        return self.native_bytes / own if own and self.native_bytes else 1.0


class Worker(threading.Thread):
    """Runs steps as long as there is something to do.

    Args:
        max_waiting: Requests that may wait for memory; more are refused.
        native_bytes_per_token: Of the uncompressed cache.
        weight_bytes: Read by every decode step.
    """

    def __init__(
        self, scheduler: Scheduler, *, model: str, max_waiting: int, native_bytes_per_token: float,
        weight_bytes: int, metric_prefixes: Sequence[str] = ("kvtool",),
    ) -> None:  # fmt: skip
        super().__init__(name="kvtool-engine", daemon=True)
        self.scheduler, self.engine = scheduler, scheduler.engine
        self.max_waiting, self._native = max_waiting, native_bytes_per_token
        self._weights = weight_bytes
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._answers: dict[Request, Answer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[Answer] = set()  # somebody waits; touched by the event loop alone
        self._stopping = False
        self._worked = True  # since memory was last given back; loading the model is work too
        self._recent: deque[tuple[float, Counters]] = deque()  # of the last seconds, oldest first
        self._state = self._look()
        self.metrics = Metrics(self, model, metric_prefixes)

    # ------------------------------------------------------------------- for the event loop

    def check_queue(self, answers: int) -> None:
        """Refuses an HTTP request for so many answers that cannot be queued.

        Raises:
            ApiError: There is no room now (429) or ever (400), or the server is shutting down or
                its engine has stopped (503).
        """
        if not self.is_alive():
            raise ApiError(503, "the engine has stopped")
        if self._stopping:
            raise ApiError(503, "the server is shutting down")
        most = self.max_waiting + self.scheduler.max_running
        if answers > most:
            message = f"{answers} answers at once are asked for, but at most {most} can be"
            raise ApiError(400, f"{message}: send fewer prompts, or a smaller n")
        if len(self._open) + answers > most:
            message = f"{len(self._open)} requests are being served or wait; no more are taken"
            raise ApiError(429, message, headers={"Retry-After": "1"})

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queues the choices of one HTTP request.

        Raises:
            ApiError: As in :meth:`check_queue`.
            UsageError, ResourceError: One of them could never run.
        """
        self.check_queue(len(answers))
        for answer in answers:
            request = answer.request
            self.scheduler.check(len(request.prompt), request.max_new_tokens)
        self._loop = asyncio.get_running_loop()
        self._open.update(answers)
        now = perf_counter()

        def add() -> None:
            # All are known before one fails: that ends the others too.
            for answer in answers:
                self._answers[answer.request] = answer
                answer.request.added = now
            for answer in answers:
                self.scheduler.add(answer.request)
                answer.request.added = now  # the scheduler knows only when the step before ended

        self._commands.put(add)

    def release(self, answers: Sequence[Answer]) -> None:
        """Nobody waits for these any more; what has not ended is free before the next step."""
        self._open.difference_update(answers)

        def cancel() -> None:
            for answer in answers:
                if self._answers.pop(answer.request, None) is not None:
                    self.scheduler.cancel(answer.request)
                    self.metrics.ended(answer.request, "abort")

        self._commands.put(cancel)

    def stop(self) -> None:
        """Takes no more requests, and ends the thread when there is nothing left to do."""
        self._stopping = True
        self._commands.put(lambda: None)

    def cut_off(self) -> None:
        """Takes no more requests, and ends those that run or wait with an error."""
        self._stopping = True
        stopped = ApiError(503, "the server was stopped before the answer was complete")
        self._commands.put(lambda: self._break_off(stopped, "abort"))

    @property
    def accepts(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive() and not self._stopping

    def state(self) -> State:
        """As of the last step, at most one step ago."""
        return self._state

    # ------------------------------------------------------------------------- the thread

    def run(self) -> None:
        try:
            self.engine.take_device()
            while not (self._stopping and self.scheduler.idle and self._commands.empty()):
                self._turn()
        except BaseException as error:
            self._end(error)

    def _turn(self) -> None:
        """A step, and what was asked for before.

        Raises:
            RuntimeError: The accelerator failed. Every later call would meet the same error, so
                only a new process helps.
        """
        try:
            self._obey()
            if not self.scheduler.idle:
                self._worked = True
                self._deliver(self.scheduler.step())
        except Exception as error:
            self._fail(error)
            if isinstance(error, torch.AcceleratorError):
                raise
            if self.engine.device.type == "cuda":
                torch.cuda.synchronize()  # raises if a kernel that torch did not start broke it
        self._state = self._look()

    def _obey(self) -> None:
        """Does what was asked for; waits for it if there is nothing else to do."""
        if self.scheduler.idle and not self._stopping:
            try:
                self._commands.get(timeout=_IDLE_SECONDS if self._worked else None)()
            except queue.Empty:
                give_back()
                self._worked = False
        while not self._commands.empty():
            self._commands.get()()

    def _deliver(self, drawn: Sequence[Drawn]) -> None:
        now = perf_counter()
        deltas = []
        for item in drawn:
            answer = self._answers[item.request]
            delta = answer.add(item)
            if item.token is not None:
                self.metrics.token(item.request, now, answer.last)
                answer.last = now
            if delta.finish is not None:
                self.scheduler.finish(item.request)
                del self._answers[item.request]
                self.metrics.ended(item.request, delta.finish)
            deltas.append((answer, delta))
        self._send(deltas)

    def _fail(self, error: Exception) -> None:
        """Ends everything that runs: nobody knows in which state its memory is."""
        self._break_off(_failure(error), "error")
        self.scheduler.forget_prefixes()

    def _break_off(self, failure: ApiError, how: str) -> None:
        answers = list(self._answers.values())
        self._answers.clear()
        for answer in answers:
            self.metrics.ended(answer.request, how)
        self._send([(answer, Delta(error=failure)) for answer in answers])
        for answer in answers:
            self.scheduler.cancel(answer.request)

    def _end(self, error: BaseException) -> None:
        """Tells everybody who waits, also for what the thread has not taken yet, that it ends."""
        self._stopping = True  # what comes later is refused, so all that came is open
        failure = _failure(error)

        def put() -> None:
            for answer in self._open:
                answer.deltas.put_nowait((answer.index, Delta(error=failure)))

        self._call(put)

    def _send(self, deltas: list[tuple[Answer, Delta]]) -> None:
        def put() -> None:
            for answer, delta in deltas:
                answer.deltas.put_nowait((answer.index, delta))

        self._call(put)

    def _call(self, function: Callable[[], None]) -> None:
        """Runs it in the event loop."""
        if self._loop is None:  # nobody has asked for anything yet
            return
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop has closed, so nobody reads any more
            self._stopping = True

    def _look(self) -> State:
        scheduler, now = self.scheduler, perf_counter()
        counters = replace(scheduler.counters)
        recent = self._recent
        if scheduler.idle:
            recent.clear()
        recent.append((now, counters))
        while len(recent) > 2 and now - recent[0][0] > _SPEED_SECONDS:
            recent.popleft()
        then, before = recent[0]
        steps = counters.decode_steps - before.decode_steps
        read = steps * self._weights + counters.cache_bytes_read - before.cache_bytes_read
        seconds = counters.decode_seconds - before.decode_seconds
        return State(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used=scheduler.used,
            shared=scheduler.shared,
            budget=scheduler.budget,
            stored_tokens=scheduler.stored_tokens,
            piece=scheduler.piece,
            bytes_per_token=scheduler.memory.bytes_per_token,
            native_bytes_per_token=self._native,
            tokens_per_second=(counters.new_tokens - before.new_tokens) / max(now - then, 1e-3),
            bandwidth=read / seconds if seconds else 0.0,
            counters=counters,
            requests=scheduler.sizes,
        )


def _failure(error: BaseException) -> ApiError:
    """What clients hear of it; all of it is said on stderr, unless that is closed."""
    with suppress(Exception):
        traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, f"the engine failed: {type(error).__name__}: {error}")

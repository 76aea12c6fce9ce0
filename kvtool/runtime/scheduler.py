"""Continuous batching: many requests share one engine and one byte budget.

Requests join and leave between steps. A step reads one piece of a prompt (or several short prompts)
and then decodes one token of every running request. Each request has a cache of its own, which
grows by pages and whose memory returns when the request ends, so admission counts what a
*compressed* sequence takes.

When a request cannot grow, prefixes kept for later go first, and then the newest request: it waits
again with the tokens it has drawn. Its prompt is read again and these tokens are fed one by one, as
they were the first time, so it goes on from the same bits.

From contiguous stores, with packed weights in float32, nothing that is computed for a request
depends on the others: linear layers add up every row alike, attention runs row by row, and prompts
are cut into pieces at fixed positions, of which only whole ones are ever shared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor

from kvtool.errors import ResourceError, UsageError
from kvtool.runtime.cache import KVCache, Snapshot
from kvtool.runtime.engine import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.prefixes import Prefix, Prefixes, Reader, Start, size
from kvtool.runtime.requests import Drawn, Finish, Request, score
from kvtool.runtime.sampling import Sampler, draw
from kvtool.runtime.stores import PAGE, whole_pages

PIECE = 128
"""Tokens of a prompt per step: a multiple of the page, small beside what the others wait for."""


@dataclass
class Counters:
    """What has happened since the start.

    Attributes:
        prefix_queries, prefix_hits: Prompt tokens that could have been shared, and that were.
        dropped_tokens: By plans, mean over heads, of requests that have ended.
        decode_steps, decode_seconds: And what they took, sampling included.
        cache_bytes_read: By these steps.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    dropped_tokens: float = 0.0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    cache_bytes_read: int = 0


@dataclass(eq=False)
class _Row:
    """A request with memory.

    Attributes:
        branch: Tokens of its prompt that others began with as well; a mark is made there.
        marks: Where others can start from, in order.
    """

    request: Request
    cache: KVCache
    nbytes: int
    branch: int
    marks: list[Snapshot] = field(default_factory=list)

    @property
    def ids(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def length(self) -> int:
        return self.cache.lengths[0]


class Scheduler:
    """Runs requests on an engine, whose weights it packs. Not for several threads.

    Args:
        memory: Bytes that all caches together may take between two steps. While a plane grows, or
            is copied, its new form exists beside it for a moment, one layer at a time.
        max_running: Requests decoded together at most; fewer where memory has no room for the rings
            or states of so many on a GPU.
        piece: Tokens of prompts per step, and where prompts are cut.
        share_prefixes: Keep whole pieces of prompts for requests that start alike. Not where what
            a plan keeps of them depends on what comes later in a prompt. Rings, sliding windows and
            states cannot go back, and are shared from marks: copies that are made while a prompt is
            read, where it parts from another, and at its end. There are none in paged memory.

    Attributes:
        waiting: Oldest first.
        used: Bytes of all caches, as allocated.
    """

    def __init__(
        self,
        engine: Engine,
        memory: int,
        *,
        max_running: int = 64,
        piece: int = PIECE,
        share_prefixes: bool = True,
    ) -> None:
        engine.pack()
        self.engine, self.budget = engine, memory
        self.max_running, self.piece = max_running, piece
        by_marks = not engine.new_cache(1, 1).keeps_all
        alike = engine.plan is None or engine.plan.keeps_prefixes
        possible = alike and not (engine.paged and by_marks)
        self.share_prefixes = share_prefixes and possible
        self.memory = RowMemory(engine)
        most_prefixes: int | None = None
        if engine.paged:
            # As rows there are, so that no row has to be made while requests run.
            most_prefixes = 3 * max_running
            own = self.memory.constant + engine.new_pages(0, 0).table_bytes
            most = memory // (own + max(1, self.memory.holding(PAGE, PAGE) - self.memory.constant))
            if self.memory.bytes_per_token:  # rings and states leave half to what grows
                most = min(most, memory // 2 // own)
            rows = min(4 * max_running if self.share_prefixes else max_running, most - 1)
            rows = max(1, rows)  # beside the spare one
            pool = engine.open_memory(memory, rows)
            if pool.row_bytes:
                self.max_running = min(max_running, rows)
            pool.record(min(rows, max_running))
            # What rows take besides pages is there from the start, also of the spare one.
            self.budget -= pool.fixed_bytes(rows)
            self.memory.least -= pool.row_bytes
            self.memory.constant -= pool.row_bytes
        self.waiting: deque[Request] = deque()
        self.counters = Counters()
        self._reading: _Row | None = None
        self._running: list[_Row] = []  # oldest first
        self._prefixes = Prefixes(piece, by_marks=by_marks, most=most_prefixes)

    # ---------------------------------------------------------------------------- what there is

    @property
    def used(self) -> int:
        return sum(row.nbytes for row in self._rows()) + self.shared

    @property
    def shared(self) -> int:
        """Bytes of prefixes and marks that are kept for later."""
        marks = sum(size(row.marks) for row in self._rows())
        return sum(prefix.nbytes for prefix in self._prefixes) + marks

    @property
    def running(self) -> list[Request]:
        """Requests that have memory, oldest first."""
        return [row.request for row in self._rows()]

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Prompt tokens, new tokens and bytes of each running request, oldest first."""
        return [
            (len(row.request.prompt), len(row.request.tokens), row.nbytes) for row in self._rows()
        ]

    @property
    def stored_tokens(self) -> int:
        """Tokens that running requests have behind them."""
        return sum(row.length for row in self._rows())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self._running or self._reading)

    def room(self, prompt: int) -> int:
        """New tokens that a prompt of so many tokens leaves room for, in context and memory."""
        limit = self.engine.max_context
        return max(0, self.memory.most_tokens(self.budget, prompt, limit) - prompt)

    @cached_property
    def roomiest(self) -> int:
        """Tokens of the prompt behind which a sequence alone may become longest: one, or, as a plan
        may keep less of a prompt, the longest.
        """
        prompts = range(1, self.engine.max_context)
        most = max(1, bisect_left(prompts, True, key=lambda n: self.room(n) < 1))
        return max((1, most), key=lambda n: n + self.room(n))

    @property
    def longest(self) -> int:
        """Tokens that a sequence may come to alone, in the model's context and the memory."""
        return self.roomiest + self.room(self.roomiest)

    # ------------------------------------------------------------------------------- requests

    def check(self, prompt: int, new_tokens: int) -> None:
        """Refuses what could not be run even alone.

        Raises:
            UsageError: The prompt is empty, or the model has no positions for all tokens.
            ResourceError: The cache of that many tokens is larger than the budget.
        """
        if not prompt:
            raise UsageError("the prompt is empty: there is nothing to continue")
        total = prompt + new_tokens
        if total > self.engine.max_context:
            raise UsageError(
                f"{prompt} prompt tokens and {new_tokens} new ones need {total} positions, "
                f"but the model's context is {self.engine.max_context}"
            )
        most = self.memory.most_tokens(self.budget, prompt, self.engine.max_context)
        if total > most:
            needed = max(self.memory.reading(prompt), self.memory.holding(total, prompt))
            raise ResourceError(
                f"the cache of {prompt} prompt tokens and {new_tokens} new ones takes {needed:,} "
                f"bytes, but only {self.budget:,} are allowed"
            )

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue.

        Raises:
            UsageError, ResourceError: As in :meth:`check`.
        """
        self.check(len(request.prompt), request.max_new_tokens)
        request.added = perf_counter()
        own = frozenset() if request.ignore_eos else self.engine.eos_ids
        request.sampler = Sampler(
            request.sampling, request.seed, self.engine.device, prompt=len(request.prompt),
            least=request.min_new_tokens, stops=sorted(request.stop_ids | own),
            grammar=request.grammar,
        )  # fmt: skip
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forgets a request, wherever it is, and what it stored."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif (row := self._row_of(request)) is not None:
            self._drop(row)
            row.cache.release()

    def finish(self, request: Request) -> None:
        """Ends a running request; the head of its prompt may be kept."""
        row = self._row_of(request)
        if row is not None:
            self._drop(row)
            kept = self.share_prefixes and self._prefixes.keep(row.ids, row.length, row)
            if not kept:
                row.cache.release()

    def forget_prefixes(self) -> None:
        """Returns the memory of everything kept for later."""
        self._prefixes.clear()
        for row in self._rows():
            row.marks.clear()

    # ------------------------------------------------------------------------------- the step

    def step(self) -> list[Drawn]:
        """Reads a piece of a prompt or some short ones, then decodes a token of all that run."""
        first: list[Drawn] = []
        read = 0
        while read < self.piece and (row := self._admit()) is not None:
            begin = row.length
            drawn = self._read_piece(row)
            read += row.length - begin
            first += drawn
            self._end(drawn)
        self._grow()
        more = self._decode() if self._running else []
        self._end(more)
        return first + more

    def _end(self, drawn: Sequence[Drawn]) -> None:
        for item in drawn:
            if item.finish is not None:
                self.finish(item.request)

    def _admit(self) -> _Row | None:
        """The request whose prompt is read next, if any has the memory for it.

        One at a time: what a plan holds only while it reads a prompt is held once.
        """
        if self._reading is not None or not self.waiting:
            return self._reading
        request = self.waiting[0]
        prompt, nbytes = len(request.prompt), self.memory.reading(len(request.prompt))
        # One that was preempted waits for the room that it had, lest it is read in vain.
        again = max(nbytes, self.memory.holding(prompt + len(request.tokens), prompt))
        if len(self._running) >= self.max_running or not self._could_free(again):
            return None
        start = self._find_prefix(request)
        if not self._make_room(again, start.source):
            start = self._find_prefix(request)  # it had to go; who runs stays
        self.waiting.popleft()
        cache = self.engine.new_cache(1, whole_pages(prompt))
        self._reading = _Row(request, cache, nbytes, start.branch)
        if start.source is not None:
            cache.copy_prefix(start.source.cache, start.length)
        if start.mark is not None:
            cache.restore(0, start.mark)
        self._prefixes.use(start.source)
        if request.admitted is None:
            request.admitted = perf_counter()
            request.cached = start.length
            self.counters.prompt_tokens += prompt
            if self.share_prefixes and request.prompt_logprobs is None:
                self.counters.prefix_queries += prompt
                self.counters.prefix_hits += start.length
        return self._reading

    def _read_piece(self, row: _Row) -> list[Drawn]:
        request, prompt, start = row.request, row.request.prompt, row.length
        end = min(start - start % self.piece + self.piece, len(prompt))
        scores = request.prompt_logprobs is not None and not request.scored[start:]
        logits = self.engine.extend(
            row.cache, torch.tensor(prompt[start:end]), all_logits=scores, prompt=len(prompt)
        )
        ends = row.branch, self._prefixes.shareable(prompt)
        if self.share_prefixes and self._prefixes.by_marks and end in ends:
            self._mark(row)
        if scores:
            assert request.prompt_logprobs is not None
            following = prompt[start + 1 : end + 1]
            request.scored += score(logits[: len(following)], following, request.prompt_logprobs)
            logits = logits[-1]
        if end < len(prompt):
            return []
        self._reading = None
        self._running.append(row)
        row.nbytes = self.memory.holding(len(prompt), len(prompt))
        if request.max_new_tokens == 0:
            return [Drawn(request, None, None, "length")]
        if request.tokens:  # it was preempted
            return []
        return self._draw([row], logits[None])

    def _grow(self) -> None:
        """Gives every running request room for a token more, or takes all from the newest."""
        for row in list(self._running):
            length = row.length + 1
            more = self.memory.holding(length, len(row.request.prompt)) - row.nbytes
            while row in self._running and more > 0:
                if self._could_free(more):
                    self._make_room(more)
                    row.nbytes += more
                    break
                self._preempt()
            if row in self._running and length > row.cache.capacity:
                row.cache.resize(whole_pages(length))

    def _decode(self) -> list[Drawn]:
        rows, counters, begin = self._running, self.counters, perf_counter()
        last = [self._token(row, row.length) for row in rows]
        logits = self.engine.decode_rows([row.cache for row in rows], last)
        new = [i for i, row in enumerate(rows) if row.length == self._stored_by_now(row)]
        drawn = self._draw([rows[i] for i in new], logits if len(new) == len(rows) else logits[new])
        counters.decode_steps += 1
        counters.decode_seconds += perf_counter() - begin
        unread = sum(self.memory.unread(row.length) for row in rows)
        counters.cache_bytes_read += sum(row.nbytes for row in rows) - unread
        return drawn

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> list[Drawn]:
        """The next token of each row, whose logits are `[B, V]`."""
        samplers = [row.request.sampler for row in rows]
        assert all(samplers)  # since they were added
        texts = [(row.request.prompt, row.request.tokens) for row in rows]
        tokens = draw([x for x in samplers if x is not None], logits, texts)
        drawn = []
        for row, scores, sampler, token in zip(rows, logits, samplers, tokens, strict=True):
            request = row.request
            assert sampler is not None
            if not request.tokens:
                request.answered = perf_counter()
            request.tokens.append(token)
            finish: Finish | None = None
            if token in sampler.stops:
                gave_up = request.grammar is not None and request.grammar.gave_up
                finish = "length" if gave_up else "stop"
            elif len(request.tokens) == request.max_new_tokens:
                finish = "length"
            scored = None
            if request.logprobs is not None:
                (scored,) = score(scores[None], [token], request.logprobs)
            drawn.append(Drawn(request, token, scored, finish))
        self.counters.new_tokens += len(drawn)
        return drawn

    def _token(self, row: _Row, position: int) -> int:
        prompt, tokens = row.request.prompt, row.request.tokens
        return prompt[position] if position < len(prompt) else tokens[position - len(prompt)]

    def _stored_by_now(self, row: _Row) -> int:
        return len(row.request.prompt) + len(row.request.tokens)

    # --------------------------------------------------------------------------------- memory

    def _rows(self) -> list[_Row]:
        return [*self._running, *([] if self._reading is None else [self._reading])]

    def _row_of(self, request: Request) -> _Row | None:
        return next((row for row in self._rows() if row.request is request), None)

    def _could_free(self, nbytes: int) -> bool:
        """Whether so many bytes are free, but for prefixes that nobody uses."""
        return self.used - self.shared + nbytes <= self.budget

    def _make_room(self, nbytes: int, source: Reader | None = None) -> bool:
        """Lets prefixes and marks go until so many bytes are free; whether `source` is still there.

        It is the last prefix to go.
        """
        for prefix in sorted(self._prefixes, key=lambda prefix: prefix is source):
            if self.used + nbytes <= self.budget:
                break
            self._prefixes.remove(prefix)
        for row in self._rows():
            if self.used + nbytes > self.budget:
                row.marks.clear()
        return not isinstance(source, Prefix) or source in self._prefixes

    def _preempt(self) -> None:
        """Sends the newest request back to the head of the queue."""
        row = self._rows()[-1]
        self._drop(row)
        row.cache.release()
        self.waiting.appendleft(row.request)
        self.counters.preemptions += 1

    def _drop(self, row: _Row) -> None:
        self.counters.dropped_tokens += self.memory.dropped(row.length, len(row.request.prompt))
        if row is self._reading:
            self._reading = None
        else:
            self._running.remove(row)

    def _mark(self, row: _Row) -> None:
        """Keeps what a row is now for others to start from, if there is memory for it."""
        mark = row.cache.snapshot(0)
        if self._could_free(mark.nbytes):
            self._make_room(mark.nbytes)
            row.marks.append(mark)

    def _find_prefix(self, request: Request) -> Start:
        if not self.share_prefixes or request.prompt_logprobs is not None:
            return Start()
        return self._prefixes.find(request.prompt, self._running)

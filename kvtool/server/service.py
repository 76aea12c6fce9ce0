"""What the routes need: checks, tokens, answers as they come, and facts."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from kvtool import __version__
from kvtool.errors import UsageError
from kvtool.runtime.grammar import Grammar, Grammars
from kvtool.runtime.requests import Request as Asked
from kvtool.server import schema, wire
from kvtool.server.errors import ApiError, error_body
from kvtool.server.worker import Answer, Delta, Worker
from kvtool.text import check_text

Deltas = asyncio.Queue[tuple[int, Delta]]


class EventStream(StreamingResponse):
    """Server-sent events of some answers, which end when nobody listens any more."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class Service:
    """What the routes need.

    Args:
        name: Of the model, as clients ask for it.
        description: One line about it.
        defaults: What requests say that do not say it themselves; `max_tokens` is for chats alone.
    """

    def __init__(
        self, worker: Worker, name: str, description: str, defaults: schema.Generation | None = None
    ) -> None:
        self.worker, self.name, self.description = worker, name, description
        self.defaults = defaults or schema.Generation.model_validate({})
        self.engine = worker.engine
        self.tokenizer = self.engine.tokenizer
        self.names = wire.Names(self.tokenizer)
        engine = self.engine
        self.grammars = Grammars(self.tokenizer, engine.vocab_size, sorted(engine.eos_ids))
        self.created = int(time.time())
        identity = (
            self.engine.checkpoint.fingerprint(), __version__, self.engine.dtype, self.engine.device
        )  # fmt: skip
        self.fingerprint = "fp_" + hashlib.sha256(repr(identity).encode()).hexdigest()[:12]

    # ------------------------------------------------------------------------------ requests

    def check_model(self, asked: str | None) -> None:
        if asked not in (None, self.name):
            raise ApiError(404, f"there is no model '{asked}' here, only '{self.name}'", "model")

    def check_tokens(self, ids: Sequence[int], param: str) -> None:
        largest, size = max(ids, default=0), self.engine.vocab_size
        if largest >= size:
            raise ApiError(400, f"token {largest} is beyond the vocabulary of {size}", param)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the special ones that belong to it or without."""
        encoded = await asyncio.to_thread(
            self.tokenizer, check_text(text), add_special_tokens=special, verbose=False
        )
        return list(encoded["input_ids"])

    def new_tokens(self, prompt: int, asked: int | None, default: int | None) -> int:
        """Tokens to draw at most, asked for or else the default and what there is room for."""
        context, least = self.engine.max_context, 1 if asked is None else asked
        if prompt + least > context:
            raise ApiError(
                400,
                f"{prompt} prompt tokens and {least} new ones need {prompt + least} positions, "
                f"but the model's context is {context}",
                "max_tokens" if prompt < context else None,
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        room = self.worker.scheduler.room(prompt)
        if room < 1:
            # Says why: one token more than the prompt does not fit.
            self.worker.scheduler.check(prompt, 1)
        return room if default is None else min(default, room)

    def answers(
        self, body: schema.Generation, prompts: Sequence[list[int]], asked: int | None,
        default: int | None, logprobs: int | None, prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> tuple[list[Answer], Deltas]:  # fmt: skip
        """Submits every choice of every prompt, choices of a prompt together."""
        self.check_tokens(list(body.logit_bias or ()), "logit_bias")
        self.check_tokens(body.stop_token_ids or (), "stop_token_ids")
        if default is not None:
            default = max(default, body.min_tokens or 0)
        deltas: Deltas = asyncio.Queue()
        sampling = body.sampling(self.defaults)
        made: list[Answer] = []
        for ids in prompts:
            new = self.new_tokens(len(ids), asked, default)
            for choice in range(body.choices):
                request = Asked(
                    ids,
                    new,
                    sampling,
                    seed=None if body.seed is None else body.seed + choice,
                    min_new_tokens=body.min_tokens or 0,
                    stop_ids=frozenset(body.stop_token_ids or ()),
                    ignore_eos=bool(body.ignore_eos),
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    grammar=None if grammar is None else grammar.fresh(),
                )
                made.append(Answer(request, body.stops, self.tokenizer, deltas, len(made)))
        self.worker.submit(made)
        return made, deltas

    async def grammar(self, body: schema.Generation) -> Grammar | None:
        """What the answers to a request obey.

        Raises:
            ApiError: It says none that can be obeyed.
        """
        if body.obeyed is None:
            return None
        try:
            return await asyncio.to_thread(self.grammars.make, *body.obeyed)
        except UsageError as error:
            raise ApiError(400, str(error), body.obeys) from error

    async def collect(
        self, http: Request, answers: Sequence[Answer], deltas: Deltas
    ) -> list[list[Delta]]:
        """Everything that comes, by choice, unless the client leaves before it is there."""
        collected: list[list[Delta]] = [[] for _ in answers]
        listener = asyncio.create_task(_leave(http, deltas))
        try:
            async for index, delta in until_all_ended(deltas, len(answers)):
                collected[index].append(delta)
        finally:
            listener.cancel()
            self.worker.release(answers)
        return collected

    def respond(
        self, body: schema.Generation, kind: str, answers: Sequence[Answer],
        choices: list[dict[str, Any]],
    ) -> JSONResponse:  # fmt: skip
        """All choices at once, and what they took."""
        envelope = wire.Envelope(kind, self.name, self.fingerprint)
        return JSONResponse(envelope.body(choices, **self.counts(body, answers)))

    def stream(
        self, body: schema.Generation, kind: str, answers: Sequence[Answer],
        choices: AsyncIterator[dict[str, Any]],
    ) -> EventStream:  # fmt: skip
        """Parts of `choices` as events, and what they took if asked for; an error becomes the last
        one.
        """
        envelope = wire.Envelope(kind, self.name, self.fingerprint)
        more: dict[str, Any] = {"usage": None} if body.wants_usage else {}

        async def events() -> AsyncIterator[str]:
            try:
                async for choice in choices:
                    yield wire.event(envelope.body([choice], **more))
            except ApiError as error:
                yield wire.event(error_body(error.status_code, error.detail, error.param))
                return
            if body.wants_usage:
                yield wire.event(envelope.body([], **self.counts(body, answers)))
            yield wire.DONE

        return EventStream(events(), lambda: self.worker.release(answers))

    def counts(self, body: schema.Generation, answers: Sequence[Answer]) -> dict[str, Any]:
        """What an answer took, in tokens, and one with a single choice in seconds and bytes."""
        requests = [answer.request for answer in answers]
        found = {"usage": wire.usage(requests[:: body.choices], requests)}
        if len(requests) == 1:
            (request,) = requests
            stored = len(request.prompt) + max(0, len(request.tokens) - 1)
            nbytes = self.worker.scheduler.memory.holding(stored, len(request.prompt))
            found["timings"] = wire.timings(request, nbytes)
        return found

    # --------------------------------------------------------------------------------- facts

    def model_card(self) -> dict[str, Any]:
        state, engine = self.worker.state(), self.engine
        defaults = self.defaults.model_dump(exclude_none=True)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kvtool",
            "root": engine.checkpoint.source,
            "max_model_len": self.worker.scheduler.longest,
            "kvtool": {
                "cache": self.description,
                "bytes_per_token": state.bytes_per_token,
                "native_bytes_per_token": state.native_bytes_per_token,
                **({"defaults": defaults} if defaults else {}),
            },
        }

    def kv(self) -> dict[str, Any]:
        state = self.worker.state()
        return {
            "budget_bytes": state.budget,
            "used_bytes": state.used,
            "shared_prefix_bytes": state.shared,
            "bytes_per_token": state.bytes_per_token,
            "native_bytes_per_token": state.native_bytes_per_token,
            "stored_tokens": state.stored_tokens,
            "compression_ratio": state.compression,
            "tokens_per_second": state.tokens_per_second,
            "waiting": state.waiting,
            "preemptions": state.counters.preemptions,
            "running": [
                {"prompt_tokens": prompt, "new_tokens": new, "bytes": nbytes}
                for prompt, new, nbytes in state.requests
            ],
        }

    def tokenizer_info(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": self.engine.max_context,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "chat_template": tokenizer.chat_template,
        }


async def until_all_ended(deltas: Deltas, count: int) -> AsyncIterator[tuple[int, Delta]]:
    while count:
        index, delta = await deltas.get()
        if delta.error is not None:
            raise delta.error
        count -= delta.finish is not None
        yield index, delta


async def _leave(http: Request, deltas: Deltas) -> None:
    """Puts an error behind what has come, as soon as the client is gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    deltas.put_nowait((0, Delta(error=ApiError(499, "the client has gone"))))

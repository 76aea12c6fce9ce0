"""The routes."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvtool import __version__
from kvtool.errors import UsageError
from kvtool.runtime.grammar import Grammar, Grammars
from kvtool.runtime.requests import Request as Asked
from kvtool.runtime.requests import Scored
from kvtool.server import chat, errors, schema, wire
from kvtool.server.errors import ApiError, error_body
from kvtool.server.limits import Gate
from kvtool.server.page import status_page
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
    """

    def __init__(self, worker: Worker, name: str, description: str) -> None:
        self.worker, self.name, self.description = worker, name, description
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
        deltas: Deltas = asyncio.Queue()
        made: list[Answer] = []
        for ids in prompts:
            new = self.new_tokens(len(ids), asked, default)
            for choice in range(body.choices):
                request = Asked(
                    ids,
                    new,
                    body.sampling(),
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
            async for index, delta in _until_all_ended(deltas, len(answers)):
                collected[index].append(delta)
        finally:
            listener.cancel()
            self.worker.release(answers)
        return collected

    def stream(
        self, answers: Sequence[Answer], deltas: Deltas, chunks: AsyncIterator[dict[str, Any]]
    ) -> EventStream:
        """`chunks` as events; an error becomes the last one."""

        async def events() -> AsyncIterator[str]:
            try:
                async for chunk in chunks:
                    yield wire.event(chunk)
            except ApiError as error:
                yield wire.event(error_body(error.status_code, error.detail, error.param))
                return
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

    # ---------------------------------------------------------------------------------- chat

    async def chat(self, http: Request, body: schema.ChatCompletion) -> Response:
        self.check_model(body.model)
        self.worker.check_queue(body.choices)
        ids = await asyncio.to_thread(
            chat.render,
            self.tokenizer,
            body.messages,
            tools=body.offered_tools,
            options=body.chat_template_kwargs,
        )
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        grammar = await self.grammar(body)
        answers, deltas = self.answers(
            body, [ids], body.new_tokens, None, logprobs, grammar=grammar
        )
        if body.stream:
            return self.stream(answers, deltas, self._chat_chunks(body, answers, deltas))
        envelope = wire.Envelope("chat.completion", self.name, self.fingerprint)
        choices = []
        for index, parts in enumerate(await self.collect(http, answers, deltas)):
            text = "".join(part.text for part in parts)
            message: dict[str, Any] = {"role": "assistant", "content": text}
            finish = parts[-1].finish
            if body.may_call:
                tools = chat.ToolText()
                words = tools.push(text)
                rest, calls = tools.end()
                message["content"] = words + rest
                if calls:
                    message |= {"content": words or None, "tool_calls": calls}
                    finish = "tool_calls"
            scored = [part.scored for part in parts if part.scored is not None]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self.names.chat_logprobs(scored) if body.logprobs else None,
                    "finish_reason": finish,
                }
            )
        return JSONResponse(envelope.body(choices, **self.counts(body, answers)))

    async def _chat_chunks(
        self, body: schema.ChatCompletion, answers: Sequence[Answer], deltas: Deltas
    ) -> AsyncIterator[dict[str, Any]]:
        envelope = wire.Envelope("chat.completion.chunk", self.name, self.fingerprint)
        more: dict[str, Any] = {"usage": None} if body.wants_usage else {}

        def chunk(
            index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
        ) -> dict[str, Any]:
            choice = {
                "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish
            }  # fmt: skip
            return envelope.body([choice], **more)

        for answer in answers:
            yield chunk(answer.index, {"role": "assistant", "content": ""})
        tools = [chat.ToolText() for _ in answers] if body.may_call else None
        async for index, delta in _until_all_ended(deltas, len(answers)):
            text = delta.text if tools is None else tools[index].push(delta.text)
            logprobs = None
            if delta.scored is not None:
                logprobs = self.names.chat_logprobs([delta.scored])
            if text or logprobs:
                yield chunk(index, {"content": text}, logprobs=logprobs)
            if delta.finish is None:
                continue
            finish = delta.finish
            if tools is not None:
                rest, calls = tools[index].end()
                if rest:
                    yield chunk(index, {"content": rest})
                for at, call in enumerate(calls):
                    finish = "tool_calls"
                    yield chunk(index, {"tool_calls": [{"index": at, **call}]})
            yield chunk(index, {}, finish)
        if body.wants_usage:
            yield envelope.body([], **self.counts(body, answers))

    # ---------------------------------------------------------------------------------- text

    async def complete(self, http: Request, body: schema.Completion) -> Response:
        self.check_model(body.model)
        self.worker.check_queue(len(body.prompts) * body.choices)
        prompts: list[list[int]] = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                ids = await self.encode(prompt)
            else:
                self.check_tokens(prompt, "prompt")
                ids = prompt
            if not ids:
                raise ApiError(400, "the prompt is empty: there is nothing to continue", "prompt")
            prompts.append(ids)
        echoed = body.logprobs if body.echo else None
        asked, default = body.max_tokens, 16  # OpenAI's
        grammar = await self.grammar(body)
        answers, deltas = self.answers(
            body, prompts, asked, default, body.logprobs, echoed, grammar=grammar
        )
        if body.stream:
            return self.stream(answers, deltas, self._text_chunks(body, answers, deltas))
        envelope = wire.Envelope("text_completion", self.name, self.fingerprint)
        choices = []
        collected = await self.collect(http, answers, deltas)
        for answer, parts in zip(answers, collected, strict=True):
            text = (self._echo(answer) if body.echo else "") + "".join(part.text for part in parts)
            scored = [part.scored for part in parts if part.scored is not None]
            choices.append(
                {
                    "index": answer.index,
                    "text": text,
                    "logprobs": self._text_logprobs(body, answer, scored, whole=True),
                    "finish_reason": parts[-1].finish,
                }
            )
        return JSONResponse(envelope.body(choices, **self.counts(body, answers)))

    async def _text_chunks(
        self, body: schema.Completion, answers: Sequence[Answer], deltas: Deltas
    ) -> AsyncIterator[dict[str, Any]]:
        envelope = wire.Envelope("text_completion", self.name, self.fingerprint)
        more: dict[str, Any] = {"usage": None} if body.wants_usage else {}
        begun: set[int] = set()
        async for index, delta in _until_all_ended(deltas, len(answers)):
            first, text = index not in begun, delta.text
            begun.add(index)
            if body.echo and first:
                text = self._echo(answers[index]) + text
            scored = [] if delta.scored is None else [delta.scored]
            if not (text or scored or delta.finish):
                continue
            choice = {
                "index": index,
                "text": text,
                "logprobs": self._text_logprobs(body, answers[index], scored, whole=first),
                "finish_reason": delta.finish,
            }
            yield envelope.body([choice], **more)
        if body.wants_usage:
            yield envelope.body([], **self.counts(body, answers))

    def _echo(self, answer: Answer) -> str:
        ids = list(answer.request.prompt)
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _text_logprobs(
        self,
        body: schema.Completion,
        answer: Answer,
        scored: Sequence[Scored],
        whole: bool,
    ) -> dict[str, Any] | None:
        """Of some tokens, and of the prompt before them where that is echoed and they are first."""
        if body.logprobs is None:
            return None
        request = answer.request
        if not whole:
            before = [one.token for one in request.scored] if body.echo else []
            before += request.tokens[: len(request.tokens) - len(scored)]
            offset = sum(len(self.names[token]) for token in before)
            return self.names.text_logprobs(scored, body.logprobs, offset)
        prompt: list[Scored | int] = []
        if body.echo:
            prompt = [request.prompt[0], *request.scored]
        return self.names.text_logprobs([*prompt, *scored], body.logprobs)

    # --------------------------------------------------------------------------------- facts

    def model_card(self) -> dict[str, Any]:
        state, engine = self.worker.state(), self.engine
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


async def _until_all_ended(deltas: Deltas, count: int) -> AsyncIterator[tuple[int, Delta]]:
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


def create_app(service: Service, *, api_key: str | None = None, max_body: int = 8 * 2**20) -> Any:
    """The ASGI app over a worker that is started and stopped with it."""
    worker = service.worker

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)

    app = FastAPI(
        title="kvtool", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    errors.install(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request, body: schema.ChatCompletion) -> Response:
        return await service.chat(http, body)

    @app.post("/v1/completions")
    async def completions(http: Request, body: schema.Completion) -> Response:
        return await service.complete(http, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return service.model_card()

    @app.post("/load_model")
    async def load_model(body: schema.LoadModel) -> Response:
        service.check_model(body.model)
        ready = wire.event({"status": "ready", "model": service.name, "cached": True})
        return Response(ready, media_type="text/event-stream")

    @app.post("/tokenize")
    async def tokenize(body: schema.Tokenize) -> dict[str, Any]:
        if body.messages:
            ids = await asyncio.to_thread(
                chat.render, service.tokenizer, body.messages, answer=body.add_generation_prompt
            )
        else:
            ids = await service.encode(body.prompt or "", special=body.add_special_tokens)
        return {"count": len(ids), "max_model_len": worker.scheduler.longest, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(body: schema.Detokenize) -> dict[str, Any]:
        service.check_tokens(body.tokens, "tokens")
        text = service.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
        return {"prompt": text}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return service.tokenizer_info()

    @app.get("/health")
    async def health() -> Response:
        if not worker.is_alive():
            raise ApiError(503, "the engine has stopped")
        return PlainTextResponse("ok")

    @app.get("/ready")
    async def ready() -> Response:
        if not worker.accepts:
            raise ApiError(503, "the server takes no requests")
        return PlainTextResponse("ok")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/kv")
    async def kv() -> dict[str, Any]:
        return service.kv()

    @app.get("/", response_class=HTMLResponse)
    async def status() -> HTMLResponse:
        page = status_page(service.name, service.description, worker.state())
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return Gate(app, api_key, max_body)

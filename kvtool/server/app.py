"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from kvtool import __version__
from kvtool.server import chat, errors, schema, wire
from kvtool.server.chat_completions import complete_chat
from kvtool.server.completions import complete_text
from kvtool.server.errors import ApiError
from kvtool.server.limits import Gate
from kvtool.server.page import status_page
from kvtool.server.service import Service


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
        return await complete_chat(service, http, body)

    @app.post("/v1/completions")
    async def completions(http: Request, body: schema.Completion) -> Response:
        return await complete_text(service, http, body)

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

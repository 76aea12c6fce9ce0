"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from kvtool.server import chat, schema, wire
from kvtool.server.service import Deltas, Service, until_all_ended
from kvtool.server.worker import Answer


async def complete_chat(service: Service, http: Request, body: schema.ChatCompletion) -> Response:
    """The answers to a chat, at once or as they come."""
    service.check_model(body.model)
    service.worker.check_queue(body.choices)
    ids = await asyncio.to_thread(
        chat.render,
        service.tokenizer,
        body.messages,
        tools=body.offered_tools,
        options=body.chat_template_kwargs,
    )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    grammar = await service.grammar(body)
    answers, deltas = service.answers(body, [ids], body.new_tokens, None, logprobs, grammar=grammar)
    if body.stream:
        return service.stream(answers, deltas, _chunks(service, body, answers, deltas))
    envelope = wire.Envelope("chat.completion", service.name, service.fingerprint)
    choices = []
    for index, parts in enumerate(await service.collect(http, answers, deltas)):
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
                "logprobs": service.names.chat_logprobs(scored) if body.logprobs else None,
                "finish_reason": finish,
            }
        )
    return JSONResponse(envelope.body(choices, **service.counts(body, answers)))


async def _chunks(
    service: Service, body: schema.ChatCompletion, answers: Sequence[Answer], deltas: Deltas
) -> AsyncIterator[dict[str, Any]]:
    envelope = wire.Envelope("chat.completion.chunk", service.name, service.fingerprint)
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
    async for index, delta in until_all_ended(deltas, len(answers)):
        text = delta.text if tools is None else tools[index].push(delta.text)
        logprobs = None
        if delta.scored is not None:
            logprobs = service.names.chat_logprobs([delta.scored])
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
        yield envelope.body([], **service.counts(body, answers))

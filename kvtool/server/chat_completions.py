"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from kvtool.server import chat, schema
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
    asked, default = body.new_tokens, service.defaults.max_tokens
    answers, deltas = service.answers(body, [ids], asked, default, logprobs, grammar=grammar)
    if body.stream:
        coming = _parts(service, body, answers, deltas)
        return service.stream(body, "chat.completion.chunk", answers, coming)
    choices = []
    for index, parts in enumerate(await service.collect(http, answers, deltas)):
        text = "".join(one.text for one in parts)
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
        scored = [one.scored for one in parts if one.scored is not None]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": service.names.chat_logprobs(scored) if body.logprobs else None,
                "finish_reason": finish,
            }
        )
    return service.respond(body, "chat.completion", answers, choices)


async def _parts(
    service: Service, body: schema.ChatCompletion, answers: Sequence[Answer], deltas: Deltas
) -> AsyncIterator[dict[str, Any]]:
    def part(
        index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    for answer in answers:
        yield part(answer.index, {"role": "assistant", "content": ""})
    tools = [chat.ToolText() for _ in answers] if body.may_call else None
    async for index, delta in until_all_ended(deltas, len(answers)):
        text = delta.text if tools is None else tools[index].push(delta.text)
        logprobs = None
        if delta.scored is not None:
            logprobs = service.names.chat_logprobs([delta.scored])
        if text or logprobs:
            yield part(index, {"content": text}, logprobs=logprobs)
        if delta.finish is None:
            continue
        finish = delta.finish
        if tools is not None:
            rest, calls = tools[index].end()
            if rest:
                yield part(index, {"content": rest})
            for at, call in enumerate(calls):
                finish = "tool_calls"
                yield part(index, {"tool_calls": [{"index": at, **call}]})
        yield part(index, {}, finish)

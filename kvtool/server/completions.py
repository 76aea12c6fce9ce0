"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from kvtool.runtime.requests import Scored
from kvtool.server import schema
from kvtool.server.errors import ApiError
from kvtool.server.service import Deltas, Service, until_all_ended
from kvtool.server.worker import Answer

KIND = "text_completion"  # of the whole and of its parts


async def complete_text(service: Service, http: Request, body: schema.Completion) -> Response:
    """What follows some texts, at once or as it comes."""
    service.check_model(body.model)
    service.worker.check_queue(len(body.prompts) * body.choices)
    prompts: list[list[int]] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            ids = await service.encode(prompt)
        else:
            service.check_tokens(prompt, "prompt")
            ids = prompt
        if not ids:
            raise ApiError(400, "the prompt is empty: there is nothing to continue", "prompt")
        prompts.append(ids)
    echoed = body.logprobs if body.echo else None
    asked, default = body.max_tokens, 16  # OpenAI's
    grammar = await service.grammar(body)
    answers, deltas = service.answers(
        body, prompts, asked, default, body.logprobs, echoed, grammar=grammar
    )
    if body.stream:
        return service.stream(body, KIND, answers, _parts(service, body, answers, deltas))
    choices = []
    collected = await service.collect(http, answers, deltas)
    for answer, parts in zip(answers, collected, strict=True):
        text = (_echo(service, answer) if body.echo else "") + "".join(part.text for part in parts)
        scored = [part.scored for part in parts if part.scored is not None]
        choices.append(
            {
                "index": answer.index,
                "text": text,
                "logprobs": _logprobs(service, body, answer, scored, whole=True),
                "finish_reason": parts[-1].finish,
            }
        )
    return service.respond(body, KIND, answers, choices)


async def _parts(
    service: Service, body: schema.Completion, answers: Sequence[Answer], deltas: Deltas
) -> AsyncIterator[dict[str, Any]]:
    begun: set[int] = set()
    async for index, delta in until_all_ended(deltas, len(answers)):
        first, text = index not in begun, delta.text
        begun.add(index)
        if body.echo and first:
            text = _echo(service, answers[index]) + text
        scored = [] if delta.scored is None else [delta.scored]
        if not (text or scored or delta.finish):
            continue
        yield {
            "index": index,
            "text": text,
            "logprobs": _logprobs(service, body, answers[index], scored, whole=first),
            "finish_reason": delta.finish,
        }


def _echo(service: Service, answer: Answer) -> str:
    ids = list(answer.request.prompt)
    return str(service.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _logprobs(
    service: Service,
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
        offset = sum(len(service.names[token]) for token in before)
        return service.names.text_logprobs(scored, body.logprobs, offset)
    prompt: list[Scored | int] = []
    if body.echo:
        prompt = [request.prompt[0], *request.scored]
    return service.names.text_logprobs([*prompt, *scored], body.logprobs)

"""The JSON of answers, whole and as streams of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from kvtool.runtime.requests import Request, Scored

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer have in common.

    Attributes:
        kind: `chat.completion`, `chat.completion.chunk` or `text_completion`.
    """

    kind: str
    model: str
    fingerprint: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.kind.startswith('chat') else 'cmpl'}-{self.key}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def usage(prompts: Sequence[Request], requests: Sequence[Request]) -> dict[str, Any]:
    """Token counts; a prompt with several choices counts once.

    Args:
        prompts: One request per prompt.
    """
    read = sum(len(request.prompt) for request in prompts)
    drawn = sum(len(request.tokens) for request in requests)
    return {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached for r in prompts)},
    }


def timings(request: Request, kv_bytes: int) -> dict[str, Any]:
    """How long one request took, in llama.cpp's words, and the bytes of its cache at the end."""
    now = perf_counter()
    admitted = request.admitted or now
    answered = request.answered or now
    prompt, drawn = answered - admitted, now - answered
    read, more = len(request.prompt) - request.cached, max(0, len(request.tokens) - 1)
    return {
        "prompt_n": read,
        "prompt_ms": 1e3 * prompt,
        "prompt_per_second": read / prompt if prompt > 0 else None,
        "predicted_n": len(request.tokens),
        "predicted_ms": 1e3 * drawn,
        "predicted_per_second": more / drawn if drawn > 0 else None,
        "cache_n": request.cached,
        "kv_bytes": kv_bytes,
    }


class Names:
    """Tokens as the strings that logprobs show."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._known[token] = str(text)
        return self._known[token]

    def chat_logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """`logprobs` of a chat choice."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            name = self[token]
            return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

        return {
            "content": [
                {**entry(one.token, one.logprob), "top_logprobs": [entry(*top) for top in one.top]}
                for one in scored
            ]
        }

    def text_logprobs(
        self, scored: Sequence[Scored | int], top: int, offset: int = 0
    ) -> dict[str, Any]:
        """`logprobs` of a text choice.

        Args:
            scored: A first prompt token, which nothing predicts, is there as its id.
            offset: Characters of the choice's text before these tokens.
        """
        names: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in scored:
            token = one if isinstance(one, int) else one.token
            names.append(self[token])
            offsets.append(offset)
            offset += len(self[token])
            if isinstance(one, int):
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(one.logprob)
            # Several tokens may read alike; the likeliest stands for them.
            best: dict[str, float] = {}
            for other, logprob in [*one.top, (one.token, one.logprob)]:
                best.setdefault(self[other], logprob)
            tops.append(best if top else None)
        return {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": tops if top else None,
            "text_offset": offsets,
        }

"""Conversations: what the model's template makes of them, and the tool calls in what it answers."""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.server.errors import ApiError
from kvtool.text import StopText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvtool.server.schema import Message

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def takes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template shows tools to the model."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("tools" in text for text in texts)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    answer: bool = True,
) -> list[int]:
    """The token ids of a conversation, ending where the model answers.

    A last turn of the assistant's is left open, to be continued.

    Args:
        options: Variables of the template.

    Raises:
        ApiError: There is no template, or none that takes this.
    """
    if not tokenizer.chat_template:
        hint = "use /v1/completions, or serve the model with --chat-template"
        raise ApiError(400, f"the model has no chat template: {hint}", "messages")
    if tools and not takes_tools(tokenizer):
        raise ApiError(400, "the model's chat template knows no tools", "tools")
    options = options or {}
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    if taken := sorted(reserved & set(options)):
        message = f"'{taken[0]}' is no variable of a template"
        raise ApiError(400, message, "chat_template_kwargs")
    goes_on = answer and messages[-1].role == "assistant"
    try:
        ids = tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=answer and not goes_on,
            continue_final_message=goes_on,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
            **options,
        )
    except Exception as error:  # a template comes with the checkpoint and raises what it likes
        message = f"the chat template does not take this conversation: {error}"
        raise ApiError(400, message, "messages") from error
    if not ids:
        raise ApiError(400, "the chat template makes nothing of this conversation", "messages")
    return list(ids)


class ToolText:
    """Splits what a model says into words for the user and calls of tools.

    Understood are `<tool_call>` blocks of JSON (Hermes, Qwen, SmolLM), one call or a list in each,
    and an answer that is a JSON call and nothing else (Llama). What does not parse stays text.
    """

    def __init__(self) -> None:
        self._words = StopText([_OPEN])
        self._said, self._shown = "", 0

    def push(self, text: str) -> str:
        """The words so far that are new and sure to be no part of a call."""
        if self._said.strip() or text.lstrip()[:1] != "{":
            sure = self._words.push(text)
        else:  # perhaps a call from its first letter on
            sure = ""
            self._words.stopped = True
        self._said += text
        self._shown += len(sure)
        return sure

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The words that are left, and the calls in OpenAI's form."""
        rest = self._said[self._shown :]
        calls = _calls(rest)
        if calls is None:
            return rest, []
        return "", [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for name, arguments in calls
        ]


def _calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of the calls that `text` consists of; None if it is anything else."""
    blocks = text.split(_OPEN)
    if len(blocks) == 1:
        blocks = [text]
    elif blocks.pop(0).strip():
        return None
    found: list[tuple[str, dict[str, Any]]] = []
    for block in blocks:
        try:
            said = json.loads(block.strip().removesuffix(_CLOSE))
        except (ValueError, RecursionError):
            return None
        for call in said if isinstance(said, list) else [said]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(arguments, dict):
                return None
            found.append((call["name"], arguments))
    return found or None

"""What requests may say.

Unknown fields are ignored, as servers of this API do; a field that is known but cannot be obeyed is
refused where ignoring it would change the meaning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvtool.runtime import Sampling
from kvtool.runtime.grammar import Kind
from kvtool.sizes import LEAST_TEMPERATURE, MAX_SEED

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 64

# What other servers obey, and clients are to say otherwise here.
_INSTEAD = {
    "functions": "tools",
    "function_call": "tool_choice",
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
}
# Fields of a generation config of transformers, and ours.
IN_CONFIG = {"max_new_tokens": "max_tokens"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
}
_SAMPLED = {field.name for field in dataclasses.fields(Sampling)}

Obeyed = tuple[Kind, Any]

Stop = str | Annotated[list[str], Field(max_length=4)] | None
Token = Annotated[int, Field(ge=0, lt=2**31)]


def said_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a generation config of transformers says to draw, in our fields; as there, one that is
    not to sample takes the likeliest tokens, whatever temperature it names.
    """
    said = {ours: config.get(name) for name, ours in IN_CONFIG.items()}
    if config.get("do_sample") is False:
        said["temperature"] = 0.0
    return {name: value for name, value in said.items() if value is not None}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class JsonSchema(BaseModel):
    rules: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What an answer is: text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type 'json_schema'")
        return self

    @property
    def obeyed(self) -> Obeyed | None:
        if self.type == "text":
            return None
        return "json", self.json_schema.rules if self.json_schema else {"type": "object"}


class StructuredOutputs(BaseModel):
    """The same and more, as vLLM's clients say it: one of these."""

    rules: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @property
    def obeyed(self) -> Obeyed | None:
        said = {
            "json": {"type": "object"} if self.json_object else self.rules,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        found: list[Any] = [(kind, value) for kind, value in said.items() if value is not None]
        if len(found) != 1 or (self.json_object and self.rules is not None):
            raise ValueError("one of json, regex, choice, grammar and json_object")
        obeyed: Obeyed = found[0]
        return obeyed

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        _ = self.obeyed
        return self


class Generation(BaseModel):
    """The fields that both kinds of completion share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Stop = None
    stop_token_ids: list[Token] | None = Field(None, max_length=64)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_transformers(cls, body: Any) -> Any:
        """`transformers chat` says how to draw in a `generation_config` of its own, as JSON."""
        if not isinstance(body, dict) or not isinstance(body.get("generation_config"), str):
            return body
        try:
            config = json.loads(body["generation_config"])
        except (ValueError, RecursionError) as error:
            raise ValueError("generation_config is no JSON") from error
        if not isinstance(config, dict):
            raise ValueError("generation_config is no JSON object")
        return {**said_in_config(config), **body}

    @model_validator(mode="after")
    def _says_it_as_here(self) -> Generation:
        for name, instead in _INSTEAD.items():
            if (self.model_extra or {}).get(name) is not None:
                raise ValueError(f"{name} is not known here: use {instead}")
        return self

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams only")
        return self

    @model_validator(mode="after")
    def _ends_where_it_is_complete(self) -> Generation:
        if self.obeyed is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError("what obeys a grammar ends with it: no min_tokens and no ignore_eos")
        return self

    @property
    def obeyed(self) -> Obeyed | None:
        """The kind of grammar that the answer obeys, and what it says."""
        said = [x for x in (self.response_format, self.structured_outputs) if x is not None]
        found = [one.obeyed for one in said if one.obeyed is not None]
        if len(found) > 1:
            raise ValueError("an answer can obey one grammar")
        return found[0] if found else None

    @property
    def obeys(self) -> str:
        """The field that says what is obeyed."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: Generation) -> Sampling:
        """How tokens are drawn; what neither it nor the model's defaults say is OpenAI's."""
        said: dict[str, Any] = {"temperature": 1.0}
        for one in (defaults, self):
            said |= one.model_dump(include=_SAMPLED, exclude_none=True)
        if said["temperature"] < LEAST_TEMPERATURE:
            said["temperature"] = 0.0
        return Sampling(**said | {"top_k": max(0, said.get("top_k", 0))})


class TextPart(BaseModel):
    type: str
    text: str = ""

    @field_validator("type")
    @classmethod
    def _is_text(cls, kind: str) -> str:
        if kind != "text":
            raise ValueError(f"the model reads text, and no part of type '{kind}'")
        return kind


class Message(BaseModel):
    """A turn of a conversation; whatever else it says goes to the template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The turn as templates read it, with its text in one piece."""
        said = self.model_dump(exclude_none=True)
        parts = self.content
        said["content"] = "".join(p.text for p in parts) if isinstance(parts, list) else parts or ""
        return said


class ChatCompletion(Generation):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def forces_call(self) -> bool:
        return self.tool_choice not in (None, "auto", "none")

    @property
    def obeyed(self) -> Obeyed | None:
        if not self.forces_call:
            return super().obeyed
        if super().obeyed is not None:
            raise ValueError("tool_choice: an answer can obey one grammar")
        return "json", forced_call(self.tools or [], self.tool_choice)

    @property
    def obeys(self) -> str:
        return "tools" if self.forces_call else super().obeys

    @property
    def may_call(self) -> bool:
        """Whether an answer may be a call of a tool. One that obeys something else is none, though
        it may look like one.
        """
        return bool(self.offered_tools) and super().obeyed is None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatCompletion:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        """At most so many; None where nothing is said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else self.tools or []


def forced_call(tools: list[dict[str, Any]], choice: Any) -> dict[str, Any]:
    """The schema of a call of one of the tools, or of the one that is chosen."""
    own = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    if choice != "required":
        chosen = choice.get("function") if isinstance(choice, dict) else None
        name = chosen.get("name") if isinstance(chosen, dict) else None
        own = [function for function in own if function.get("name") == name]
    if not own:
        raise ValueError("tool_choice names no tool that is offered")
    calls: list[dict[str, Any]] = []
    for function in own:
        name, rules = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not isinstance(rules, dict):
            raise ValueError("tools: a function has a name, and a JSON schema as its parameters")
        # Each is a document of its own, from whose root its references are.
        arguments = {"$id": f"tool:{len(calls)}", "type": "object", **rules}
        fields = {"name": {"const": name}, "arguments": arguments}
        calls.append(
            {
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls}


class Completion(Generation):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(min_length=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _no_search(self) -> Completion:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of: all choices are returned, so it can only equal n")
        if self.suffix:
            raise ValueError("suffix: there is no model here that fills in the middle")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Tokenize(BaseModel):
    """The body of `/tokenize`: a text, or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Tokenize:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("either prompt or messages")
        return self


class LoadModel(BaseModel):
    """The body of `/load_model`, by which `transformers chat` asks whether a model is there."""

    model: str


class Detokenize(BaseModel):
    tokens: list[Token]

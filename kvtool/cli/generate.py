"""`kvtool generate`: continue one prompt from our own cache, streamed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from kvtool.cli import _options as options
from kvtool.cli._console import counted, emit, err, stdin
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.sizes import LEAST_TEMPERATURE, MAX_SEED
from kvtool.text import TextStream, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvtool.corpus import Messages
    from kvtool.runtime import Engine, KVCache, Sampling

_SAMPLING = "Sampling"

MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens to generate.")]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="How random the choice is; 0: always the likeliest token.",
        rich_help_panel=_SAMPLING,
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Choose among the likeliest tokens that hold this share of the probability.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        min=0,
        help="Choose among so many of the likeliest tokens; 0: all.",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Drop tokens below this share of the likeliest's probability.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        min=0.01,
        help="Above 1: tokens that were there before become less likely.",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=MAX_SEED, help="With the same seed, the same text.", rich_help_panel=_SAMPLING
    ),
]


def generate(
    model: options.Model,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue; '-' reads it from stdin, without its last newline.",
        ),
    ],
    plan: options.PlanFile = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template first.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offline: options.Offline = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Continue PROMPT; text streams to stdout, speed and cache size go to stderr."""
    from kvtool.checkpoint import Checkpoint
    from kvtool.runtime import Engine, Sampling

    chosen = sampling_options(temperature, top_p, top_k, min_p, repetition_penalty)
    text = check_text(stdin().read().removesuffix("\n") if prompt == "-" else prompt)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    kept = options.read_plan(plan, checkpoint)
    tokenizer = checkpoint.tokenizer()
    if chat:
        ids = chat_ids(tokenizer, [{"role": "user", "content": text}], model)
    else:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    if not ids:
        raise UsageError("the prompt is empty: there is nothing to continue")
    device = options.resolve_device(device)
    precision = options.resolve_dtype(dtype, device)
    engine = Engine.load(checkpoint, dtype=precision, device=device, plan=kept)
    check_length(len(ids), max_new_tokens, engine.max_context)

    cache = engine.new_cache(1, len(ids) + max_new_tokens)
    sampling = Sampling(**chosen)
    made = continued(engine, ids, cache, max_new_tokens, sampling, seed, shown=not json)
    tokens = made.tokens
    rate = (len(tokens) - 1) / made.decode if len(tokens) > 1 else None
    # Rings are there from the first token on: only what a further one costs is worth a number.
    itemsize = engine.dtype.itemsize
    per_token = cache.bytes_per_token() if kept is None else kept.bytes_per_token(itemsize)
    result = {
        "model": checkpoint.source,
        "text": made.text,
        "prompt_tokens": len(ids),
        "new_tokens": len(tokens),
        "stopped": tokens[-1] in engine.eos_ids,
        "prefill_seconds": made.prefill,
        "decode_seconds": made.decode,
        "decode_tokens_per_second": rate,
        "cache_bytes_per_token": per_token,
        "cache_bytes": cache.allocated_bytes,
    }
    if json:
        emit(result, json)
    if not quiet:
        speed = "" if rate is None else f", {len(tokens) - 1} more at {rate:.1f} tokens/s"
        err.print(
            f"{counted(len(ids), 'prompt token')}, first token after {made.prefill:.2f} s{speed}, "
            f"cache {decimal(cache.allocated_bytes)}, {per_token:,.0f} bytes per token in "
            f"{str(engine.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class Continued:
    """What came behind a prompt: its tokens, their text, seconds to the first and from there on."""

    tokens: list[int]
    text: str
    prefill: float
    decode: float


def continued(
    engine: Engine, ids: list[int], cache: KVCache, most: int, sampling: Sampling,
    seed: int | None, *, shown: bool,
) -> Continued:  # fmt: skip
    """Continues a prompt by at most so many tokens, on stdout as they come if they are shown."""
    stream, text, tokens = TextStream(engine.tokenizer), "", list[int]()
    start = first = perf_counter()
    for (token,) in engine.generate(
        [ids], max_new_tokens=most, sampling=sampling, seed=seed, cache=cache
    ):
        if not tokens:
            first = perf_counter()
        assert token is not None  # a single row ends the loop with its last token
        tokens.append(token)
        text += (piece := stream.push(token))
        if shown:
            sys.stdout.write(piece)
            sys.stdout.flush()
    end = perf_counter()
    text += (piece := stream.flush())
    if shown:
        sys.stdout.write(piece + "\n")
        sys.stdout.flush()
    return Continued(tokens, text, first - start, end - first)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, model: str) -> list[int]:
    """A conversation of today, ending where the model answers.

    Raises:
        UnsupportedModelError: There is no chat template that takes it.
    """
    from kvtool.corpus import chat_tokens

    try:
        return chat_tokens(tokenizer, messages, answer=True, today=True)
    except UnsupportedModelError as error:
        hint = "continue a plain text with 'kvtool generate'"
        raise UnsupportedModelError(f"{model}: {error}", hint) from error


def sampling_options(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float
) -> dict[str, Any]:
    """The fields of `Sampling`, none of which may be without effect.

    Raises:
        UsageError: The temperature is as good as 0, or is 0 and something else asks to sample.
    """
    if 0.0 < temperature < LEAST_TEMPERATURE:
        raise UsageError(
            f"a temperature of {temperature:g} is too low to sample with; "
            f"the least is {LEAST_TEMPERATURE:g}",
            hint="--temperature 0 takes the likeliest token",
        )
    narrowing = {"--top-p": top_p < 1.0, "--top-k": top_k > 0, "--min-p": min_p > 0.0}
    for flag, given in narrowing.items():
        if given and temperature == 0.0:
            raise UsageError(
                f"{flag} has no effect at temperature 0", hint="--temperature 1 samples"
            )
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }


def check_length(prompt: int, new: int, max_context: int) -> None:
    """Refuse what the model has no positions for."""
    if prompt > max_context:
        raise UsageError(
            f"the prompt has {prompt} tokens, but the model's context is {max_context}"
        )
    if prompt + new > max_context:
        raise UsageError(
            f"{prompt} prompt tokens and {new} new ones need {prompt + new} positions, "
            f"but the model's context is {max_context}",
            hint=f"--max-new-tokens {max_context - prompt} is the most that fits"
            if prompt < max_context
            else None,
        )

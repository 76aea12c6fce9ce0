"""`kvtool chat`: a conversation that keeps its cache from turn to turn."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.cli import _options as options
from kvtool.cli._console import err, stdin
from kvtool.cli.generate import (
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    chat_ids,
    continued,
    sampling_options,
)
from kvtool.errors import UsageError
from kvtool.text import check_text

if TYPE_CHECKING:
    from kvtool.runtime import KVCache

_COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends it"
_FIRST_CAPACITY = 1024  # the cache grows by doubling when a conversation outgrows it


def chat(
    model: options.Model,
    plan: options.PlanFile = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    quiet: options.Quiet = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offline: options.Offline = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Talk to MODEL. /reset forgets the conversation, /exit or Ctrl-D ends it."""
    from kvtool.checkpoint import Checkpoint
    from kvtool.runtime import Engine, Sampling

    chosen = sampling_options(temperature, top_p, top_k, min_p, repetition_penalty)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    kept = options.read_plan(plan, checkpoint)
    tokenizer = checkpoint.tokenizer()
    opening = [] if system is None else [{"role": "system", "content": check_text(system)}]
    chat_ids(tokenizer, [*opening, {"role": "user", "content": "?"}], model)  # before the weights
    device = options.resolve_device(device)
    precision = options.resolve_dtype(dtype, device)
    engine = Engine.load(checkpoint, dtype=precision, device=device, plan=kept)
    sampling = Sampling(**chosen)
    cache = engine.new_cache(1, min(_FIRST_CAPACITY, engine.max_context))

    interactive = stdin().isatty() and sys.stdout.isatty()
    if interactive and not quiet:
        err.print(_COMMANDS)
    messages, stored = list(opening), list[int]()
    while (line := _read(interactive)) is not None:
        said = line.strip()
        if said == "/exit":
            break
        if said == "/reset":
            messages, stored = list(opening), []
            continue
        if re.fullmatch(r"/[a-z]+", said):
            err.print(f"{said} is no command: {_COMMANDS}")
            continue
        if not said:
            continue
        asked = [*messages, {"role": "user", "content": check_text(said)}]
        ids = chat_ids(tokenizer, asked, model)
        room = engine.max_context - len(ids)
        if room < 1:
            full = UsageError(
                f"the conversation has {len(ids)} tokens, "
                f"but the model's context is {engine.max_context}",
                hint="/reset starts a new one",
            )
            if not interactive:
                raise full
            err.print(f"{full}; {full.hint}")
            continue
        reused = reuse_prefix(cache, stored, ids)
        most = min(max_new_tokens, room)
        reply = continued(engine, ids, cache, most, sampling, seed, shown=True)
        messages = [*asked, {"role": "assistant", "content": reply.text}]
        # The last token was drawn but never fed, so the cache does not hold it.
        stored = [*ids, *reply.tokens][: cache.lengths[0]]
        if not quiet:
            err.print(f"[{reused} of {len(ids)} tokens reused, {len(reply.tokens)} new]")


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest head that two sequences share."""
    for length, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return length
    return min(len(first), len(second))


def reuse_prefix(cache: KVCache, stored: Sequence[int], ids: Sequence[int]) -> int:
    """Crop row 0 to what a new prompt shares with what is stored; returns the tokens kept.

    At least one token is left to feed: the next prediction is made from its output. A cache that
    has dropped tokens may have to start over.
    """
    cache.crop(0, min(common_prefix(stored, ids), len(ids) - 1))
    return cache.lengths[0]


def _read(interactive: bool) -> str | None:
    """One line from the user, None at the end of the input."""
    if interactive:
        try:
            return input("> ")
        except EOFError:
            print(file=sys.stderr)
            return None
    return stdin().readline() or None

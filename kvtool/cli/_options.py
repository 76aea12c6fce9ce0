"""The options that several commands share. Same flag, same meaning, everywhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal

from kvtool.errors import PlanError, ResourceError, UsageError
from kvtool.sizes import MAX_SEED

if TYPE_CHECKING:
    import torch

    from kvtool.checkpoint import Checkpoint
    from kvtool.plan import Plan

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_INPUT, _OUTPUT, _COMPUTE, _RUN = "Input", "Output", "Compute", "Run"
_DANGEROUS = "Dangerous"
_CONTEXT = 4096

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a hub id, a .gguf file, or the built-in 'smollm2'.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help="What the cache keeps, from 'kvtool calibrate'; without one, everything.",
        rich_help_panel=_INPUT,
    ),
]
StartPlan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help="A plan to add this to, from 'kvtool calibrate'; default: one that keeps everything.",
        rich_help_panel=_INPUT,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id.", rich_help_panel=_INPUT),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A .txt or .jsonl file or a hub data set id; default: Python's own documentation.",
        rich_help_panel=_INPUT,
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens", min=1, help="How many tokens of that text are read.", rich_help_panel=_INPUT
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Where the result is written.", rich_help_panel=_OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_OUTPUT),
]
ShardSize = Annotated[
    str,
    typer.Option(
        "--shard-size",
        help="Size of the largest weight file, such as 2GB.",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object instead of tables.", rich_help_panel=_OUTPUT
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show no progress on stderr.", rich_help_panel=_OUTPUT),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16; auto: float32 on the CPU, bfloat16 on a GPU.",
        rich_help_panel=_COMPUTE,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_COMPUTE),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=MAX_SEED, help="Fixes every random choice.", rich_help_panel=_RUN
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only say what would happen, and write nothing.", rich_help_panel=_RUN
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Go on where an interrupted run stopped.", rich_help_panel=_RUN
    ),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Never touch the network.", rich_help_panel=_RUN),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the checkpoint brings along.",
        rich_help_panel=_DANGEROUS,
    ),
]


BudgetContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        help="Tokens of a sequence at which the budget counts; default: 4096, or the "
        "model's context.",
        rich_help_panel="Method",
    ),
]


_PREFILL = (
    "dense: prompts are read with their whole uncompressed past, and compressed at their end. "
    "streamed: they are compressed as they are read, so an uncompressed one is never held whole, "
    "and serve-local reads prompts that start alike once."
)
Prefill = Annotated[
    Literal["dense", "streamed"], typer.Option(help=_PREFILL, rich_help_panel="Method")
]
PlannedPrefill = Annotated[
    Literal["dense", "streamed"] | None,
    typer.Option(
        help=f"{_PREFILL} Default: as the plan of --plan says; dense, and of fp8 streamed.",
        rich_help_panel="Method",
    ),
]


def kv_budget(*, when: str = "", panel: str | None = "Method") -> Any:
    """``--kv-budget`` of what makes plans; that of ``convert`` counts by token."""
    size = f"{when}: size of" if when else "Size of"
    told = f"{size} the cache of one sequence of --context tokens in bfloat16, with all that is "
    told += "kept exactly: a share of the native one (25%), or bytes (300MB)."
    return typer.Option("--kv-budget", help=told, rich_help_panel=panel)


def read_plan(file: Path | None, checkpoint: Checkpoint) -> Plan | None:
    """The plan of ``--plan``, if it is for this model; asked before any weights are loaded.

    Raises:
        PlanError: It cannot be read, belongs to another model, or keeps more than that can.
    """
    if file is None:
        return None
    from kvtool.plan import Plan

    plan = Plan.read(file)
    plan.check_base(checkpoint)
    plan.check_context(checkpoint)
    return plan


def context_of(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens that a budget is for.

    Raises:
        UsageError: The model has no such positions.
    """
    limit = _positions(checkpoint)
    if asked is None:
        return min(_CONTEXT, limit)
    if not 1 <= asked <= limit:
        raise UsageError(f"--context {asked} is beyond the model's {limit} tokens")
    return asked


def check_exact(plan: Plan, checkpoint: Checkpoint, flags: str) -> None:
    """Whether a plan that is about to be made, with what `flags` keep exactly, could be loaded.

    Raises:
        UsageError: It could not: the model has no room for so many tokens.
    """
    try:
        plan.check_context(checkpoint)
    except PlanError as error:
        raise UsageError(f"{flags}: {error}") from error


def _positions(checkpoint: Checkpoint) -> int:
    from kvtool.factored import model_config

    return int(model_config(checkpoint).max_position_embeddings)


def resolve_device(name: str) -> str:
    """``auto`` is the first CUDA device where there is one, and the CPU elsewhere.

    Raises:
        UsageError: There is no such device.
    """
    import torch

    if name == "auto":
        # Under accelerate launch, each process has a device of its own.
        rank = os.environ.get("LOCAL_RANK")
        mine = "cuda" if rank is None else f"cuda:{rank}"
        return mine if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    numbered = re.fullmatch(r"cuda(?::(\d+))?", name)
    if numbered is None:
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not '{name}'")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no CUDA device", hint="use --device cpu")
    count = torch.cuda.device_count()
    if int(numbered[1] or 0) >= count:
        raise UsageError(f"--device {name}: the CUDA devices here end at cuda:{count - 1}")
    return name


def memory_of(device: str) -> int | None:
    """Bytes of memory that a device has; None where that cannot be told."""
    import torch

    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def check_memory(what: str, needed: int, device: str, hint: str) -> None:
    """Raises ResourceError where a device has less memory than needed."""
    there = memory_of(device)
    if there is not None and needed > there:
        raise ResourceError(
            f"{what} needs about {decimal(needed)} of memory, {device} has {decimal(there)}",
            hint=hint,
        )


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The torch dtype to compute in; ``auto`` is float32 on the CPU and bfloat16 on a GPU."""
    import torch

    if name == "auto":
        return torch.float32 if device.startswith("cpu") else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype

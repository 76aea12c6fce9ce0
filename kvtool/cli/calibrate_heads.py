"""``kvtool calibrate retrieval-heads``: plan which heads keep the whole past; ``compare-heads``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from kvtool.cli import _console, _options
from kvtool.cli._plans import emit_plan, emit_planned, score_picture
from kvtool.errors import UsageError
from kvtool.sizes import BF16

if TYPE_CHECKING:
    from kvtool.plan import Plan

_METHOD, _TRAINING = "Method", "Training (--method duo)"


def retrieval_heads(
    model: _options.Model,
    output: _options.Output,
    method: Annotated[
        Literal["ablation", "duo", "attention", "semantic", "entropy"],
        typer.Option(
            help="ablation: what streaming each head alone does to recall. duo: trained gates "
            "(DuoAttention). attention, semantic: attention to what is recalled (Wu et "
            "al., CompressKV). entropy: entropy of the queries, without a task (UNComp).",
            rich_help_panel=_METHOD,
        ),
    ] = "ablation",
    streaming_heads: Annotated[
        str | None,
        typer.Option(
            "--streaming-heads",
            help="How many heads stream: a share of all (50%), or their number.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    kv_budget: Annotated[str | None, _options.kv_budget()] = None,
    context: _options.BudgetContext = None,
    sink: Annotated[
        int,
        typer.Option(
            min=0, help="First tokens that a streaming head keeps.", rich_help_panel=_METHOD
        ),
    ] = 16,
    window: Annotated[
        int,
        typer.Option(
            min=1, help="Last tokens that a streaming head keeps.", rich_help_panel=_METHOD
        ),
    ] = 256,
    prefill: _options.Prefill = "dense",
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            min=1,
            help="Tokens of the recall tasks; may be given more than once. Default: 1024 and 2048.",
            rich_help_panel="Input",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="How many recall tasks; default: 8.", rich_help_panel="Input"),
    ] = None,
    data: _options.Data = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps; default: 200.", rich_help_panel=_TRAINING),
    ] = None,
    mix: Annotated[
        Literal["self", "teacher"] | None,
        typer.Option(
            help="Whose full attention the gates mix in: self as in the paper (default), teacher "
            "as in its code.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Pull of the gates to 0; default: 0.05.", rich_help_panel=_TRAINING
        ),
    ] = None,
    device: _options.Device = "auto",
    seed: _options.Seed = 0,
    overwrite: _options.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="With --method ablation or duo: go on where an interrupted run stopped.",
            rich_help_panel="Run",
        ),
    ] = True,
    dry_run: _options.DryRun = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Find the heads of MODEL that need the whole past; others keep the first and last tokens."""
    import torch

    from kvtool.calibrate.heads import HeadOptions, calibrate_heads, check_options, memory_bytes
    from kvtool.checkpoint import Checkpoint
    from kvtool.distill import processes
    from kvtool.plan import Plan, base_of, whole_layers
    from kvtool.plan_file import check_plan_output

    if kv_budget is not None and streaming_heads is not None:
        raise UsageError("--kv-budget and --streaming-heads both say how many heads stream")
    training = _training(method, steps=steps, mix=mix, penalty=penalty)
    if method == "entropy" and (lengths or samples is not None):
        raise UsageError("--length and --samples are of recall tasks, which entropy does not need")
    is_first = processes()[0] == 0  # under accelerate launch, one process writes
    if is_first:
        check_plan_output(output, overwrite=overwrite)
    device = _options.resolve_device(device)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    options = HeadOptions(
        method=method,
        sink=sink,
        window=window,
        prefill=prefill,
        lengths=tuple(lengths) if lengths else None,
        samples=samples or HeadOptions.samples,
        data=data,
        seed=seed,
        **training,
    )
    check_options(checkpoint, options)
    context = _options.context_of(checkpoint, context)
    base = base_of(checkpoint)
    # Before the work: the size is possible whatever the scores turn out to be.
    size = _Size(streaming_heads, kv_budget, context, sink, window)
    scores = torch.zeros(base.layers, base.kv_heads)
    planned = size.apply(Plan(base, whole_layers(checkpoint), prefill, scores=scores))
    _options.check_exact(planned, checkpoint, "--sink and --window")
    needed = memory_bytes(checkpoint, options)
    hint = "fewer --samples, a shorter --length, or --method entropy, which streams layers"
    _options.check_memory(f"calibrating {checkpoint.source}", needed, device, hint)
    if dry_run:
        found = {
            "prefill": prefill,
            "streaming_heads": planned.streaming_heads,
            "kv_heads": planned.planned_heads,
            "context": context,
            "bytes": planned.cache_bytes(context, BF16),
            "native_bytes": planned.native_bytes(context, BF16),
            "memory_bytes": needed,
        }
        emit_planned(output, checkpoint.source, found, json)
        return
    folder = output.with_name(output.name + ".partial")
    resumes = method in ("ablation", "duo")
    if resumes and folder.exists():
        _check_is_ours(folder)
    with _console.progress(quiet) as report:
        started = time.perf_counter()
        scored = calibrate_heads(
            checkpoint,
            options,
            device=device,
            folder=folder if resumes else None,
            resume=resume,
            report=report,
        )
        seconds = time.perf_counter() - started
    if not is_first:
        return
    plan = size.apply(scored)
    plan.write(output, overwrite=overwrite)
    if resumes:
        shutil.rmtree(folder, ignore_errors=True)
    if not json:
        _print_recall(scored)
    emit_plan(plan, output, context, json, {"seconds": seconds})


def _training(method: str, **named: Any) -> dict[str, Any]:
    """The options of a training that were given; UsageError where there is none."""
    given = {name: x for name, x in named.items() if x is not None}
    if given and method != "duo":
        raise UsageError(f"--{next(iter(given))} is for --method duo: {method} trains nothing")
    return given


def _print_recall(scored: Plan) -> None:
    for check in scored.provenance[0]["recall"]:
        how = "enough" if check["passed"] else "too little"
        accuracy = f"{check['accuracy']:.0%} of the tokens of '{check['kind']}'"
        told = f"the model itself recalls {accuracy}: {how} to judge its heads by"
        _console.out.print(told)


def _check_is_ours(folder: Path) -> None:
    """Raises UsageError if a folder holds anything that an interrupted run does not leave."""
    from kvtool.calibrate import ablation
    from kvtool.distill import LOG, STATE

    ours = (LOG, STATE.removesuffix(".safetensors"), ablation.STATE)
    if not folder.is_dir() or any(not x.name.startswith(ours) for x in folder.iterdir()):
        raise UsageError(
            f"{folder} is in the way: kvtool works there, and did not write it",
            hint="move it, or name another output",
        )


class _Size:
    """How many heads stream, as the user said it."""

    def __init__(
        self, share: str | None, budget: str | None, context: int, sink: int, window: int
    ) -> None:
        self.share = share if share is not None or budget is not None else "50%"
        self.budget, self.context, self.sink, self.window = budget, context, sink, window

    def apply(self, plan: Plan) -> Plan:
        """The plan with that many of its lowest-scored heads streaming."""
        from kvtool.sizes import parse_budget, parse_share
        from kvtool.slices import cut, stream_heads

        heads = plan.planned_heads
        if self.budget is None:
            count = parse_share(self.share or "", heads)
            return stream_heads(plan, count, self.sink, self.window)
        allowed = parse_budget(self.budget, plan.native_bytes(self.context, BF16))
        streaming = stream_heads(plan, heads, self.sink, self.window)
        return cut(streaming, allowed, self.context, BF16)


def compare_heads(
    plans: Annotated[
        list[Path],
        typer.Argument(metavar="PLAN...", help="Plans of one model, from different methods."),
    ],
    json: _options.Json = False,
) -> None:
    """Compare the scores of several plans: rank correlation, and layers by heads as pictures."""
    from kvtool.calibrate.heads import rank_correlation
    from kvtool.plan import Plan

    if len(plans) < 2:
        raise UsageError("a comparison needs two plans or more")
    loaded = [Plan.read(path) for path in plans]
    for path, plan in zip(plans, loaded, strict=True):
        if plan.scores is None:
            raise UsageError(f"{path} has no scores to compare")
        if plan.base != loaded[0].base:
            raise UsageError(f"{path} is for another model than {plans[0]}")
    planned = [layer.kept is None for layer in loaded[0].layers]  # others' scores mean nothing
    scores = [plan.scores[planned] for plan in loaded if plan.scores is not None]
    correlation = rank_correlation(scores)
    # The heads that stay full when half of them stream: what users will run.
    top = [set(s.flatten().argsort(stable=True)[s.numel() // 2 :].tolist()) for s in scores]
    shared = [[len(a & b) / len(a) for b in top] for a in top]
    names = [
        f"{'+'.join(_methods(plan))} ({path.name})"
        for path, plan in zip(plans, loaded, strict=True)
    ]
    result = {
        "plans": [str(path) for path in plans],
        "methods": [_methods(plan) for plan in loaded],
        "spearman": correlation.tolist(),
        "shared_full_heads_at_half": shared,
    }
    table = Table(
        title="rank correlation of the scores (Spearman) / share of equal heads in the upper half",
        title_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("")
    for number in range(len(names)):
        table.add_column(f"{number + 1}", justify="right")
    for row, name in enumerate(names):
        cells = [
            f"{correlation[row, column]:.2f} / {shared[row][column]:.0%}"
            for column in range(len(names))
        ]
        table.add_row(f"{row + 1} {name}", *cells)
    _console.emit(result, json, table)
    if not json:
        for name, plan in zip(names, loaded, strict=True):
            _console.out.print(f"{name}\n{score_picture(plan)}\n", soft_wrap=True)


def _methods(plan: Plan) -> list[str]:
    return [str(item.get("method", "unknown")) for item in plan.provenance]

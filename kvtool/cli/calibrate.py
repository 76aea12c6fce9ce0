"""``kvtool calibrate``: find out where a model's cache may lose bytes; write it down as a plan."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from kvtool.cli import _console, _options
from kvtool.cli.calibrate_double_sparsity import double_sparsity
from kvtool.cli.calibrate_explain import explain
from kvtool.cli.calibrate_layers import layer_importance
from kvtool.cli.calibrate_projections import projections
from kvtool.cli.calibrate_quantization import quantization
from kvtool.cli.calibrate_receptive_field import receptive_field
from kvtool.cli.calibrate_statistics import statistics
from kvtool.cli.plan import emit_plan, planned_facts, score_picture, summary
from kvtool.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from kvtool.plan import Plan

calibrate_app = typer.Typer(
    name="calibrate",
    help="Measure a model, and plan where its cache may lose bytes.",
    no_args_is_help=True,
)
calibrate_app.command("statistics")(statistics)
calibrate_app.command("projections")(projections)
calibrate_app.command("quantization")(quantization)
calibrate_app.command("receptive-field")(receptive_field)
calibrate_app.command("double-sparsity")(double_sparsity)
calibrate_app.command("explain")(explain)
calibrate_app.command("layer-importance")(layer_importance)

_METHOD, _TRAINING = "Method", "Training (--method duo)"
_BF16 = 2

KvBudget = Annotated[
    str | None,
    typer.Option(
        "--kv-budget",
        help="Size of the cache at --context: a share of the native one (55%), or bytes (300MB).",
        rich_help_panel=_METHOD,
    ),
]


@calibrate_app.command("retrieval-heads")
def retrieval_heads(
    model: _options.Model,
    output: _options.Output,
    method: Annotated[
        Literal["ablation", "duo", "attention", "semantic", "entropy"],
        typer.Option(
            help="ablation: the effect of streaming each head alone. duo: trained gates "
            "(DuoAttention). attention, semantic: scores read off the attention (Wu et al., "
            "CompressKV). entropy: of the queries (UNComp).",
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
    kv_budget: KvBudget = None,
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
    prefill: Annotated[
        Literal["dense", "streamed"],
        typer.Option(
            help="Whether prompts are read densely and dropped afterwards, or streamed throughout.",
            rich_help_panel=_METHOD,
        ),
    ] = "dense",
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
        typer.Option(min=1, help="Recall tasks to look at: 8.", rich_help_panel="Input"),
    ] = None,
    data: _options.Data = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps: 200.", rich_help_panel=_TRAINING)
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
        typer.Option(min=0.0, help="Pull of the gates to 0: 0.05.", rich_help_panel=_TRAINING),
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
    """Find the heads of MODEL that need the whole past; the others keep sinks and a window."""
    from kvtool.calibrate.heads import HeadOptions, calibrate_heads, check_options, memory_bytes
    from kvtool.checkpoint import Checkpoint
    from kvtool.plan import Plan, base_of, whole_layers
    from kvtool.plan_file import check_plan_output

    if kv_budget is not None and streaming_heads is not None:
        raise UsageError("--kv-budget and --streaming-heads both say how many heads stream")
    named = {"steps": steps, "mix": mix, "penalty": penalty}
    training: dict[str, Any] = {name: x for name, x in named.items() if x is not None}
    if training and method != "duo":
        raise UsageError(f"--{next(iter(training))} is for --method duo: {method} trains nothing")
    if method == "entropy" and (lengths or samples is not None):
        raise UsageError("--length and --samples are of recall tasks, which entropy does not need")
    main = os.environ.get("RANK", "0") == "0"  # under accelerate launch, one process writes
    if main:
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
    planned = size.apply(
        Plan(base, whole_layers(checkpoint), prefill, scores=_zeros(base.layers, base.kv_heads))
    )
    needed = memory_bytes(checkpoint, options)
    if (there := _options.memory_of(device)) is not None and needed > there:
        raise ResourceError(
            f"calibrating {checkpoint.source} needs about {needed / 1e9:.1f} GB of memory, "
            f"but there are {there / 1e9:.1f} GB",
            hint="fewer --samples, a shorter --length, or --method entropy, which streams layers",
        )
    if dry_run:
        found = {**summary(planned, output, context), "memory_bytes": needed, "dry_run": True}
        shown = (
            *("plan", "model", "prefill", "streaming_heads", "kv_heads", "context", "bytes"),
            *("native_bytes", "memory_bytes", "dry_run"),
        )
        found = {key: found[key] for key in shown}
        _console.emit(found, json, planned_facts("nothing written", found))
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
    if not main:
        return
    plan = size.apply(scored)
    plan.write(output, overwrite=overwrite)
    if resumes:
        shutil.rmtree(folder, ignore_errors=True)
    if not json:
        for check in scored.provenance[0]["recall"]:
            how = "counts" if check["passed"] else "is too little to judge heads by"
            accuracy = f"{check['accuracy']:.0%} of the tokens of '{check['kind']}'"
            _console.out.print(f"the model itself recalls {accuracy}, which {how}")
    emit_plan(plan, output, context, json, {"seconds": seconds})


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
        allowed = parse_budget(self.budget, plan.native_bytes(self.context, _BF16))
        streaming = stream_heads(plan, heads, self.sink, self.window)
        return cut(streaming, allowed, self.context, _BF16)


@calibrate_app.command("budgets")
def budgets(
    model: _options.Model,
    output: _options.Output,
    kv_budget: Annotated[
        str,
        typer.Option(
            "--kv-budget",
            help="Size of the cache after a prompt of --context tokens: a share of the native one "
            "(25%), or bytes (300MB).",
            rich_help_panel=_METHOD,
        ),
    ],
    method: Annotated[
        Literal["uniform", "pyramidkv", "adakv", "prefixkv", "compresskv", "uncomp", "mass"],
        typer.Option(
            help="How heads and layers share it. mass: so that the attention mass that is kept is "
            "largest over all of them.",
            rich_help_panel=_METHOD,
        ),
    ] = "adakv",
    policy: Annotated[
        Literal["snapkv", "expected"],
        typer.Option(
            help="How tokens are chosen at the end of a prompt: by the attention of its last "
            "queries, or expected from all of them.",
            rich_help_panel=_METHOD,
        ),
    ] = "snapkv",
    context: _options.BudgetContext = None,
    minimum: Annotated[
        int,
        typer.Option(min=1, help="Tokens that every head keeps.", rich_help_panel=_METHOD),
    ] = 64,
    data: _options.Data = None,
    tokens: _options.Tokens = 16384,
    seed: _options.Seed = 0,
    overwrite: _options.Overwrite = False,
    dry_run: _options.DryRun = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Plan how many tokens of a prompt every head of MODEL keeps."""
    from kvtool.calibrate.budgets import BudgetOptions, budget_tokens, calibrate_budgets
    from kvtool.checkpoint import Checkpoint
    from kvtool.plan import Plan, base_of, check_can_drop, whole_layers
    from kvtool.plan_file import check_plan_output
    from kvtool.sizes import parse_budget

    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    context = _options.context_of(checkpoint, context)
    check_can_drop(checkpoint, bounded=True)
    whole = Plan(base_of(checkpoint), whole_layers(checkpoint))
    native = whole.native_bytes(context, _BF16)
    options = BudgetOptions(method, policy, context, minimum, data, tokens, seed)
    allowed = parse_budget(kv_budget, native)
    kept = budget_tokens(whole, options, allowed, _BF16)
    if dry_run:
        dropped = whole.planned_heads * context - kept
        planned = {
            "plan": str(output),
            "model": checkpoint.source,
            "method": method,
            "policy": policy,
            "context": context,
            "bytes": native - dropped * 2 * _BF16 * whole.base.head_dim,
            "native_bytes": native,
            "dry_run": True,
        }
        _console.emit(planned, json, planned_facts("nothing written", planned))
        return
    with _console.progress(quiet) as report:
        started = time.perf_counter()
        plan = calibrate_budgets(checkpoint, options, allowed, _BF16, report=report)
        seconds = time.perf_counter() - started
    plan.write(output, overwrite=overwrite)
    emit_plan(plan, output, context, json, {"seconds": seconds})


@calibrate_app.command("compare-heads")
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


def _zeros(layers: int, heads: int) -> Any:
    import torch

    return torch.zeros(layers, heads)

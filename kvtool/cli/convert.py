"""``kvtool convert``: write a checkpoint anew, with a smaller cache, and check the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtool.cli import _options
from kvtool.cli._conversion import Run
from kvtool.errors import UsageError

if TYPE_CHECKING:
    from kvtool.convert.options import ConvertOptions

_METHOD = "Method"


def convert(
    model: _options.Model,
    output: _options.Output,
    to: Annotated[
        Literal["mla", "gqa", "mamba", "fp8-kv"],
        typer.Option(
            "--to",
            help="What to convert to: a latent (mla), fewer KV heads (gqa), Mamba-2 in some "
            "layers (mamba), or the model as it is with scales for an fp8 cache (fp8-kv).",
            rich_help_panel=_METHOD,
        ),
    ],
    method: Annotated[
        Literal["aware", "transmla", "exact"],
        typer.Option(
            help="With --to mla. aware: a smaller cache, chosen by what attention loses. "
            "transmla: a smaller cache, as published. exact: the same cache size, without "
            "loss.",
            rich_help_panel=_METHOD,
        ),
    ] = "aware",
    target: Annotated[
        Literal["transformers", "vllm", "kvtool"],
        typer.Option(
            help="With --to mla: the engine that has to load the result.", rich_help_panel=_METHOD
        ),
    ] = "transformers",
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --to gqa: how many KV heads each layer is left with.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            help="With --to mla (default: 75%) and --layers auto: what every token may add to the "
            "cache in bfloat16, over all layers: a share of what it adds to the native one (50%), "
            "or bytes (11520).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    rope_dim: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --to mla: width of the shared key that keeps positions; default: from "
            "--kv-budget.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --to mla: width of the latent; default: from --kv-budget.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    freqfold: Annotated[
        str,
        typer.Option(
            help="With --method transmla: how many neighbouring frequencies become one, or auto.",
            rich_help_panel=_METHOD,
        ),
    ] = "auto",
    layers: Annotated[
        str | None,
        typer.Option(
            help="With --to mamba: the layers to replace, such as 9,12,20; how many, such as 8; or "
            "auto, as many as --kv-budget asks for.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    heal: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="Let the original teach the result: tokens such as 200k, a time such as 20min, "
            "or auto. With --to mamba the default is auto, 0 is not at all, and two "
            "controls are taught as long each.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --heal: a larger model with the same tokenizer that teaches instead.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    loss: Annotated[
        Literal["forward-kl", "reverse-kl"],
        typer.Option(
            help="With --to mamba: the divergence from the original's predictions that is made "
            "small.",
            rich_help_panel=_METHOD,
        ),
    ] = "forward-kl",
    scales: Annotated[
        Literal["tensor", "head"],
        typer.Option(
            help="With --to fp8-kv: one scale for all KV heads of a layer, or one each.",
            rich_help_panel=_METHOD,
        ),
    ] = "tensor",
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth",
            help="With --to fp8-kv: fold SmoothAttention into the weights; for 4-bit caches, of "
            "no use to fp8.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    turn_values: Annotated[
        bool,
        typer.Option(
            "--turn-values",
            help="With --to fp8-kv: fold a Hadamard transform of the values into the weights; "
            "for 4-bit caches, too.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    data: _options.Data = None,
    tokens: _options.Tokens = 16384,
    seed: _options.Seed = 0,
    dtype: Annotated[
        _options.DtypeName,
        typer.Option(
            metavar="NAME",
            help="Of the attention that is written: float32, bfloat16 or float16; auto: as it was.",
            rich_help_panel="Output",
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            help="With --heal and --to mamba, where it is taught: auto, cpu, cuda or cuda:N.",
            rich_help_panel="Compute",
        ),
    ] = "auto",
    shard_size: _options.ShardSize = "2GB",
    overwrite: _options.Overwrite = False,
    resume: _options.Resume = True,
    dry_run: _options.DryRun = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Load the result in a fresh process and compare it with MODEL.",
            rich_help_panel="Run",
        ),
    ] = True,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Convert MODEL to a latent cache (MLA), fewer KV heads or Mamba-2, or add scales for fp8.

    The result is a stock checkpoint, but for that of --target kvtool.
    """
    from kvtool.checkpoint import Checkpoint
    from kvtool.cli.convert_mamba import convert_mamba
    from kvtool.convert.options import ConvertOptions

    options = ConvertOptions(
        to=to,
        method=method,
        target=target,
        kv_heads=kv_heads,
        kv_budget=kv_budget,
        rope_dim=rope_dim,
        rank=rank,
        freqfold=freqfold,
        data=data,
        tokens=tokens,
        heal=heal,
        teacher=teacher,
        scales=scales,
        smooth=smooth,
        turn_values=turn_values,
        seed=seed,
        dtype=dtype,
        shard_size=shard_size,
    )
    _check_flags(options, layers, loss, device)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    device = _options.resolve_device(device)
    taught_by = None
    if teacher is not None:
        taught_by = Checkpoint.open(teacher, offline=offline, trust_remote_code=trust_remote_code)
    run = Run(
        checkpoint, output, taught_by, device, overwrite, resume, dry_run, verify, json, quiet
    )
    if to == "mamba":
        convert_mamba(run, options, layers, loss)
    else:
        _convert_attention(run, options)


def _check_flags(options: ConvertOptions, layers: str | None, loss: str, device: str) -> None:
    """Raises UsageError for flags that have no place in what is converted to."""
    from kvtool.convert.heal import AUTO
    from kvtool.convert.options import OF_FP8, OF_MLA, refuse
    from kvtool.distill import Amount

    if options.to == "mamba":
        refuse(options, (*OF_MLA, "kv_heads", *OF_FP8), "has no place in --to mamba")
    elif layers is not None or loss != "forward-kl":
        raise UsageError(f"{'--loss' if layers is None else '--layers'} is for --to mamba")
    elif options.heal is not None:
        Amount.parse(options.heal, "--heal", AUTO)
    elif options.teacher is not None:
        raise UsageError("--teacher says who teaches while healing: give --heal, too")
    elif device != "auto":
        raise UsageError("--device says where while healing: give --heal, too")


def _convert_attention(run: Run, options: ConvertOptions) -> None:
    """All but ``--to mamba``."""
    from kvtool.convert import conversion, planning

    if run.is_first:
        plan = planning.plan(
            run.checkpoint, options, run.output, overwrite=run.overwrite, teacher=run.teacher
        )
        run.check_memory(plan)
        if run.dry_run:
            run.show(plan)
    if run.dry_run:
        return
    with run.progress() as report:
        result = conversion.convert(
            run.checkpoint, run.output, options, report=report, **run.conditions
        )
    if result is not None:  # another process of accelerate launch writes
        run.finish(result)

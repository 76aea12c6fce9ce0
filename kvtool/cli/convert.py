"""``kvtool convert``: write a checkpoint anew, with a smaller cache, and check the result."""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table

from kvtool.cli import _console, _options
from kvtool.errors import GateError, KvtoolError, ResourceError, UsageError
from kvtool.fp8 import skip_flag

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint

_METHOD = "Method"


def convert(
    model: _options.Model,
    output: _options.Output,
    to: Annotated[
        Literal["mla", "gqa", "mamba", "fp8-kv"],
        typer.Option(
            "--to",
            help="The attention to convert to: a latent (mla), fewer KV heads (gqa), or in some "
            "layers Mamba-2 (mamba); or the same, with scales for an fp8 cache (fp8-kv).",
            rich_help_panel=_METHOD,
        ),
    ],
    method: Annotated[
        Literal["aware", "transmla", "exact"],
        typer.Option(
            help="aware: a smaller cache, chosen by what attention loses. transmla: as published. "
            "exact: lossless, same cache size.",
            rich_help_panel=_METHOD,
        ),
    ] = "aware",
    target: Annotated[
        Literal["transformers", "vllm", "kvtool"],
        typer.Option(help="The engine that has to load the result.", rich_help_panel=_METHOD),
    ] = "transformers",
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --to gqa: how many KV heads to merge those of a layer into.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            help="Cache size to reach: a share such as 50%, or bytes per token.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    rope_dim: Annotated[
        int | None,
        typer.Option(
            min=2, help="Width of the part that keeps positions.", rich_help_panel=_METHOD
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Width of the latent; default: from --kv-budget.", rich_help_panel=_METHOD
        ),
    ] = None,
    freqfold: Annotated[
        str,
        typer.Option(
            help="Neighbouring frequencies that share one: auto or a number.",
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
            help="Let the original teach the result: tokens such as 200k, a time such as 20min, or "
            "auto. With --to mamba always, unless it is 0, and each of two controls as long.",
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
            help="With --to mamba: what the result learns from predictions.",
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
            help="With --to fp8-kv: fold SmoothAttention into the weights, for 4-bit caches.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    turn_values: Annotated[
        bool,
        typer.Option(
            "--turn-values",
            help="With --to fp8-kv: fold a Hadamard transform of the values, for 4-bit caches.",
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
    device: _options.Device = "auto",
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
    """Convert MODEL to a latent cache (MLA), fewer KV heads, or Mamba-2 in some layers.

    The result is a stock checkpoint. Or add scales to it, by which vLLM keeps its cache in fp8.
    """
    if to == "mamba":
        from kvtool.cli.convert_mamba import convert_mamba

        given = {
            "--method": method != "aware",
            "--target": target != "transformers",
            "--kv-heads": kv_heads is not None,
            "--rope-dim": rope_dim is not None,
            "--rank": rank is not None,
            "--freqfold": freqfold != "auto",
            "--scales": scales != "tensor",
            "--smooth": smooth,
            "--turn-values": turn_values,
        }
        convert_mamba(
            model, output, layers=layers, kv_budget=kv_budget, heal=heal, teacher=teacher,
            loss=loss, data=data, tokens=tokens, seed=seed, dtype=dtype, device=device,
            shard_size=shard_size, overwrite=overwrite, resume=resume, dry_run=dry_run,
            verify=verify, json=json, quiet=quiet, offline=offline, revision=revision,
            trust_remote_code=trust_remote_code,
            misplaced=[flag for flag, there in given.items() if there],
        )  # fmt: skip
        return
    if layers is not None or loss != "forward-kl":
        raise UsageError(f"{'--loss' if layers is None else '--layers'} is for --to mamba")
    from kvtool.checkpoint import Checkpoint
    from kvtool.convert import conversion, planning
    from kvtool.convert.heal import AUTO
    from kvtool.convert.options import ConvertOptions
    from kvtool.distill import Amount, processes

    if heal is not None:
        Amount.parse(heal, "--heal", AUTO)
    elif device != "auto" or teacher is not None:
        flag, what = ("--teacher", "who teaches") if teacher is not None else ("--device", "where")
        raise UsageError(f"{flag} says {what} while healing: give --heal, too")
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
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
    device = _options.resolve_device(device)
    opened = None
    if teacher is not None:
        opened = Checkpoint.open(teacher, offline=offline, trust_remote_code=trust_remote_code)
    first = processes()[0] == 0
    if dry_run:
        plan = planning.plan(checkpoint, options, output, overwrite=overwrite, teacher=opened)
        check_memory(plan, device, verify)
        if not first:
            return
        table = new_table(f"{model} to {to}: nothing written")
        add_plan(table, plan)
        table.add_row("disk needed", decimal(plan["disk_bytes"]))
        table.add_row("memory to convert, about", decimal(plan["memory_bytes"]))
        _console.emit(plan, json, table)
        return
    if first:
        check_memory(
            planning.plan(checkpoint, options, output, overwrite=overwrite, teacher=opened),
            device,
            verify,
        )
    with _console.progress(quiet or not first) as report:
        result = conversion.convert(
            checkpoint,
            output,
            options,
            report=report,
            overwrite=overwrite,
            resume=resume,
            device=device,
            teacher=opened,
        )
    if result is None:  # another process of accelerate launch writes
        return
    summary = result.to_dict()
    table = new_table(f"{model} to {to}: {output}")
    add_plan(table, result.plan)
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("peak memory", decimal(result.peak_memory_bytes))
    finish(output, checkpoint, summary, table, verify=verify, json=json, quiet=quiet)


def finish(
    output: Path,
    checkpoint: Checkpoint,
    summary: dict[str, Any],
    table: Table,
    *,
    verify: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Verifies what was written if asked to, and prints what is known of it.

    Raises:
        GateError: The verification failed.
    """
    from kvtool.convert import artifact

    checked: dict[str, Any] | None = None
    if verify:
        checked = summary["verify"] = _verify_in_fresh_process(output, checkpoint, quiet=quiet)
        if checked["passed"]:
            artifact.record(output, checked["measured"])
        for check in checked["checks"]:
            table.add_row(
                f"verify: {check['name']}",
                f"{'ok' if check['passed'] else 'FAILED'}  {check['detail']}",
            )
    _console.emit(summary, json, table)
    if checked is not None and not checked["passed"]:
        raise GateError(
            f"{output}: the converted checkpoint failed its verification against "
            f"{checkpoint.source}",
            hint="it is kept for inspection; do not use it",
        )


def check_memory(plan: dict[str, Any], device: str, verify: bool) -> None:
    """Before the work, also of what comes last: verification holds a whole model in float32."""
    needs = [("converting", plan["memory_bytes"], "cpu", "a smaller --shard-size, fewer --tokens")]
    if verify:
        needs.append(("verifying", plan["verify_memory_bytes"], "cpu", "--no-verify"))
    if (healing := plan["healing"]) is not None:
        needs.append(("healing", healing["memory_bytes"], device, "convert without --heal"))
    for what, needed, where, instead in needs:
        if (there := _options.memory_of(where)) is not None and needed > there:
            raise ResourceError(
                f"{what} needs about {decimal(needed)} of memory, {where} has {decimal(there)}",
                hint=instead,
            )


def new_table(title: str) -> Table:
    """For what is known of a conversion."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def add_plan(table: Table, plan: dict[str, Any]) -> None:
    """Rows of what was planned."""
    before, after = plan["bytes_per_token_before"], plan["bytes_per_token_after"]
    if plan["text_of"]:
        told = f"of {plan['text_of']}: what reads images or sound is left out"
        table.add_row("text alone", told)
    if plan["to"] == "mla":
        table.add_row("method", f"{plan['method']} for {plan['target']}")
    table.add_row("cache bytes per token", f"{before} before, {after} after ({after / before:.1%})")
    if plan["to"] == "mamba":
        table.add_row("constant bytes", f"{plan['constant_bytes']} of a sequence")
        table.add_row("layers replaced", ", ".join(map(str, plan["replaced_layers"])))
    elif plan["to"] == "gqa":
        table.add_row("KV heads per layer", str(plan["kv_heads"]))
    elif plan["to"] == "fp8-kv":
        folded = [w for w in ("smooth", "turn_values") if plan[w]]
        table.add_row("scales", plan["scales"])
        table.add_row("folded into weights", ", ".join(folded).replace("_", " ") or "nothing")
        if large := plan["large_key_biases"]:
            times = ", ".join(f"{x:.0f} times in layer {i}" for i, x in large.items())
            told = f"the bias of k_proj is longer than the median's, {times}, which fp8 may break"
            table.add_row("warning", f"{told}; vLLM: {skip_flag(large)}")
    else:
        latent = f"rank {plan['rank']} + {plan['rope_dim']} with positions"
        table.add_row("latent per layer", latent)
    if (healing := plan["healing"]) is not None:
        amount = f"{healing['seconds'] or 0:.0f} seconds"
        if healing["tokens"] is not None:
            amount = f"{healing['tokens']} tokens, {healing['steps']} steps"
        table.add_row(
            "healing",
            f"{amount}, windows of {healing['window']}, memory about "
            f"{decimal(healing['memory_bytes'])}",
        )
    table.add_row(
        "weights", f"{decimal(plan['output_bytes'])}, attention {plan['attention_dtype']}"
    )


def _verify_in_fresh_process(output: Path, against: Checkpoint, *, quiet: bool) -> dict[str, Any]:
    """What ``kvtool verify`` says of *output* in a process that shares nothing with this one."""
    command = [sys.executable, "-m", "kvtool", "verify", str(output), "--json"]
    # The folder, not what the user typed: it is at hand, so no revision and no network are needed.
    command += ["--against", str(against.path)]
    command += ["--quiet"] * quiet + ["--trust-remote-code"] * against.trust_remote_code
    # Under accelerate launch: this one is alone.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=alone)
    if done.returncode not in (0, GateError.exit_code):
        raise KvtoolError(
            f"{output}: verification ended with exit code {done.returncode}",
            hint="the reason is printed above; the converted files are complete and kept",
        )
    report: dict[str, Any] = json_module.loads(done.stdout)
    return report

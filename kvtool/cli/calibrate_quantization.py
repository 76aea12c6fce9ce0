"""``kvtool calibrate quantization``: plan how many bits keys and values of each layer have."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import typer

from kvtool.cli import _options
from kvtool.cli._plans import emit_made, emit_planned
from kvtool.errors import UsageError
from kvtool.sizes import BF16

_METHOD = "Method"


def quantization(
    model: _options.Model,
    output: _options.Output,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Of each number: 2, 3, 4 or 8; keys and values apart, such as K4V2; or auto, "
            "what --kv-budget allows. aware takes it as a mean that layers share. zipcache "
            "and mikv take two, such as 4/2, for tokens with more attention and for the "
            "others; mustafar takes those of keys. Default: 4, or 4/2. fp8: what an "
            "engine's static fp8 cache keeps, by the scales of MODEL itself where it has "
            "some. States of Mamba-2 layers get 8, or 4 with S4 behind it, such as 4S4; S8 "
            "alone packs nothing else. Latents of MLA layers get them number by number.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    method: Annotated[
        Literal["aware", "kivi", "rotatekv", "zipcache", "mikv", "gear", "mustafar"],
        typer.Option(
            help="aware: more bits where predictions are sensitive to a layer's keys or values. "
            "kivi: the same everywhere, keys with a scale per channel. rotatekv: scales "
            "per token, behind a Hadamard transform and a reordering of channels. "
            "zipcache: as kivi, with more bits for tokens that get more attention. mikv: "
            "the same with scales per token, and keys balanced against queries. gear: as "
            "kivi, and thin factors for what the codes leave out. mustafar: keys as kivi, "
            "and the largest numbers of each value exactly.",
            rich_help_panel=_METHOD,
        ),
    ] = "aware",
    salient: Annotated[
        str | None,
        typer.Option(
            help="With --method zipcache (default: 60%) and mikv (50%): share of tokens with "
            "more bits, by the attention they get.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --method gear: rank of the factors of each block's keys, and of its "
            "values; default: 2.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="With --method mustafar: share of a value's numbers, the smallest, that are "
            "left out; default: 50%.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    plan: _options.StartPlan = None,
    kv_budget: Annotated[str | None, _options.kv_budget(when="With --bits auto")] = None,
    context: _options.BudgetContext = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Numbers that share a scale and a minimum (4 bytes): 16, 32, 64 or 128, by "
            "default 64. Of zipcache and mikv the tokens that are ranked together: 128.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    read: Annotated[
        Literal["absorbed", "rebuilt"] | None,
        typer.Option(
            help="absorbed: keys are stored after RoPE and read as stored. rebuilt: they are "
            "stored before it, and rebuilt and rotated at every step, with less loss; the "
            "default of rotatekv, and not for zipcache and mikv.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    sink: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First tokens that are kept exactly: 4, of kivi 0.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Last tokens that are kept exactly, at least: 64, of kivi 128. Of fp8 none, as in "
            "engines; with 64 it loses much less.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    prefill: _options.PlannedPrefill = None,
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
    """Plan integers of few bits for keys and values of MODEL, or for the codes of a plan."""
    from kvtool.calibrate import quantization as method_of
    from kvtool.calibrate.bit_options import SALIENT, QuantizationOptions
    from kvtool.checkpoint import Checkpoint
    from kvtool.latent_bits import LatentPlan
    from kvtool.plan import base_of, check_can_drop
    from kvtool.plan_file import check_plan_output
    from kvtool.sizes import parse_budget, parse_share
    from kvtool.states import StatePlan

    if bits is None:
        bits = "4/2" if method in SALIENT else "4"
    if method == "mustafar":
        sparsity = sparsity or "50%"
    options = QuantizationOptions.asked(
        method, bits, group=group, read=read, sink=sink, window=window, salient=salient,
        rank=rank, data=data, tokens=tokens, seed=seed,
    )  # fmt: skip
    if (options.bits is None) != (kv_budget is not None):
        raise UsageError("--bits auto and --kv-budget come together: give both or neither")
    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    context = _options.context_of(checkpoint, context)
    base = base_of(checkpoint)
    check_can_drop(checkpoint, other=True)
    start = _options.read_plan(plan, checkpoint)
    width = base.head_dim
    kept = None if sparsity is None else width - parse_share(sparsity, width)
    options = replace(options, context=context, kept=kept)
    options.check()
    if start is None:
        start = method_of.everything(checkpoint, base, options)
    elif any(isinstance(layer.kept, LatentPlan) for layer in start.layers):
        raise UsageError("the plan of --plan has bits already", hint="Leave it out.")
    start = replace(start, prefill=prefill or start.prefill)
    states = [x.kept for x in start.layers if isinstance(x.kept, StatePlan)]
    if options.states is not None and not any(x.rule == "mamba2" for x in states):
        raise UsageError(f"--bits {bits}: no layer of {checkpoint.source} keeps a state of Mamba-2")
    native = start.native_bytes(context, BF16)
    budget = None if kv_budget is None else parse_budget(kv_budget, native)
    planned = method_of.plan_ahead(start, options, budget, BF16)
    exact = "--window" if options.method == "fp8" else "--sink, --window and --group"
    _options.check_exact(planned, checkpoint, exact)
    if dry_run:
        facts = {
            "method": options.method,
            "bits": bits,
            "context": context,
            "bytes_at_most": planned.cache_bytes(context, BF16) if budget is None else budget,
            "native_bytes": native,
            "memory_bytes": method_of.memory_bytes(checkpoint, options),
        }
        emit_planned(output, checkpoint.source, facts, json)
        return
    emit_made(
        lambda report: method_of.calibrate_quantization(
            checkpoint, options, start, budget, BF16, report=report
        ),
        output, context, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip

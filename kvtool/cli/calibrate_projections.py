"""``kvtool calibrate projections``: plan a code that stands for keys and values."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kvtool.cli import _options
from kvtool.cli._plans import emit_made, emit_planned
from kvtool.errors import UsageError
from kvtool.sizes import BF16

_METHOD = "Method"


def projections(
    model: _options.Model,
    output: _options.Output,
    method: Annotated[
        Literal["aware", "matryoshka", "cskv", "xkv", "palu", "asvd", "pca"],
        typer.Option(
            help="aware: keeps what predictions are most sensitive to. cskv: principal "
            "directions of all heads of a layer together, keys before RoPE (the optimum of "
            "CSKV). xkv: the same for several layers. palu: the same with widths by Fisher "
            "information. asvd: directions by weights and the size of inputs. pca: each "
            "head by itself, keys after RoPE. matryoshka: trained from there "
            "(MatryoshkaKV).",
            rich_help_panel=_METHOD,
        ),
    ] = "aware",
    kv_budget: Annotated[str, _options.kv_budget()] = "50%",
    context: _options.BudgetContext = None,
    read: Annotated[
        Literal["absorbed", "rebuilt"] | None,
        typer.Option(
            help="With --method aware: keys are read as they are stored (absorbed, the "
            "default), or rebuilt and rotated at every step: less is lost, and more is "
            "computed.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    layers_together: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --method aware (default: 1) and xkv (4): neighbouring layers that share "
            "a code; with more, less is lost, and more is read at every step.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="With --method aware: distil the codes further, for so many tokens (200k), a "
            "time (20min), or auto. With matryoshka: how long the bases are trained.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    search_ranks: Annotated[
        bool,
        typer.Option(
            "--search-ranks",
            help="With --method matryoshka: search a rank for every head, greedily.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Store each number of a code as an integer of 2, 3, 4 or 8 bits, with a scale for "
            "32 of them. The codes of cskv are tuned for it, at the size that is asked for.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    sink: Annotated[
        int,
        typer.Option(min=0, help="First tokens that are kept exactly.", rich_help_panel=_METHOD),
    ] = 4,
    window: Annotated[
        int,
        typer.Option(min=1, help="Last tokens that are kept exactly.", rich_help_panel=_METHOD),
    ] = 64,
    prefill: _options.Prefill = "dense",
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
    """Plan a low-rank code of every token of MODEL, with the first and last tokens kept exactly."""
    from kvtool.calibrate import projections as method_of
    from kvtool.checkpoint import Checkpoint
    from kvtool.distill import Amount
    from kvtool.kernels.quantise import BITS
    from kvtool.plan import Plan, base_of, check_can_drop, whole_layers
    from kvtool.plan_file import check_plan_output
    from kvtool.sizes import parse_budget

    if read is not None and method != "aware":
        raise UsageError(f"--read is for --method aware, {method} has a reading of its own")
    if layers_together is not None and method not in ("aware", "xkv"):
        raise UsageError(f"--layers-together is for aware and xkv, {method} takes one layer")
    if train is not None and method not in ("aware", "matryoshka"):
        raise UsageError(f"--train is for aware and matryoshka, nothing of {method} is trained")
    if search_ranks and method != "matryoshka":
        raise UsageError("--search-ranks is for --method matryoshka")
    amount = None if train is None else Amount.parse(train, "--train", method_of.AUTO)
    if bits is not None and (amount is not None or method == "matryoshka"):
        raise UsageError("--train and --bits do not go together: trained codes are not rounded")
    if bits not in (None, *BITS):
        raise UsageError(f"--bits {bits} is not possible: a code has numbers of 2, 3, 4 or 8 bits")
    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    context = _options.context_of(checkpoint, context)
    check_can_drop(checkpoint)
    start = Plan(base_of(checkpoint), whole_layers(checkpoint), prefill)
    native = start.native_bytes(context, BF16)
    options = method_of.ProjectionOptions(
        method,
        read or "absorbed",
        layers_together or (4 if method == "xkv" else 1),
        sink,
        window,
        context,
        amount,
        search_ranks,
        data,
        tokens,
        seed,
        bits,
        prefill,
    )
    allowed = parse_budget(kv_budget, native)
    method_of.check_budget(start, options, allowed, BF16)
    method_of.check_ring(checkpoint, options)
    method_of.check_keys(checkpoint, options)
    if dry_run:
        planned = {
            "method": method,
            "context": context,
            "codes": len(method_of.empty_codes(start, options)),
            "bits": bits,
            "bytes_at_most": allowed,
            "native_bytes": native,
            "memory_bytes": method_of.memory_bytes(checkpoint, start, options),
        }
        emit_planned(output, checkpoint.source, planned, json)
        return
    emit_made(
        lambda report: method_of.calibrate_projections(
            checkpoint, options, allowed, BF16, report=report
        ),
        output, context, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip

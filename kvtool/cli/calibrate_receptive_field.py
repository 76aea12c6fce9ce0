"""``kvtool calibrate receptive-field``: let states of a hybrid see beyond what it was taught."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.cli import _options
from kvtool.cli._plans import emit_made, emit_planned
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.sizes import BF16

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint

_METHOD = "Method"


def receptive_field(
    model: _options.Model,
    output: _options.Output,
    length: Annotated[
        int,
        typer.Option(
            min=2, help="Tokens of the texts that MODEL is to read.", rich_help_panel=_METHOD
        ),
    ],
    taught: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the texts that MODEL was taught with; default: what kvtool noted, "
            "if it taught MODEL.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    plan: _options.StartPlan = None,
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
    """Plan which tokens the Mamba-2 heads of MODEL skip in texts longer than it was taught with."""
    from kvtool.calibrate import receptive_field as method_of
    from kvtool.calibrate.bit_options import QuantizationOptions
    from kvtool.calibrate.quantization import everything
    from kvtool.checkpoint import Checkpoint
    from kvtool.factored import model_config
    from kvtool.layout import describe
    from kvtool.plan import base_of
    from kvtool.plan_file import check_plan_output

    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    mixers = [layout.mixer for layout in describe(model_config(checkpoint)) if layout.mixer]
    if not any(mixer.rule == "mamba2" for mixer in mixers):
        raise UnsupportedModelError(f"no layer of {checkpoint.source} keeps a state of Mamba-2")
    if taught is None and (taught := _noted(checkpoint)) is None:
        raise UsageError(
            f"{checkpoint.source} does not say with how long texts it was taught",
            hint="say it with --taught",
        )
    start = _options.read_plan(plan, checkpoint)
    if start is None:
        start = everything(checkpoint, base_of(checkpoint), QuantizationOptions())
    method_of.check_lengths(checkpoint, start, taught, length)
    if dry_run:
        facts = {
            "taught": taught,
            "context": length,
            "bytes": start.cache_bytes(length, BF16),  # thresholds change none
            "native_bytes": start.native_bytes(length, BF16),
            "memory_bytes": method_of.memory_bytes(checkpoint, start, tokens),
        }
        emit_planned(output, checkpoint.source, facts, json)
        return
    emit_made(
        lambda report: method_of.calibrate_receptive_field(
            checkpoint, start, taught, length, data, tokens, seed, report=report
        ),
        output, length, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip


def _noted(checkpoint: Checkpoint) -> int | None:
    """The window that `convert --to mamba` taught with."""
    from kvtool.convert.artifact import read_manifest

    if checkpoint.manifest is None:
        return None
    manifest = read_manifest(checkpoint.path)
    healing = manifest["plan"].get("healing")
    if not healing or not manifest["arms"]["mamba"].get("learned", True):
        return None  # the closed form was taught nothing
    return int(healing["window"])

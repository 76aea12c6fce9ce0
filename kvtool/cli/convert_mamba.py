"""``kvtool convert --to mamba``: Mamba-2 in some layers, and the controls beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.filesize import decimal

from kvtool.cli import _console, _options
from kvtool.errors import GateError, UsageError

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint


def convert_mamba(
    model: str,
    output: Path,
    *,
    layers: str | None,
    kv_budget: str | None,
    heal: str | None,
    teacher: str | None,
    loss: Literal["forward-kl", "reverse-kl"],
    data: str | None,
    tokens: int,
    seed: int,
    dtype: str,
    device: str,
    shard_size: str,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    verify: bool,
    json: bool,
    quiet: bool,
    offline: bool,
    revision: str | None,
    trust_remote_code: bool,
    misplaced: list[str],
) -> None:
    """The options are those of ``kvtool convert``; `misplaced` are for other conversions."""
    from kvtool.calibrate.layer_importance import ImportanceOptions, rank_layers, reaches
    from kvtool.checkpoint import Checkpoint
    from kvtool.cli.convert import add_plan, check_memory, finish, new_table
    from kvtool.convert import mamba, mamba_planning
    from kvtool.distill import processes

    if misplaced:
        raise UsageError(f"{misplaced[0]} has no place in --to mamba")
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    mamba_planning.require(checkpoint)
    device = _options.resolve_device(device)
    opened = None
    if teacher is not None:
        opened = Checkpoint.open(teacher, offline=offline, trust_remote_code=trust_remote_code)
    wanted = _Layers(checkpoint, layers, kv_budget)
    # Until they are ranked, any layers stand in for those that will be replaced.
    first = wanted.named or tuple(range(wanted.count))

    def options(replaced: tuple[int, ...]) -> Any:
        return mamba_planning.MambaOptions(
            layers=replaced, heal=heal or "auto", teacher=teacher, loss=loss, data=data,
            tokens=tokens, seed=seed, dtype=dtype, shard_size=shard_size,
        )  # fmt: skip

    main = processes()[0] == 0
    planned = mamba_planning.plan(
        checkpoint, options(first), output if main else None,
        device=device, overwrite=overwrite, teacher=opened,
    )  # fmt: skip
    check_memory(planned, device, verify)
    if dry_run:
        if not wanted.named:
            planned["replaced_layers"] = f"{wanted.count}, to be ranked"
        if not main:
            return
        table = new_table(f"{model} to mamba: nothing written")
        add_plan(table, {**planned, "replaced_layers": [planned["replaced_layers"]]})
        table.add_row("disk needed", decimal(planned["disk_bytes"]))
        table.add_row("memory to convert, about", decimal(planned["memory_bytes"]))
        _console.emit(planned, json, table)
        return
    with _console.progress(quiet or not main) as report:
        replaced = wanted.named
        if not replaced:
            ranking = ImportanceOptions(wanted.count, data=data, tokens=tokens, seed=seed)
            reach = reaches(checkpoint, ranking, report)
            ranked = rank_layers(checkpoint, ranking, reach, device=device, report=report)
            replaced = tuple(sorted(score.layer for score in ranked[: wanted.count]))
        result = mamba.convert(
            checkpoint,
            output,
            options(replaced),
            report=report,
            overwrite=overwrite,
            resume=resume,
            device=device,
            teacher=opened,
        )
    if result is None:  # another process of accelerate launch writes
        return
    table = new_table(f"{model} to mamba: {output}")
    add_plan(table, result.plan)
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("peak memory", decimal(result.peak_memory_bytes))
    for arm, about in result.arms.items():
        what = "result" if arm == "mamba" else f"control: {arm}"
        told = f"KL {about['kl']:.4f}, perplexity x{about['perplexity_ratio']:.4f} on held-out text"
        if heal != "0" and not about["learned"]:
            told += "; taught so briefly it got worse, so this is the closed form"
        table.add_row(what, told)
    finish(output, checkpoint, result.to_dict(), table, verify=verify, json=json, quiet=quiet)
    if lost := [arm for arm, beaten in result.beaten.items() if not beaten]:
        raise GateError(
            f"{output}: the mixers are not clearly nearer to {model} than the control "
            f"'{lost[0]}', so they are of no use",
            hint="replace other or fewer layers, or teach them longer with --heal",
        )


class _Layers:
    """Which layers, or how many, as the user said it.

    Attributes:
        named: The layers, empty where they are to be ranked.
        count: How many.
    """

    def __init__(self, checkpoint: Checkpoint, layers: str | None, budget: str | None) -> None:
        total = int(checkpoint.hf_config().num_hidden_layers)
        text = (layers or "").strip()
        self.named: tuple[int, ...] = ()
        if text == "auto":
            self.count = self._within(checkpoint, budget, total)
            return
        if budget is not None:
            raise UsageError("--kv-budget says how many layers --layers auto replaces")
        if not text:
            raise UsageError("--to mamba needs --layers: how many, which ones, or auto")
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts or not all(part.isdecimal() for part in parts):
            raise UsageError(
                f"--layers {layers} is neither a number such as 8, nor a list such as 9,12,20, nor "
                "'auto'"
            )
        if "," in text:
            self.named = tuple(sorted(map(int, parts)))
            self.count = len(self.named)
            return
        self.count = int(text)
        if not 0 < self.count < total:
            raise UsageError(
                f"--layers {text} is impossible: the model has {total} layers, and one has to keep "
                "its attention",
                hint=None if self.count else "for layer 0 alone, write --layers 0,",
            )

    def _within(self, checkpoint: Checkpoint, budget: str | None, total: int) -> int:
        from kvtool.convert.targets import parse_budget
        from kvtool.layout import describe

        if budget is None:
            raise UsageError("--layers auto needs --kv-budget")
        layout = describe(checkpoint.hf_config())[0]
        allowed = parse_budget(budget, layout, total) * total
        kept = allowed // layout.cached_values
        if not 1 <= kept < total:
            raise UsageError(
                f"--kv-budget {budget} leaves attention in {max(kept, 0)} of {total} layers: at "
                "least one has to keep it, and one to lose it"
            )
        return total - int(kept)

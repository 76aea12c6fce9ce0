"""``kvtool convert --to mamba``: Mamba-2 in some layers, and the controls beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from kvtool.errors import GateError, UsageError

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint
    from kvtool.cli._conversion import Run
    from kvtool.convert.options import ConvertOptions


def convert_mamba(
    run: Run,
    asked: ConvertOptions,
    layers: str | None,
    loss: Literal["forward-kl", "reverse-kl"],
) -> None:
    """`layers` and `loss` are those of the command, `asked` is what other conversions take too."""
    from kvtool.calibrate.layer_importance import ImportanceOptions, rank_layers, reaches
    from kvtool.convert import mamba, mamba_planning

    checkpoint = run.checkpoint
    mamba_planning.require(checkpoint)
    wanted = _Layers(checkpoint, layers, asked.kv_budget)
    options = mamba_planning.MambaOptions(
        # Until they are ranked, any layers stand in for those that will be replaced.
        layers=wanted.named or tuple(range(wanted.count)),
        heal=asked.heal or "auto",
        teacher=asked.teacher,
        loss=loss,
        data=asked.data,
        tokens=asked.tokens,
        seed=asked.seed,
        dtype=asked.dtype,
        shard_size=asked.shard_size,
    )
    if run.is_first:
        planned = mamba_planning.plan(
            checkpoint,
            options,
            run.output,
            device=run.device,
            overwrite=run.overwrite,
            teacher=run.teacher,
        )
        run.check_memory(planned)
        if run.dry_run and not wanted.named:
            planned["replaced_layers"] = f"{wanted.count}, to be ranked"
        if run.dry_run:
            run.show(planned)
    if run.dry_run:
        return
    with run.progress() as report:
        if not wanted.named:
            ranking = ImportanceOptions(
                wanted.count, data=asked.data, tokens=asked.tokens, seed=asked.seed
            )
            reach = reaches(checkpoint, ranking, report)
            ranked = rank_layers(checkpoint, ranking, reach, device=run.device, report=report)
            best = sorted(score.layer for score in ranked[: wanted.count])
            options = replace(options, layers=tuple(best))
        result = mamba.convert(checkpoint, run.output, options, report=report, **run.conditions)
    if result is None:  # another process of accelerate launch writes
        return
    run.finish(result, _told(result.arms, taught=asked.heal != "0"))
    if lost := [arm for arm, beaten in result.beaten.items() if not beaten]:
        raise GateError(
            f"{run.output}: the mixers are not clearly nearer to {checkpoint.source} than the "
            f"control '{lost[0]}', so they are of no use",
            hint="replace other or fewer layers, or teach them longer with --heal",
        )


def _told(arms: dict[str, dict[str, Any]], *, taught: bool) -> dict[str, str]:
    """How good the result and its controls are, in words."""
    rows = {}
    for arm, about in arms.items():
        told = f"KL {about['kl']:.4f}, perplexity x{about['perplexity_ratio']:.4f} on held-out text"
        if taught and not about["learned"]:
            told += "; taught so briefly it got worse, so this is the closed form"
        rows["result" if arm == "mamba" else f"control: {arm}"] = told
    return rows


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

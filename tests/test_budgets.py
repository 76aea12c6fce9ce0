"""Token budgets: every method spends the same bytes, to the token, and the runtime keeps those."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvtool.calibrate.budgets import (
    METHODS,
    BudgetOptions,
    Method,
    calibrate_budgets,
    share_out,
)
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.errors import UsageError
from kvtool.plan import Plan
from kvtool.runtime import Engine

CONTEXT, MINIMUM = 128, 8
HEADS, TOKEN = 6, 2 * 2 * 16  # of the tiny model: all KV heads, bytes of a token in one at bf16


def options(method: Method, **changes: object) -> BudgetOptions:
    asked = {"context": CONTEXT, "minimum": MINIMUM, "tokens": 1024, **changes}
    return BudgetOptions(method, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["snapkv", "expected"])
def test_a_budget_is_spent_to_the_token_and_kept_by_the_runtime(
    tiny: Callable[..., Path], method: Method, policy: str
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    total = HEADS * CONTEXT // 2 + 5  # not a multiple of anything
    plan = calibrate_budgets(checkpoint, options(method, policy=policy), total * TOKEN + 7, 2)
    assert plan.cache_bytes(CONTEXT, 2) == total * TOKEN
    budgets = [budget for layer in plan.layers for budget in layer.budgets]
    assert all(budget is not None and MINIMUM <= budget <= CONTEXT for budget in budgets)

    engine = Engine.load(checkpoint, plan=plan)
    cache = engine.new_cache(1, CONTEXT)
    engine.extend(cache, torch.arange(CONTEXT) % 200)
    assert cache.allocated_bytes == plan.cache_bytes(CONTEXT, 4)


def test_what_statistics_say_decides_and_what_they_cost_is_paid_once(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path))
    checkpoint = Checkpoint.open(str(tiny("llama")))
    told: list[tuple[str, int, int]] = []

    def budgets(method: Method) -> list[int | None]:
        plan = calibrate_budgets(
            checkpoint,
            options(method),
            HEADS * CONTEXT * 2 // 5 * TOKEN,
            2,
            report=lambda *progress: told.append(progress),
        )
        return [budget for layer in plan.layers for budget in layer.budgets]

    mass = budgets("mass")
    assert told
    assert len(set(mass)) > 1
    told.clear()
    assert budgets("mass") == mass
    assert budgets("adakv") != mass
    assert told == []


def test_what_sink_logits_hold_is_kept_without_a_token() -> None:
    """Two layers whose tokens share alike what is left of the attention, all of it and a tenth."""
    curve = torch.tensor([0.5, 0.8, 0.9, 1.0], dtype=torch.float64).expand(2, 4)
    layers = [SimpleNamespace(budget_mass=share * curve) for share in (1.0, 0.1)]
    statistics = SimpleNamespace(budgets=[16, 32, 64, 128], layer=layers.__getitem__)
    asked = options("prefixkv", minimum=1)
    found = share_out(asked, [0, 1], 2, 2 * 2 * 48, statistics)  # type: ignore[arg-type]
    # Either loses 0.067 of its attention: 0.9 + 0.1 · 21 / 64 is kept, and 0.9 + 0.05 · 11 / 16.
    assert found.tolist() == [[85, 85], [11, 11]]


@pytest.mark.parametrize(
    "share",
    [0.01, 1.5],
)
def test_impossible_budgets_are_refused(tiny: Callable[..., Path], share: float) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    with pytest.raises(
        UsageError, match=r"all of them take [\d,]+, and the \d+ that every head keeps"
    ):
        calibrate_budgets(checkpoint, options("uniform"), int(share * HEADS * CONTEXT * TOKEN), 2)


@pytest.mark.parametrize(
    ("family", "overrides", "arguments", "code", "message"),
    [
        ("llama", {}, ["--context", "100000"], 2, "beyond the model's 512 tokens"),
        ("llama", {}, ["--minimum", "400"], 2, "the 400 that every head keeps at least"),
        ("mistral", {"sliding_window": 64}, [], 4, "sliding window"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_could_not_run_is_not_planned(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    overrides: dict[str, int],
    arguments: list[str],
    code: int,
    message: str,
    dry: bool,
) -> None:
    model, output = str(tiny(family, **overrides)), tmp_path / "plan"
    command = ["calibrate", "budgets", model, "-o", str(output), "--kv-budget", "50%", *arguments]
    assert run_command([*command, *["--dry-run"] * dry]) == code
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_dry_run_says_what_the_cache_will_take_and_writes_nothing(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", "budgets", str(tiny("llama")), "-o", str(tmp_path / "plan")]
    assert run_command([*command, "--kv-budget", "25%", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["native_bytes"] == HEADS * 512 * TOKEN
    assert planned["bytes"] == planned["native_bytes"] // 4
    assert not (tmp_path / "plan").exists()


def test_budgets_compose_with_streaming_heads_on_the_command_line(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny("llama"))
    heads, budgets, both = (str(tmp_path / name) for name in ("heads", "budgets", "both"))
    calls = [
        ["calibrate", "retrieval-heads", model, "-o", heads, "--method", "entropy"],
        ["calibrate", "budgets", model, "-o", budgets, "--kv-budget", "50%", "--context", "256"],
        ["plan", "compose", heads, budgets, "-o", both],
    ]
    calls[0] += ["--window", "32"]
    for call in calls:
        assert run_command([*call, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kv_heads"] == HEADS
    plan = Plan.read(Path(both))
    assert plan.streaming_heads == 3
    assert plan.policy == "snapkv"
    arguments = ["generate", model, "the quick brown fox " * 30, "--plan", both]
    assert run_command([*arguments, "--max-new-tokens", "4"]) == 0

"""`kvtool plan` shows what a plan keeps, slices another size from it, and puts two together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvtool.cli._plans import head_picture
from kvtool.cli.plan import plan_app
from kvtool.errors import KvtoolError, PlanError, UsageError
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Base, Plan
from kvtool.slices import compose, cut, stream_heads

BASE = Base("m", "f", "c", layers=4, kv_heads=2, head_dim=16)
FULL = LayerPlan((False, False))
NATIVE = 2 * 2 * 16 * 4 * 2  # bytes per token in bf16
app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(plan_app)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    scores = torch.arange(8, dtype=torch.float32).view(4, 2)
    plan = Plan(BASE, (FULL,) * 4, scores=scores, provenance=({"method": "duo", "seed": 3},))
    stream_heads(plan, 4, 16, 48).write(tmp_path / "heads.plan")
    return tmp_path / "heads.plan"


@pytest.fixture
def budgets(tmp_path: Path) -> Path:
    layers = (LayerPlan((False, False), budget=(100, 200)),) * 4
    plan = Plan(BASE, layers, policy="snapkv", provenance=({"method": "ada"},))
    plan.write(tmp_path / "budgets.plan")
    return tmp_path / "budgets.plan"


def run(*arguments: str | Path) -> str:
    """What the command prints; its errors come through."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if isinstance(result.exception, KvtoolError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str | Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return answer


def test_show_states_model_method_heads_and_bytes_beside_the_native_cache(heads: Path) -> None:
    shown = run("show", heads)
    for said in (
        "m",
        "duo",
        "dense",
        "4 of 8 KV heads, the first 16 and last 48 tokens",
        "2 2 0 0",
        f"{NATIVE // 2:,} bytes per further token (native {NATIVE:,})",
        "at 4,096 tokens",
        "2.1 MB, 50.8%",
    ):
        assert said in shown
    answer = run_json("show", heads, "--context", "1000")
    assert answer["bytes_per_token"] == NATIVE // 2
    assert answer["native_bytes"] == NATIVE * 1000
    assert answer["bytes"] == NATIVE // 2 * (1000 + 64) == Plan.read(heads).cache_bytes(1000, 2)
    assert answer["provenance"] == [{"method": "duo", "seed": 3}]


def test_the_picture_has_a_row_per_head_and_a_column_per_layer(heads: Path, budgets: Path) -> None:
    assert head_picture(Plan.read(heads)).splitlines()[:2] == ["0 ··██", "1 ··██"]
    assert head_picture(Plan.read(budgets)).splitlines()[:2] == ["0 ▒▒▒▒", "1 ▒▒▒▒"]
    assert head_picture(Plan.read(heads)) in run("show", heads)
    assert head_picture(Plan.read(heads)).endswith("; █ full  · streaming")
    assert head_picture(Plan.read(budgets)).endswith("; ▒ token budget")


def test_nothing_is_drawn_of_heads_that_are_all_kept_alike(budgets: Path, tmp_path: Path) -> None:
    Plan(BASE, (FULL,) * 4, provenance=({"method": "aware"},)).write(tmp_path / "alike.plan")
    shown = run("show", tmp_path / "alike.plan")
    assert "streaming" not in shown
    assert "rows: KV heads" not in shown
    assert "rows: KV heads" in run("show", budgets)


def test_a_slice_is_what_the_plan_itself_cuts(heads: Path, tmp_path: Path) -> None:
    plan, output = Plan.read(heads), tmp_path / "slice.plan"
    answer = run_json("slice", heads, "-o", output, "--kv-budget", "70%", "--context", "1000")
    assert answer["plan"] == str(output)
    assert answer["bytes"] <= 0.7 * answer["native_bytes"]
    assert Plan.read(output).layers == cut(plan, 7 * NATIVE * 100, 1000, 2).layers
    run(
        "slice",
        heads,
        "-o",
        output,
        "--kv-budget",
        f"{NATIVE}kB",
        "--context",
        "1500",
        "--overwrite",
    )
    assert Plan.read(output).layers == cut(plan, NATIVE * 1000, 1500, 2).layers
    for text, count in (("75%", 6), ("5", 5), ("0", 0)):
        run("slice", heads, "-o", output, "--streaming-heads", text, "--overwrite")
        assert Plan.read(output).layers == stream_heads(plan, count, 16, 48).layers


def test_slicing_back_gives_the_same_file(heads: Path, tmp_path: Path) -> None:
    small, back = tmp_path / "small.plan", tmp_path / "back.plan"
    run("slice", heads, "-o", small, "--streaming-heads", "7")
    run("slice", small, "-o", back, "--streaming-heads", "50%")
    assert back.read_bytes() == heads.read_bytes()


def test_composing_leaves_budgets_to_the_heads_that_do_not_stream(
    heads: Path, budgets: Path, tmp_path: Path
) -> None:
    output = tmp_path / "both.plan"
    answer = run_json("compose", heads, budgets, "-o", output)
    assert (answer["policy"], answer["methods"]) == ("snapkv", ["duo", "ada"])
    assert [layer["budget"] for layer in answer["layers"]] == [None, None, [100, 200], [100, 200]]
    assert Plan.read(output).layers == compose(Plan.read(heads), Plan.read(budgets)).layers
    shown = run("show", output)
    assert "4 KV heads, 100 to 200 tokens, chosen by snapkv" in shown
    assert "0 ··▒▒" in shown


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "either"),
        (["--kv-budget", "50%", "--streaming-heads", "50%"], "either"),
        (["--kv-budget", "half"], "budget"),
        (["--streaming-heads", "9"], "number up to 8"),
        (["--kv-budget", "1%"], "too small"),
    ],
)
def test_an_impossible_slice_is_refused_and_writes_nothing(
    options: list[str], complaint: str, heads: Path, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, PlanError), match=complaint):
        run("slice", heads, "-o", tmp_path / "slice.plan", *options)
    assert not (tmp_path / "slice.plan").exists()


def test_outputs_are_kept_and_strangers_refused(heads: Path, budgets: Path, tmp_path: Path) -> None:
    before = budgets.read_bytes()
    for command in (
        ["slice", heads, "-o", budgets, "--streaming-heads", "1"],
        ["compose", heads, budgets, "-o", budgets],
    ):
        with pytest.raises(UsageError, match="exists already"):
            run(*command)
    assert budgets.read_bytes() == before
    other = tmp_path / "other.plan"
    replace(Plan.read(budgets), base=replace(BASE, fingerprint="g")).write(other)
    with pytest.raises(PlanError, match="different models"):
        run("compose", heads, other, "-o", tmp_path / "both.plan")
    with pytest.raises(PlanError, match="no such file"):
        run("show", tmp_path / "missing.plan")


def test_show_counts_in_words_that_fit(tmp_path: Path) -> None:
    layers = (LayerPlan((False, False), budget=(128, 128)),) * 4
    Plan(BASE, layers, policy="snapkv").write(tmp_path / "p")
    assert "8 KV heads, 128 tokens, chosen" in run("show", tmp_path / "p")

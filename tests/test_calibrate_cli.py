"""`kvtool calibrate retrieval-heads` and `compare-heads`, and the commands that run their plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import convert
from conftest import make_model
from rich.filesize import decimal

from kvtool.calibrate import heads
from kvtool.calibrate.duo import GatedModel
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.slices import ring_of, stream_heads

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

SINK, WINDOW = 4, 28
RING = ["--sink", str(SINK), "--window", str(WINDOW)]
QUICK = [*RING, "--length", "300", "--samples", "2"]
HEADS, LAYERS, HEAD_DIM = 2, 3, 16
NATIVE = 2 * 2 * HEAD_DIM * HEADS * LAYERS  # bytes per token in bf16


def calibrate(model: Path | str, output: Path, *arguments: str) -> int:
    return run_command(["calibrate", "retrieval-heads", str(model), "-o", str(output), *arguments])


def answer(capture: Capture) -> dict[str, Any]:
    """What a command with --json printed: one object and nothing else."""
    result: dict[str, Any] = json.loads(capture.readouterr().out)
    return result


def failure(capture: Capture) -> str:
    """What a refused command said: one sentence, perhaps a hint, and nothing on stdout."""
    captured = capture.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert all(line.startswith("hint: ") for line in lines[1:])
    return str(captured.err)


@pytest.fixture(scope="module")
def entropy(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan from the command itself, half of whose heads stream."""
    output = tmp_path_factory.mktemp("plans") / "entropy.plan"
    assert calibrate(tiny("llama"), output, "--method", "entropy", "-q", "--json", *RING) == 0
    return output


def scored(model: Path, scores: list[float], output: Path, method: str = "duo") -> Path:
    """A plan with these scores by layer and head, half of whose heads stream."""
    full = (LayerPlan((False,) * HEADS),) * LAYERS
    provenance = ({"method": method},)
    table = torch.tensor(scores, dtype=torch.float32).view(LAYERS, HEADS)
    plan = Plan(base_of(Checkpoint.open(str(model))), full, provenance=provenance, scores=table)
    stream_heads(plan, len(scores) // 2, SINK, WINDOW).write(output)
    return output


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that tokenizes faster than the built-in text."""
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    paragraphs = [" ".join(f"{i}," for i in range(n, n + 100)) for n in range(1000, 9000, 100)]
    file.write_text("\n\n".join(paragraphs))
    return str(file)


@pytest.fixture
def no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models pass the check for recall, too."""
    monkeypatch.setattr(heads, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(heads, "MAX_NLL", float("inf"))


# ----------------------------------------------------------------------------- retrieval-heads


def test_calibration_leaves_a_plan_that_can_be_shown(
    tiny: Tiny, entropy: Path, capfd: Capture
) -> None:
    plan = Plan.read(entropy)
    assert plan.streaming_heads == 3, "half of them, where nothing else is asked for"
    assert ring_of(plan) == (SINK, WINDOW)
    assert plan.scores is not None
    assert plan.layers == stream_heads(plan, 3, SINK, WINDOW).layers
    plan.check_base(Checkpoint.open(str(tiny("llama"))))
    assert run_command(["plan", "show", str(entropy)]) == 0
    shown = capfd.readouterr().out
    assert "entropy" in shown
    assert f"3 of 6 KV heads, the first {SINK} and last {WINDOW} tokens" in shown


def test_json_is_one_object_that_says_what_the_plan_says(
    tiny: Tiny, tmp_path: Path, capfd: Capture
) -> None:
    output = tmp_path / "a.plan"
    command = ["--method", "entropy", "--kv-budget", "55%", "--context", "512", *RING]
    assert calibrate(tiny("llama"), output, *command, "--json") == 0
    shown = answer(capfd)
    plan = Plan.read(output)
    assert shown["methods"] == ["entropy"]
    assert shown["provenance"] == list(plan.provenance)
    assert shown["bytes"] == plan.cache_bytes(512, 2) <= 0.55 * NATIVE * 512
    assert shown["native_bytes"] == NATIVE * 512
    fewer = stream_heads(plan, shown["streaming_heads"] - 1, SINK, WINDOW)
    assert fewer.cache_bytes(512, 2) > 0.55 * NATIVE * 512
    assert shown["seconds"] > 0


@pytest.mark.parametrize(("text", "count"), [("0", 0), ("2", 2), ("34%", 2), ("100%", 6), ("6", 6)])
def test_streaming_heads_are_a_number_or_a_share(
    tiny: Tiny, tmp_path: Path, capfd: Capture, text: str, count: int
) -> None:
    output = tmp_path / "a.plan"
    command = ["--method", "entropy", "--streaming-heads", text, *RING, "-q", "--json"]
    assert calibrate(tiny("llama"), output, *command) == 0
    assert answer(capfd)["streaming_heads"] == count == Plan.read(output).streaming_heads


def test_a_ring_that_is_never_made_may_be_longer_than_the_context(
    tiny: Tiny, tmp_path: Path
) -> None:
    model, output = tiny("llama"), tmp_path / "a.plan"
    ring = ("--method", "entropy", "--sink", "0", "--window", "513")
    assert calibrate(model, output, "--streaming-heads", "1", *ring, "--dry-run") == 2
    assert calibrate(model, output, "--streaming-heads", "0", *ring, "-q") == 0
    Engine.load(Checkpoint.open(str(model)), plan=Plan.read(output))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--kv-budget", "55%", "--streaming-heads", "50%"], 2, "both"),
        (["--window", "0"], 2, "--window"),
        (
            ["--window", "497", "--method", "entropy"],
            2,
            "--sink and --window: layer 0 keeps 513 tokens exactly, more than the 512 positions",
        ),
        (["--length", "272"], 2, "272"),
        (["--length", "600"], 2, "--length 600"),
        (["--streaming-heads", "7"], 2, "'7'"),
        (["--kv-budget", "half"], 2, "'half'"),
        (["--kv-budget", "1%"], 2, "too small"),
        (["--samples", "0"], 2, "--samples"),
        (["--method", "duo", "--penalty", "-1"], 2, "--penalty"),
        (["--mix", "teacher"], 2, "--mix is for --method duo: ablation trains nothing"),
        (["--method", "entropy", "--samples", "2"], 2, "entropy does not need"),
        (["--method", "guess"], 2, "guess"),
        (["--prefill", "lazy"], 2, "lazy"),
    ],
)
def test_a_wrong_request_is_refused_before_the_work(
    tiny: Tiny,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(heads, "score_heads", lambda *_, **__: pytest.fail("work was done"))
    assert calibrate(tiny("llama"), tmp_path / "a.plan", *arguments) == code
    assert said in failure(capsys)
    assert list(tmp_path.iterdir()) == []


def test_hints_name_flags_that_exist(
    tiny: Tiny, text: str, tmp_path: Path, capsys: Capture
) -> None:
    for arguments in (["--window", "497"], ["--length", "600"], QUICK):
        assert calibrate(tiny("llama"), tmp_path / "a.plan", "--data", text, *arguments) in (1, 2)
        flags = {word.strip(",.;:") for word in failure(capsys).split() if word.startswith("--")}
        assert flags <= {"--length", "--sink", "--window", "--method"}


def test_an_output_is_kept_unless_it_is_a_plan_to_be_replaced(
    tiny: Tiny, entropy: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "score_heads", lambda *_, **__: pytest.fail("work was done"))
    before = entropy.read_bytes()
    assert calibrate(tiny("llama"), entropy, "--method", "entropy") == 2
    assert "exists already" in failure(capsys)
    assert entropy.read_bytes() == before
    stranger = tmp_path / "notes.txt"
    stranger.write_text("mine")
    assert calibrate(tiny("llama"), stranger, "--method", "entropy", "--overwrite") == 2
    assert "not a plan" in failure(capsys)
    assert stranger.read_text() == "mine"
    assert calibrate(tiny("llama"), tmp_path / "no" / "a.plan", "--method", "entropy") == 2
    assert "does not exist" in failure(capsys)


def test_a_folder_beside_the_output_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    stranger = tmp_path / "a.plan.partial"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    assert calibrate(tiny("llama"), tmp_path / "a.plan", "--method", "entropy", "-q") == 0
    assert (stranger / "notes.txt").read_text() == "mine"


def test_training_does_not_go_on_in_a_strangers_folder(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = tmp_path / "a.plan.partial"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    assert calibrate(tiny("llama"), tmp_path / "a.plan", "--method", "duo") == 2
    assert "is in the way" in failure(capsys)
    assert (stranger / "notes.txt").read_text() == "mine"


def test_dry_run_tells_the_size_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "score_heads", lambda *_, **__: pytest.fail("work was done"))
    command = ["--dry-run", "--kv-budget", "55%", "--context", "512", *RING]
    assert calibrate(tiny("llama"), tmp_path / "a.plan", *command, "--json") == 0
    planned = answer(capfd)
    assert planned["dry_run"] is True
    assert planned["bytes"] <= 0.55 * planned["native_bytes"]
    assert planned["streaming_heads"] == 3
    assert calibrate(tiny("llama"), tmp_path / "a.plan", *command) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "nothing written" in shown
    assert f"cache, bf16 {decimal(planned['bytes'])} (" in shown
    assert "dry run" not in shown
    assert calibrate(tiny("llama"), tmp_path / "a.plan", "--dry-run", "--window", "497") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_recall_is_refused_with_the_reason(
    tiny: Tiny, text: str, tmp_path: Path, capsys: Capture
) -> None:
    assert calibrate(tiny("llama"), tmp_path / "a.plan", "--data", text, *QUICK) == 1
    said = failure(capsys)
    assert all(kind in said for kind in ("ordinals: ", "names: ", "repetition: "))
    assert "hint: " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
def test_a_model_with_mla_is_exit_code_4(
    tiny: Tiny, tmp_path: Path, capsys: Capture, target: str
) -> None:
    convert(tiny("llama"), tmp_path / "mla", method="exact", target=target)
    for method in ("ablation", "entropy"):
        assert calibrate(tmp_path / "mla", tmp_path / "a.plan", "--method", method) == 4
        failure(capsys)
    assert not (tmp_path / "a.plan").exists()


def test_a_model_with_a_sliding_window_is_exit_code_4(
    tiny: Tiny, tmp_path: Path, capsys: Capture
) -> None:
    model = tiny("mistral", sliding_window=64)
    assert calibrate(model, tmp_path / "a.plan") == 4
    assert "sliding window" in failure(capsys)


def test_interrupted_training_goes_on_and_cleans_up(
    tiny: Tiny, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_bar: None
) -> None:
    command = ["--method", "duo", "--steps", "30", "--data", text, *QUICK, "-q"]
    whole, output = tmp_path / "whole.plan", tmp_path / "a.plan"
    assert calibrate(tiny("llama"), whole, *command) == 0
    assert list(tmp_path.iterdir()) == [whole]
    constrain, calls = GatedModel.constrain, []

    def interrupted(self: GatedModel) -> None:
        calls.append(self)
        if len(calls) == 28:
            raise KeyboardInterrupt
        constrain(self)

    monkeypatch.setattr(GatedModel, "constrain", interrupted)
    assert calibrate(tiny("llama"), output, *command) == 130
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.plan.partial", whole]
    calls.clear()
    assert calibrate(tiny("llama"), output, *command) == 0
    assert len(calls) == 1 + 5, "it went on behind the state of step 25"
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [output, whole]


# -------------------------------------------------------------------------------- compare-heads


def compare(*plans: Path | str, json: bool = True) -> int:
    return run_command(["calibrate", "compare-heads", *map(str, plans), *["--json"] * json])


def test_a_comparison_states_rank_correlation_and_shared_heads(
    tiny: Tiny, tmp_path: Path, capfd: Capture
) -> None:
    model = tiny("llama")
    a = scored(model, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], tmp_path / "a.plan")
    b = scored(model, [9, 5, 7, 4, 3, 2], tmp_path / "b.plan", "ablation")
    c = scored(model, [1, 2, 4, 8, 16, 32], tmp_path / "c.plan", "entropy")
    assert compare(a, b, c) == 0
    result = answer(capfd)
    assert result["plans"] == [str(a), str(b), str(c)]
    assert result["methods"] == [["duo"], ["ablation"], ["entropy"]]
    rho = 1 - 6 * (25 + 4 + 4 + 1 + 9 + 25) / (6 * 35)
    expected = [1.0, pytest.approx(rho), pytest.approx(1.0)]
    assert result["spearman"][0] == [pytest.approx(1.0), *expected[1:]]
    assert result["shared_full_heads_at_half"][0] == [1.0, 0.0, 1.0]
    assert compare(a, b, json=False) == 0
    shown = capfd.readouterr().out
    assert "duo (a.plan)" in shown
    assert "ablation (b.plan)" in shown
    assert f"{rho:.2f} / 0%" in shown
    assert "0 ·░▒" in shown


def test_heads_of_equal_score_are_shared_as_plans_share_them(
    tiny: Tiny, tmp_path: Path, capfd: Capture
) -> None:
    model = tiny("llama")
    a = scored(model, [1, 1, 1, 1, 0, 1], tmp_path / "a.plan")
    b = scored(model, [0, 0, 0, 0, 0, 0], tmp_path / "b.plan")
    full = []
    for path in (a, b):
        streaming = [x for layer in Plan.read(path).layers for x in layer.streaming]
        full.append({i for i, streams in enumerate(streaming) if not streams})
    assert compare(a, b) == 0
    result = answer(capfd)
    assert result["shared_full_heads_at_half"][0][1] == len(full[0] & full[1]) / 3
    assert result["spearman"][0][1] is None, "what is constant correlates with nothing"


def test_plans_that_cannot_be_compared_are_refused(
    tiny: Tiny, entropy: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other.plan"
    scored(tiny("mistral"), [1.0] * 6, other)
    full = (LayerPlan((False,) * HEADS),) * LAYERS
    Plan(Plan.read(entropy).base, full).write(tmp_path / "bare.plan")
    for plans, code, said in (
        ([entropy], 2, "two plans"),
        ([entropy, other], 2, "another model"),
        ([entropy, tmp_path / "bare.plan"], 2, "no scores"),
        ([entropy, tmp_path / "missing.plan"], 3, "no such file"),
    ):
        assert compare(*plans) == code
        assert said in failure(capsys)


# ----------------------------------------------------------------------------- running a plan


@pytest.mark.parametrize(
    "command", [["generate", "MODEL", "hello"], ["evaluate", "MODEL"], ["bench", "MODEL"]]
)
def test_a_plan_of_another_model_is_exit_code_3_before_weights_are_loaded(
    entropy: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    for kind, name in ((Engine, "load"), (Checkpoint, "load_transformers")):
        monkeypatch.setattr(kind, name, lambda *_, **__: pytest.fail("weights were loaded"))
    retrained = make_model("llama", tmp_path / "model", seed=1)
    arguments = [str(retrained) if word == "MODEL" else word for word in command]
    assert run_command([*arguments, "--plan", str(entropy)]) == 3
    assert "not their weights" in failure(capsys)


def test_a_plan_is_evaluated_beside_the_model_without_it(
    tiny: Tiny, tmp_path: Path, capfd: Capture
) -> None:
    plan = scored(tiny("llama"), [1, 0, 1, 0, 1, 0], tmp_path / "a.plan")
    command = ["evaluate", str(tiny("llama")), "--plan", str(plan), "--no-speed", "-q", "--json"]
    command += ["--prefill", "96", "--continuation", "32", "--windows", "2", "--length", "400"]
    assert run_command(command) == 0
    report = answer(capfd)
    assert report["plan"]["file"] == str(plan)
    assert report["plan"]["prefill"] == "dense"
    assert report["plan"]["streaming_heads"] == 3
    divergence = report["divergence"]
    assert divergence["kl"]["value"] > 0
    # Full heads are allocated by pages of 64 tokens, and 96 + 32 of them are two.
    assert divergence["cache_bytes"] == Plan.read(plan).cache_bytes(128, itemsize=4)
    assert divergence["base_cache_bytes"] == Plan.read(plan).native_bytes(128, itemsize=4)
    assert divergence["bf16_bytes"] == Plan.read(plan).cache_bytes(128, itemsize=2)
    assert divergence["base_bf16_bytes"] == Plan.read(plan).native_bytes(128, itemsize=2)
    share = divergence["bf16_bytes"] / divergence["base_bf16_bytes"]
    assert report["bytes_share"] == pytest.approx(share)
    assert share == pytest.approx((128 + SINK + WINDOW) / 256)


def test_text_is_generated_from_the_cache_that_the_plan_leaves(
    tiny: Tiny, tmp_path: Path, capfd: Capture
) -> None:
    plan = scored(tiny("llama"), [1, 0, 1, 0, 1, 0], tmp_path / "a.plan")
    prompt = "The quick brown fox jumps over the lazy dog. " * 4
    command = ["generate", str(tiny("llama")), prompt, "--max-new-tokens", "8", "-q", "--json"]
    texts, sizes = [], []
    for more in ([], ["--plan", str(plan)]):
        assert run_command([*command, *more]) == 0
        result = answer(capfd)
        texts.append(result["text"])
        sizes.append(result["cache_bytes"])
    assert sizes[1] < 0.8 * sizes[0]
    assert texts[0] != texts[1]

"""Label channels are those whose partial product errs least; the command says what is read."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from _convert_tools import convert
from torch import Tensor

from kvtool.bits import Bits
from kvtool.calibrate.double_sparsity import (
    calibrate_double_sparsity,
    label_orders,
    labelled,
    ordered,
)
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.statistics_file import Moments
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine

TEXT = StatisticsOptions(tokens=2048)


def random(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * torch.rand(shape[-1], generator=torch.Generator().manual_seed(seed)).double()


def moments(x: Tensor) -> Moments:
    """Of vectors `[..., n, W]`."""
    return Moments(x.shape[-2], x.mean(-2), x.abs().amax(-2).float(), x.mT @ x)


@pytest.fixture(scope="module")
def llama(tiny):
    return Checkpoint.open(str(tiny("llama")))


def everything(checkpoint: Checkpoint) -> Plan:
    base = base_of(checkpoint)
    return Plan(base, (LayerPlan((False,) * base.kv_heads),) * base.layers)


def test_each_next_label_leaves_the_least_error_over_all_pairs_of_queries_and_keys():
    queries, heads, size, n = 4, 2, 6, 50
    q, k = random(queries, n, size), random(n, heads * size, seed=1)
    q[..., 3] += 0.9 * q[..., 0]  # what channels have in common counts
    k[:, 3] -= 0.9 * k[:, 0]
    k[:, 1] += 5  # and what all tokens have in common does not
    seen = SimpleNamespace(rotated_queries=moments(q), rotated_keys=moments(k))
    orders = label_orders(cast(Any, seen), heads)
    for head in range(heads):
        own, labels = k[:, head * size : (head + 1) * size], []
        asked = q[2 * head : 2 * head + 2]

        def error(chosen: list[int], own: Tensor = own, asked: Tensor = asked) -> float:
            left = [c for c in range(size) if c not in chosen]
            errors = asked[..., left] @ own[:, left].T  # [g, queries, tokens]
            return float(errors.var(-1, correction=0).sum())

        for label in orders[head].tolist():
            rest = [c for c in range(size) if c not in labels]
            assert label == min(rest, key=lambda c: error([*labels, c]))
            labels.append(label)


def test_channels_that_err_alone_come_by_their_size():
    assert ordered(torch.tensor([2.0, 5.0, 1.0, 4.0]).diag()).tolist() == [1, 3, 0, 2]


def test_calibrated_labels_are_better_than_those_that_it_ranks_last(llama):
    every, eight = (
        calibrate_double_sparsity(llama, everything(llama), r, 100, TEXT) for r in (16, 8)
    )
    orders = [torch.tensor(layer.sparse.channels) for layer in every.layers]
    assert eight.layers == labelled(eight, [order[:, :8] for order in orders], 100).layers
    last = labelled(eight, [order[:, 8:] for order in orders], 100)
    ids = torch.randint(3, 300, (400,), generator=torch.Generator().manual_seed(0))

    def logits(plan: Plan | None) -> Tensor:
        engine = Engine.load(llama, plan=plan)
        cache = engine.new_cache(1, 400)
        engine.extend(cache, ids[:300])
        return engine.extend(cache, ids[300:], all_logits=True)

    expected = logits(None)
    all_, best, worst = (
        float((logits(plan) - expected).square().mean()) for plan in (every, eight, last)
    )
    assert all_ < 0.2 * best
    assert best < 0.8 * worst


def test_a_plan_says_what_it_was_made_of(llama):
    made = calibrate_double_sparsity(llama, everything(llama), 4, 20, TEXT)
    said = made.provenance[-1]
    assert said["method"] == "double-sparsity"
    assert said["options"] == {"channels": 4, "tokens_read": 20, "data": None, "seed": 0}
    assert said["tokens"] == 2048


# ------------------------------------------------------------------------------- the command


def command(model: str, output: object, *words: str) -> int:
    return run_command(["calibrate", "double-sparsity", model, "-o", str(output), *words])


def test_the_command_writes_a_plan_that_is_shown_sliced_and_run(llama, tmp_path, capsys):
    path, base = tmp_path / "p", base_of(llama)
    heads = LayerPlan((True, False), 2, 8)
    scores = torch.arange(6.0).view(3, 2)
    Plan(base, (heads,) * 3, scores=scores).write(tmp_path / "heads")
    words = [
        "--channels",
        "6",
        "--tokens-read",
        "30",
        "--plan",
        str(tmp_path / "heads"),
        "--json",
        "-q",
    ]
    assert command(llama.source, path, *words, "--dry-run") == 0
    ahead = json.loads(capsys.readouterr().out)
    assert not path.exists()
    assert command(llama.source, path, *words) == 0
    said, plan = json.loads(capsys.readouterr().out), Plan.read(path)
    assert said["context"] == ahead["context"] == 512
    read = 3 * 2 * ((6 * 512 + 2 * 16 * 30) + 2 * 16 * 10)
    assert said["bytes_read"] == ahead["bytes_read"] == read == plan.read_bytes(512, 2)
    assert said["bytes"] == ahead["bytes"] == 3 * 2 * 2 * 16 * (512 + 10)
    assert said["streaming_heads"] == 3
    assert run_command(["plan", "show", str(path), "--context", "512"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 layers: 30 tokens, of all that full heads keep chosen by 6 label channels" in shown
    assert "always the first 4 and last 16 tokens" in shown
    assert f"read {read / 1000:.1f} kB of these by each new token" in shown
    assert "it saves reading, not memory" in shown
    slice_ = ["plan", "slice", str(path), "-o", str(tmp_path / "s"), "--streaming-heads", "1"]
    assert run_command(slice_) == 0
    sliced = Plan.read(tmp_path / "s")
    assert [layer.sparse for layer in sliced.layers] == [layer.sparse for layer in plan.layers]
    assert sliced.streaming_heads == 1
    capsys.readouterr()
    generate = ["generate", llama.source, "some text " * 30, "--plan", str(tmp_path / "s")]
    assert run_command([*generate, "--max-new-tokens", "4", "--json", "-q"]) == 0
    evaluate = ["evaluate", llama.source, "--plan", str(path), "--windows", "1", "--length", "96"]
    capsys.readouterr()
    assert run_command([*evaluate, "--no-speed", "--no-layers", "--no-chat-prompts", "-q"]) == 0
    assert "tokens that a new one reads (full heads keep all)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--channels", "0"], 2, "--channels 0 is not possible: a head has 1 to 16"),
        (["--channels", "17"], 2, "--channels 17 is not possible"),
        (["--tokens-read", "0"], 2, "--tokens-read 0 is not possible: the first 4 and the last 16"),
        (["--tokens-read", "512"], 2, "is no less than all that"),
        (["--tokens", "0"], 2, "greater than or equal to 1"),
        (["--tokens", "256"], 2, "256"),
        (["--plan", "nowhere"], 3, "no such file"),
        (["--data", "nowhere.txt"], 2, "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_a_sentence(llama, tmp_path, capsys, words, code, message):
    assert command(llama.source, tmp_path / "p", *words, "-q") == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "p").exists()


def test_plans_that_leave_nothing_to_read_sparsely_are_refused(llama, tmp_path, capsys):
    base, plain = base_of(llama), everything(llama)
    few = replace(plain, layers=(LayerPlan((False, False), bits=Bits(4, 4)),) * 3)
    budgets = (LayerPlan((False, False), budget=(9, None)),) * 3
    streams = (LayerPlan((True, True), 2, 8),) * 3
    for number, (plan, message) in enumerate(
        (
            (few, "has codes, few bits or token budgets"),
            (Plan(base, budgets, policy="snapkv"), "has codes, few bits or token budgets"),
            (Plan(base, streams), "all heads of the plan of --plan stream"),
        )
    ):
        plan.write(tmp_path / str(number))
        words = ["--tokens-read", "30", "--plan", str(tmp_path / str(number)), "-q"]
        assert command(llama.source, tmp_path / "p", *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    labelled(plain, [torch.arange(4).expand(2, -1)] * 3, 30).write(tmp_path / "labels")
    assert command(llama.source, tmp_path / "p", "--plan", str(tmp_path / "labels"), "-q") == 2
    assert "the plan of --plan is read sparsely" in capsys.readouterr().err
    words = ["-o", str(tmp_path / "p"), "--plan", str(tmp_path / "labels"), "-q"]
    assert run_command(["calibrate", "quantization", llama.source, *words]) == 2
    assert "reads sparsely, which few bits do not go with" in capsys.readouterr().err
    words = [str(tmp_path / "labels"), str(tmp_path / "1"), "-o", str(tmp_path / "p")]
    assert run_command(["plan", "compose", *words]) == 3
    assert "label channels come last" in capsys.readouterr().err


def test_models_without_kv_heads_or_with_a_window_are_refused(tiny, tmp_path, capsys):
    convert(tiny("llama"), tmp_path / "latent", method="transmla", kv_budget="60%", freqfold="2")
    window = tiny("mistral", sliding_window=24)
    for model in (tmp_path / "latent", window):
        assert command(str(model), tmp_path / "p", "-q") == 4
        assert capsys.readouterr().err.strip()
    assert not (tmp_path / "p").exists()
    assert run_command(["calibrate", "statistics", str(tmp_path / "latent"), "-q"]) == 4
    assert "looks at keys and values of heads" in capsys.readouterr().err

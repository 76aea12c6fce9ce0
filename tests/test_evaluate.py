"""The evaluation protocol: what it measures, what it refuses, and that its gates hold."""

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import coded
from _family_cases import CASES
from _hybrid_tools import write_hybrid
from conftest import make_model, make_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file

from kvtool.bits import Bits
from kvtool.checkpoint import Checkpoint
from kvtool.cli import evaluate as evaluate_command
from kvtool.cli import run_command
from kvtool.cli.evaluate import check_output
from kvtool.corpus import evaluation_text
from kvtool.errors import CheckpointError, UsageError
from kvtool.evaluate import protocol, retrieval
from kvtool.evaluate.chat import Chat, ChatPrompt
from kvtool.evaluate.evaluation import Settings, conversion_cost, evaluate, manifest_base
from kvtool.evaluate.protocol import CacheSize, Divergence, Estimate, bf16_bytes
from kvtool.evaluate.report import Gates, Report
from kvtool.evaluate.retrieval import Recall
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, Policy, base_of
from kvtool.runtime import Engine

SHORT = Settings(
    windows=3,
    prefill=48,
    continuation=16,
    passkey_lengths=(256,),
    needle_contexts=1,
    chat_new_tokens=12,
    speed=False,
)
SHORT_WINDOWS = ["--windows", "2", "--prefill", "48", "--continuation", "16"]
SHORT_OPTIONS = ["--quick", *SHORT_WINDOWS, "--no-speed", "-q"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with noise on its key projections, and a manifest that names no base."""
    folder = make_model("llama", tmp_path_factory.mktemp("noisy"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("k_proj.weight"):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def measure(folder: Path, base: Path | None, settings: Settings = SHORT) -> Report:
    opened = None if base is None else Checkpoint.open(str(base))
    return evaluate(Checkpoint.open(str(folder)), opened, evaluation_text(), settings=settings)


def a_report(kl: float = 0.01, ratio: float = 1.02, correct: int = 3, asked: int = 4) -> Report:
    cache = CacheSize(100.0, 50.0, 0.0)
    return Report(
        source="X",
        base="BASE",
        settings={},
        environment={"dtype": "float32", "device": "cpu"},
        cache=cache,
        base_cache=cache,
        divergence=Divergence(
            windows=2,
            prefill=8,
            continuation=4,
            cache_bytes=12_000,
            base_cache_bytes=12_000,
            bf16_bytes=6_000,
            base_bf16_bytes=6_000,
            perplexity=Estimate(10.0, 1.0),
            base_perplexity=Estimate(9.8, 1.0),
            kl=Estimate(kl, 0.001),
            perplexity_ratio=Estimate(ratio, 0.01),
            top1_agreement=Estimate(0.9, 0.1),
        ),
        retrieval=[Recall("pass-key", 512, asked, correct, asked, correct)],
        speed=None,
        bandwidth=None,
        peak_memory={"process_bytes": 10**9},
        seconds=1.0,
        chat=Chat(
            max_new_tokens=160,
            prompts=[
                ChatPrompt("en", "Say hello.", ended=True, base_ended=True),
                ChatPrompt("en", "Say more.", ended=False, base_ended=True),
                ChatPrompt("de", "Sag nichts.", ended=True, base_ended=False),
            ],
        ),
    )


def test_a_model_against_itself_has_no_divergence_and_equal_recall(
    tiny: Callable[..., Path],
) -> None:
    report = measure(tiny("llama"), tiny("llama"))
    assert report.divergence.kl == Estimate(0.0, 0.0)
    assert report.divergence.perplexity_ratio == Estimate(1.0, 0.0)
    assert report.divergence.top1_agreement == Estimate(1.0, 0.0)
    assert report.divergence.perplexity == report.divergence.base_perplexity
    assert report.bytes_share == 1.0
    assert {recall.task for recall in report.retrieval} == {"pass-key", "4-key needle"}
    assert all(recall.correct == recall.base_correct for recall in report.retrieval)
    assert [(layer.kl, layer.output_error) for layer in report.layers] == [(0.0, 0.0)] * 3
    assert report.chat is not None
    assert all(prompt.ended == prompt.base_ended for prompt in report.chat.prompts)
    assert all(sample.text == sample.base for sample in report.samples)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["dense", "windows", "streaming", "4 bits", "mla", "states"])
def test_bytes_as_bfloat16_are_those_of_a_run_in_it(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    family, more = CASES["gemma3_text"] if kind == "windows" else ("llama", {})
    folder, plan = tiny(family, **more), None
    if kind == "mla":
        command = ["convert", str(folder), "--to", "mla", "-o", str(tmp_path / "mla")]
        assert run_command([*command, "--method", "exact", "--no-verify", "-q"]) == 0
        folder = tmp_path / "mla"
    elif kind == "states":
        write_hybrid(folder, tmp_path / "hybrid", [0, 2])
        folder = tmp_path / "hybrid"
    checkpoint = Checkpoint.open(str(folder))
    if kind in ("streaming", "4 bits"):
        bits = Bits(4, 4, 64) if kind == "4 bits" else None
        layers = (LayerPlan((True, False), 4, 20), LayerPlan((False, False), bits=bits)) * 2
        plan = Plan(base_of(checkpoint), layers[:3])
    found = set()
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine.load(checkpoint, dtype=dtype, plan=plan)
        found.add(bf16_bytes(engine, 128, 192))
    cache = engine.new_cache(1, 192)
    engine.extend(cache, torch.arange(3, 131))
    cache.reserve([192])
    assert found == {cache.allocated_bytes}


def test_damaged_weights_diverge(tiny: Callable[..., Path], noisy: Path) -> None:
    report = measure(noisy, tiny("llama"))
    assert all(layer.kl is not None and layer.kl > 1e-4 for layer in report.layers)
    assert all(layer.score_error is None for layer in report.layers)
    divergence = report.divergence
    assert divergence.kl is not None
    assert divergence.kl.value > 1e-3
    assert divergence.kl.standard_error is not None
    assert divergence.top1_agreement is not None
    assert divergence.top1_agreement.value < 1.0


def test_judged_positions_are_those_a_plain_forward_pass_predicts(
    tiny: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    engine = Engine.load(checkpoint)
    windows = evaluation_text().windows(engine.tokenizer, 33, 2)
    stock = checkpoint.load_transformers(torch.float32)
    for window, score in zip(
        windows, protocol.score_windows(engine, None, windows, prefill=20), strict=True
    ):
        with torch.no_grad():
            logits = stock(window[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[20:32], window[21:])
        assert score.nll == pytest.approx(expected.item(), rel=1e-5)


def test_buckets_hold_the_loss_of_a_plain_forward_pass_over_the_whole_window(
    tiny: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    engine = Engine.load(checkpoint)
    windows = evaluation_text().windows(engine.tokenizer, 333, 2)
    stock = checkpoint.load_transformers(torch.float32)
    with torch.no_grad():
        logits = stock(windows[:, :-1]).logits.transpose(1, 2)
    nll = torch.nn.functional.cross_entropy(logits, windows[:, 1:], reduction="none").mean(0)
    scores = list(protocol.score_windows(engine, engine, windows, prefill=150))
    found = protocol.summarise(scores, 150, 182)
    expected = [
        (0, 128, "prompt", nll[0:128:4]),
        (128, 150, "prompt", nll[128:150:4]),
        (150, 278, "cache", nll[150:278]),
        (278, 332, "cache", nll[278:332]),
    ]
    assert len(found.positions) == len(expected)
    for bucket, (start, end, judged, losses) in zip(found.positions, expected, strict=True):
        assert (bucket.start, bucket.end, bucket.judged) == (start, end, judged)
        assert bucket.nll == pytest.approx(losses.mean().item(), rel=1e-5)
        assert (bucket.base_nll, bucket.kl) == (bucket.nll, 0.0)
    alone = next(protocol.score_windows(engine, None, windows, prefill=150)).buckets
    assert all(bucket.base_nll is bucket.kl is None for bucket in alone)


def test_one_prediction_in_some_is_the_same_whatever_the_pieces(tiny: Callable[..., Path]) -> None:
    engine = Engine.load(Checkpoint.open(str(tiny("llama"))))
    ids = torch.arange(3, 40)
    full = engine.extend(engine.new_cache(1, 37), ids, all_logits=True)
    for chunk in (5, 2, 8192):
        some = engine.extend(engine.new_cache(1, 37), ids, all_logits=True, every=3, chunk=chunk)
        torch.testing.assert_close(some, full[::3], rtol=1e-3, atol=1e-3)


def test_a_prompt_that_is_read_densely_is_read_by_the_exact_model(
    tiny: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    layers = (LayerPlan((True, False), 2, 8),) * 3
    engine, base = (
        Engine.load(checkpoint, plan=Plan(base_of(checkpoint), layers)),
        Engine.load(checkpoint),
    )
    windows = evaluation_text().windows(base.tokenizer, 201, 1)
    (score,) = protocol.score_windows(engine, base, windows, prefill=100)
    prompt, fed = score.buckets
    assert (prompt.judged, prompt.kl) == ("prompt", pytest.approx(0.0, abs=1e-9))
    assert fed.kl == score.kl
    assert score.kl is not None
    assert score.kl > 1e-3


def test_comparison_agrees_with_torch_across_its_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70, 50, generator=generator)
    other = torch.randn(70, 50, generator=generator)
    targets = torch.randint(50, (70,), generator=generator)
    scores = protocol.mean(protocol.judge(other, base, targets))
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert scores.kl == pytest.approx(expected.item(), rel=1e-12)
    wanted = torch.nn.functional.nll_loss(p, targets).item()
    assert scores.base_nll == pytest.approx(wanted, rel=1e-12)
    assert scores.nll == pytest.approx(torch.nn.functional.nll_loss(q, targets).item(), rel=1e-12)
    alone = protocol.mean(protocol.judge(other, None, targets))
    assert alone == protocol.Scores(70, scores.nll)
    assert scores.top1 == pytest.approx((base.argmax(-1) == other.argmax(-1)).float().mean().item())


def test_an_impossible_token_of_the_original_adds_nothing_to_the_divergence() -> None:
    base = torch.tensor([[0.0, 0.0, -math.inf]])
    other = torch.tensor([[0.0, 0.0, -math.inf]])
    assert protocol.mean(protocol.judge(other, base, torch.tensor([0]))).kl == 0.0


def test_standard_errors_are_of_the_mean_over_windows() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert estimate.value == 2.5
    assert estimate.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert Estimate.of([1.0]).standard_error is None
    damaged = Estimate.of([1.0, math.nan]).exp()
    assert math.isnan(damaged.value)
    assert math.isnan(damaged.standard_error or 0.0)
    assert Estimate.of([1.0, math.inf]).value == math.inf
    # The ratio's error comes from paired differences: a spread that both models share cancels.
    scores = [protocol.WindowScores(n + 0.1, 64, 96, n, 0.05, 1.0) for n in (1.0, 2.0, 3.0)]
    ratio = protocol.summarise(scores, 8, 4).perplexity_ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(math.exp(0.1))
    assert ratio.standard_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("asked", "max_context", "expected"),
    [
        ((None, None), 2000, (1536, 256)),
        ((None, None), 512, (439, 73)),
        ((400, None), 512, (400, 112)),
        ((None, 100), 512, (412, 100)),
        ((500, 12), 512, (500, 12)),
    ],
)
def test_only_defaults_shrink_to_the_context_and_say_so(
    asked: tuple[int | None, int | None], max_context: int, expected: tuple[int, int]
) -> None:
    prefill, continuation, note = protocol.fit_window(*asked, max_context)
    assert (prefill, continuation) == expected
    wanted = (asked[0] or 1536, asked[1] or 256)
    assert (note is None) == (wanted == expected)
    if note is not None:
        assert f"{wanted[0]}+{wanted[1]}" in note
        assert "512" in note


@pytest.mark.parametrize("asked", [(512, None), (None, 512), (500, 13), (100_000, 256), (0, 5)])
def test_a_window_that_was_asked_for_is_never_shrunk(asked: tuple[int | None, int | None]) -> None:
    with pytest.raises(UsageError):
        protocol.fit_window(*asked, 512)


def test_a_prefill_beyond_the_context_names_both_numbers(
    tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(tiny("llama")), "--prefill", "100000", "--no-speed", "-q"]
    assert run_command(command) == 2
    err = capfd.readouterr().err
    assert "100000" in err
    assert "512" in err


def test_the_default_protocol_shrinks_to_a_short_model(tiny: Callable[..., Path]) -> None:
    report = measure(tiny("llama"), None, Settings(windows=1, speed=False, needle_contexts=1))
    assert report.divergence.prefill + report.divergence.continuation == 512
    assert report.divergence.kl is None
    assert report.bytes_share is None
    assert any("window shrunk" in note for note in report.notes)
    assert any("pass-key" in note for note in report.notes)
    assert report.retrieval


def test_cache_size_is_measured_from_the_store(tiny: Callable[..., Path]) -> None:
    size = protocol.cache_size(Engine.load(Checkpoint.open(str(tiny("llama")))))
    values = 3 * 2 * 2 * 16  # layers, keys and values, KV heads, head size
    assert size == CacheSize(4.0 * values, 2.0 * values, 0.0)


@pytest.mark.parametrize("budget", [None, (20, None)])
def test_bytes_by_layer_add_up_to_what_the_whole_cache_takes(
    tiny: Callable[..., Path], budget: tuple[int | None, ...] | None
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    layers = (
        LayerPlan((True, False), 2, 8),
        LayerPlan((False, False), budget=budget),
        LayerPlan((True, True), 4, 16),
    )
    policy: Policy | None = None if budget is None else "expected"
    plan = Plan(base_of(checkpoint), layers, policy=policy)
    engine = Engine.load(checkpoint, plan=plan)
    sizes, whole = protocol.layer_sizes(engine), protocol.cache_size(engine)
    head = 2 * 16 * 4  # keys and values, head size, bytes of fp32
    kept = 0 if budget is None else 20
    assert [size.bytes_per_token for size in sizes] == [head, 2 * head, 0]
    assert [size.constant_bytes for size in sizes] == [10 * head, kept * head, 40 * head]
    assert whole.bytes_per_token == plan.bytes_per_token(4)
    assert whole.bytes_per_token_bf16 == sum(size.bytes_per_token_bf16 for size in sizes)
    if budget is None:
        total = whole.constant_bytes + 500 * whole.bytes_per_token
        assert total == engine.new_cache(1, 500).allocated_bytes == plan.cache_bytes(500, 4)


def test_contexts_have_the_stated_length_and_hold_their_keys_at_the_stated_depth() -> None:
    tokenizer = make_tokenizer()
    documents = ["Some filler text without any digits. " * 30]
    for case in retrieval.passkey_cases(tokenizer, documents, lengths=(400, 600)):
        (question,) = case.questions
        assert len(case.context) + len(question.ids) == case.length
        text = tokenizer.decode(case.context)
        assert text.count(question.answer) == 2
        assert case.depth is not None
        assert text.index(question.answer) / len(text) == pytest.approx(case.depth, abs=0.2)
    needles = retrieval.needle_cases(tokenizer, documents, contexts=2)
    assert [case.length for case in needles] == [1400, 1400, 700, 700]
    for case in needles:
        assert len(case.context) == case.length
        text = tokenizer.decode(case.context)
        assert len({question.answer for question in case.questions}) == 4
        assert all(question.answer in text for question in case.questions)
    assert retrieval.needle_cases(tokenizer, documents, lengths=(50,)) == []
    assert retrieval.passkey_cases(tokenizer, documents, lengths=(20,)) == []


@pytest.mark.parametrize(
    ("max_context", "lengths"), [(2048, [1400, 700]), (1407, [700]), (512, [495])]
)
def test_lengths_that_do_not_fit_are_left_out_or_replaced_and_named(
    max_context: int, lengths: list[int]
) -> None:
    kept, note = retrieval.fit_lengths("4-key needle", (1400, 700), max_context, question=10)
    assert kept == lengths
    assert (note is None) == (kept == [1400, 700])
    assert note is None or note.startswith("4-key needle measured at")


def test_lengths_that_no_task_fits_in_are_named(tiny: Callable[..., Path]) -> None:
    settings = replace(SHORT, passkey_lengths=(1, 2), needle_lengths=(3,), layers=False, chat=False)
    report = evaluate(Checkpoint.open(tiny("llama")), None, evaluation_text(), settings=settings)
    assert "no pass-key fits in 1 or 2 tokens" in report.notes
    assert "no 4-key needle fits in 3 tokens" in report.notes


def test_only_the_quick_protocol_asks_for_needles_at_one_length() -> None:
    assert sorted(Settings().needle_lengths) == [700, 1400]
    assert Settings.quick().needle_lengths == (1400,)


@pytest.mark.parametrize(
    ("text", "exact"),
    [(" 12345.", True), (" is 12345", True), ("123456", False), ("1234 5", False), ("none", False)],
)
def test_only_the_exact_digits_count(text: str, exact: bool) -> None:
    assert retrieval.is_exact(text, "12345") is exact


def test_every_question_is_asked_of_the_same_stored_context(tiny: Callable[..., Path]) -> None:
    engine = Engine.load(Checkpoint.open(str(tiny("llama"))))
    context, question = list(range(3, 60)), [7, 8, 9]
    cache = engine.new_cache(1, 100)
    engine.extend(cache, torch.tensor(context))
    first = retrieval.answer(engine, cache, question)
    cache.crop(0, len(context))
    retrieval.answer(engine, cache, [50, 51])
    cache.crop(0, len(context))
    assert retrieval.answer(engine, cache, question) == first
    (greedy,) = zip(*engine.generate([context + question], max_new_tokens=len(first)), strict=True)
    assert list(greedy) == first


def test_models_with_other_vocabularies_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="300 and 310"):
        measure(tiny("llama"), tiny("llama", vocab_size=310))


def test_models_with_other_tokenizers_are_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_model("llama", tmp_path)
    file = tmp_path / "tokenizer.json"
    content: dict[str, Any] = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="tokenizers"):
        measure(tiny("llama"), other)


@pytest.mark.parametrize(
    ("gates", "report", "names"),
    [
        (Gates(max_kl=0.02, max_ppl_ratio=1.05, min_recall=0.75), a_report(), []),
        (Gates(max_kl=0.005), a_report(), ["KL"]),
        (Gates(max_kl=0.02), a_report(kl=math.nan), ["KL"]),
        (Gates(max_ppl_ratio=1.01, min_recall=0.8), a_report(), ["perplexity ratio", "recall"]),
        (Gates(min_recall=0.1), a_report(correct=0, asked=0), ["recall"]),
        (Gates(min_chat_end=0.5), a_report(), []),
        (Gates(min_chat_end=0.51), a_report(), ["chat"]),
        (Gates(min_chat_end=0.0), replace(a_report(), chat=None), ["chat"]),
    ],
)
def test_gates_name_what_fails(gates: Gates, report: Report, names: list[str]) -> None:
    failures = report.failures(gates)
    assert len(failures) == len(names)
    assert all(name in failure for name, failure in zip(names, failures, strict=True))


def test_chat_is_judged_by_the_prompts_that_the_original_ends() -> None:
    report = a_report()
    assert report.chat_share == 0.5
    assert report.to_dict()["chat_share"] == 0.5
    columns = [list(column.cells) for column in report.table().columns]
    row = next(row for row in zip(*columns, strict=True) if str(row[0]).startswith("chat"))
    assert row[1:] == ("2/3", "2/3", "keeps 1/2")


def test_a_failed_gate_prints_the_table_and_ends_with_code_6(
    tiny: Callable[..., Path], noisy: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    code = run_command(
        [
            "evaluate",
            str(noisy),
            "--against",
            str(tiny("llama")),
            *SHORT_OPTIONS,
            "--max-kl",
            "1e-6",
            "-o",
            str(output),
        ]
    )
    out, err = capfd.readouterr()
    assert code == 6
    assert "KL in nats" in out
    assert "pass-key" in out
    assert "error: " in err
    assert "KL" in err
    assert json.loads(output.read_text())["divergence"]["kl"]["value"] > 1e-6


def test_json_is_one_object_and_passing_gates_end_with_code_0(
    tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny("llama"))
    code = run_command(
        ["evaluate", folder, "--against", folder, *SHORT_OPTIONS, "--json", "--max-kl", "0"]
    )
    out, _ = capfd.readouterr()
    assert code == 0
    result = json.loads(out)
    assert result["divergence"]["kl"]["value"] == 0.0
    assert (result["settings"]["prefill"], result["settings"]["continuation"]) == (48, 16)
    assert result["conversion"] is None
    assert result["bytes_share"] == 1.0


def test_quiet_leaves_stderr_empty(tiny: Callable[..., Path]) -> None:
    # In a process of its own: transformers' logger writes past what captures stderr in this one.
    done = subprocess.run(
        [sys.executable, "-m", "kvtool", "evaluate", str(tiny("llama")), *SHORT_OPTIONS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_manifest_names_the_original(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_model("llama", tmp_path)
    assert manifest_base(Checkpoint.open(str(folder))) is None
    assert run_command(["evaluate", str(folder), "--max-kl", "1", "-q"]) == 2
    assert "--against" in capfd.readouterr().err
    manifest = folder / "kvtool_manifest.json"
    manifest.write_text(json.dumps({"base": {"source": str(tiny("llama"))}}))
    assert run_command(["evaluate", str(folder), *SHORT_OPTIONS, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["base"] == str(tiny("llama"))
    for broken in ("{}", "[]", "{"):
        manifest.write_text(broken)
        with pytest.raises(CheckpointError, match="manifest"):
            manifest_base(Checkpoint.open(str(folder)))


def test_what_the_conversion_took_is_reported_beside_the_rest(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, output = make_model("llama", tmp_path / "model"), tmp_path / "report.json"
    manifest = {
        "base": {"source": str(tiny("llama"))},
        "seconds": 12.34,
        "peak_memory_bytes": 1_230_000_000,
    }
    (folder / "kvtool_manifest.json").write_text(json.dumps(manifest))
    command = ["evaluate", str(folder), *SHORT_OPTIONS, "-o", str(output)]
    assert run_command(command) == 0
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]]
        for line in capfd.readouterr().out.splitlines()
        if line.count("│") > 3
    }
    assert rows["conversion, seconds"] == ["–", "12.3"]
    assert rows["conversion, peak memory"] == ["–", "1.23 GB"]
    conversion = json.loads(output.read_text())["conversion"]
    assert conversion == {"seconds": 12.34, "peak_memory_bytes": 1_230_000_000}
    (folder / "kvtool_manifest.json").write_text("{}")
    assert conversion_cost(Checkpoint.open(str(folder))) is None


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "report.json"
    assert run_command(["evaluate", str(tiny("llama")), "-o", str(missing), "-q"]) == 2
    assert str(missing) in capfd.readouterr().err


@pytest.mark.parametrize(("exists", "name"), [(False, "."), (True, "report.json"), (True, ".")])
def test_a_read_only_output_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, name: str
) -> None:
    output = tmp_path / "report.json"
    if exists:
        output.touch()
    check_output(output, (".json",))
    denied = tmp_path / name
    # Modes would not do: root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (denied, os.W_OK))
    with pytest.raises(UsageError, match=r"report\.json cannot be written: permission"):
        check_output(output, (".json",))


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[1]", "7", "no JSON"])
def test_a_report_takes_the_place_of_no_other_json(tmp_path: Path, content: str) -> None:
    output = tmp_path / "config.json"
    output.write_text(content)
    with pytest.raises(UsageError, match=r"config\.json is not a report"):
        check_output(output, (".json",))
    for written in ('{"format_version": 4}', ""):
        output.write_text(written)
        check_output(output, (".json",))


def test_what_was_measured_is_shown_even_if_a_report_cannot_be_written(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, report = tmp_path / "report.html", tmp_path / "report.json"
    page.symlink_to(tmp_path / "missing" / "report.html")
    outputs = ["-o", str(page), "-o", str(report)]
    assert run_command(["evaluate", str(tiny("llama")), *SHORT_OPTIONS, "--json", *outputs]) == 1
    out, err = capfd.readouterr()
    assert str(page) in err
    assert json.loads(report.read_text()) == json.loads(out)


def test_a_full_disk_leaves_the_report_that_was_there(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    report = tmp_path / "report.json"
    of_yesterday = '{"format_version": 4}'
    report.write_text(of_yesterday)
    command = ["evaluate", str(tiny("llama")), *SHORT_OPTIONS, "-o", str(report)]
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert run_command(command) == 5
    assert f"the disk is full: [Errno 28] No space left on device: '{report}'" in (
        capfd.readouterr().err
    )
    assert report.read_text() == of_yesterday
    assert list(tmp_path.iterdir()) == [report]
    assert run_command(command) == 0
    assert json.loads(report.read_text())["bytes_share"] is None


def test_layers_and_chat_are_left_out_on_request(
    tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny("llama"))
    command = [
        "evaluate",
        model,
        "--against",
        model,
        *SHORT_OPTIONS,
        "--no-layers",
        "--no-chat-prompts",
    ]
    assert run_command([*command, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [layer["kl"] for layer in result["layers"]] == [None] * 3
    assert (result["chat"], result["samples"]) == (None, [])
    assert run_command([*command, "--min-chat-end", "0.5"]) == 2
    assert "--no-chat-prompts" in capfd.readouterr().err


def test_a_report_is_written_even_if_nothing_can_be_printed(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(evaluate_command, "emit", closed)
    report = tmp_path / "report.json"
    assert run_command(["evaluate", str(tiny("llama")), *SHORT_OPTIONS, "-o", str(report)]) == 1
    assert json.loads(report.read_text())["bytes_share"] is None


@pytest.mark.parametrize("gate", ["--min-recall", "--min-chat-end"])
def test_no_model_can_keep_more_than_all_that_its_original_knows(
    gate: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["evaluate", "anything", gate, "2"]) == 2
    assert gate in capfd.readouterr().err


def test_smollm2_finds_its_pass_keys(smollm2: Checkpoint) -> None:
    engine = Engine.load(smollm2)
    cases = retrieval.passkey_cases(engine.tokenizer, evaluation_text().documents, lengths=(512,))
    assert [retrieval.ask(engine, case) for case in cases] == [[True]] * 5
    assert protocol.cache_size(engine).bytes_per_token_bf16 == 23_040


def test_every_pass_key_case_is_told_with_its_length_and_depth(tiny: Callable[..., Path]) -> None:
    report = measure(tiny("llama"), None)
    assert [(case.length, case.depth) for case in report.passkey] == [
        (256, depth) for depth in retrieval.DEPTHS
    ]
    question = [retrieval.Question([1], "12345")]
    results: list[retrieval.Result] = [
        (retrieval.Case("pass-key", 8, 0.1, [0], question), [True], [False]),
        (retrieval.Case("4-key needle", 8, None, [0], question), [True], [True]),
    ]
    assert retrieval.passkeys(results) == [retrieval.PassKey(8, 0.1, True, False)]


def test_models_of_other_depth_are_compared_but_not_layer_by_layer(
    tiny: Callable[..., Path],
) -> None:
    report = measure(tiny("llama", num_hidden_layers=2), tiny("llama"))
    assert any("layers not compared" in note for note in report.notes)
    assert [layer.kl for layer in report.layers] == [None, None]
    assert sum(layer.bytes_per_token_bf16 for layer in report.layers) == (
        report.cache.bytes_per_token_bf16
    )


def test_layers_and_chat_can_be_left_out(tiny: Callable[..., Path]) -> None:
    settings = replace(SHORT, layers=False, chat=False)
    report = measure(tiny("llama"), tiny("llama"), settings)
    assert [layer.kl for layer in report.layers] == [None] * 3
    assert report.chat is None
    assert report.samples == []


def test_a_plan_gets_a_text_of_which_it_drops_something(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    plan = Plan(base_of(checkpoint), (LayerPlan((True, False), 4, 26),) * 3)
    settings = replace(SHORT, prefill=80, layer_prefill=8, chat=False)
    report = evaluate(checkpoint, checkpoint, evaluation_text(), plan=plan, settings=settings)
    assert report.settings["layer_prefill"] == 60
    assert report.settings["layer_continuation"] == 16
    assert all(layer.kl is not None and layer.kl > 0 for layer in report.layers)


def test_layers_that_share_a_code_are_not_judged_alone(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    settings = replace(SHORT, chat=False)
    for together, said in ((1, []), (2, ["damage by layer not measured: layers share codes"])):
        plan = coded(checkpoint, "unrotated", True, together, 0.5)
        report = evaluate(checkpoint, checkpoint, evaluation_text(), plan=plan, settings=settings)
        assert [note for note in report.notes if "damage" in note] == said
        assert [layer.kl is None for layer in report.layers] == [bool(said)] * 3
        total = sum(layer.bytes_per_token_bf16 for layer in report.layers)
        assert total == report.cache.bytes_per_token_bf16 == plan.bytes_per_token(2)
        assert len(report.to_dict()["plan"]["codes"]) == len(plan.codes)
        shown = Console(width=120)
        with shown.capture() as text:
            shown.print(report.table())
        assert f"numbers of {len(plan.codes)} unrotated codes" in text.get()
        assert "first + last tokens, kept exactly" in text.get()


def test_a_lucky_answer_does_not_make_up_for_a_lost_one() -> None:
    questions = [retrieval.Question([1], "12345"), retrieval.Question([2], "54321")]
    case = retrieval.Case("needle", 8, None, [0], questions)
    (recall,) = retrieval.summarise([(case, [True, False], [False, True])])
    assert (recall.asked, recall.correct, recall.base_correct, recall.kept) == (2, 1, 1, 0)
    (alone,) = retrieval.summarise([(case, [True, False], None)])
    assert (alone.correct, alone.base_correct, alone.kept) == (1, None, None)

"""Retrieval heads: calibration measures what the runtime does, by the scores of the papers."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _family_cases import GPT_OSS
from conftest import FAMILIES, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvtool.attention import GroupedQueryAttention
from kvtool.calibrate import attention_scores as attention_module
from kvtool.calibrate import heads
from kvtool.calibrate.ablation import STATE, ablation_scores
from kvtool.calibrate.attention_scores import answer_attention, attention_scores, look
from kvtool.calibrate.duo import JITTER, GatedModel, run_gated, teach
from kvtool.calibrate.heads import (
    METHODS,
    HeadOptions,
    calibrate_heads,
    check_options,
    rank_correlation,
    read_samples,
    sample_lengths,
)
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import Reading, TailModel, Window, divergence
from kvtool.calibrate.tasks import RecallSample, RecallTask
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import Corpus, calibration_text
from kvtool.distill import Training, train
from kvtool.errors import CalibrationError, UnsupportedModelError, UsageError
from kvtool.layer_plan import LayerPlan
from kvtool.layout import decoder_layers
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.slices import stream_heads

Tiny = Callable[..., Path]

PREFILLS = ("dense", "streamed")
WINDOW = Window(sink=4, window=24)
EVERYTHING = Window(sink=0, window=600)
TOKENIZER = make_tokenizer()
NUMBERS = [" ".join(f"{i}," for i in range(n, n + 100)) for n in range(1000, 9000, 100)]
S, F_ = True, False
MIXED = torch.tensor([[S, F_], [F_, F_], [S, S]])
NONE, ALL = torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)


def silent(stage: str, done: int, total: int) -> None:
    """Reports to nobody."""


@pytest.fixture(scope="session")
def opened(tiny: Tiny) -> Callable[..., tuple[Checkpoint, TailModel]]:
    """`opened(family)`: a small checkpoint, and the same in memory."""
    made: dict[str, tuple[Checkpoint, TailModel]] = {}

    def get(family: str = "llama", **more: Any) -> tuple[Checkpoint, TailModel]:
        if family not in made:
            checkpoint = Checkpoint.open(str(tiny(family, **more)))
            made[family] = checkpoint, TailModel(LayerStream(checkpoint))
        return made[family]

    return get


@pytest.fixture
def llama(opened) -> TailModel:
    return opened()[1]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file that tokenizes faster than the built-in text."""
    (tmp_path / "numbers.txt").write_text("\n\n".join(NUMBERS))
    return str(tmp_path / "numbers.txt")


@pytest.fixture
def no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models pass, too: nothing can be recalled by them, but everything computed."""
    monkeypatch.setattr(heads, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(heads, "MAX_NLL", float("inf"))


def samples(count: int = 1, length: int = 300) -> list[RecallSample]:
    task = RecallTask(TOKENIZER, NUMBERS, "names")
    return [task.sample(length) for _ in range(count)]


def close(got: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)


# ---------------------------------------------------------------------------------- tail model


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recall_without_streaming_heads_is_the_models_own(opened, family, prefill):
    checkpoint, model = opened(family)
    (sample,) = samples(length=512)
    reading = model.read(sample, prefill)
    assert reading.start == (len(sample.context) if prefill == "dense" else 0)
    got = model.recall(reading, NONE, WINDOW)
    original = checkpoint.load_transformers(torch.float32)
    ids = torch.cat((sample.context, sample.tail))
    with torch.inference_mode():
        logits = original(ids[None]).logits[0]
    expected = logits.log_softmax(-1)[len(sample.context) + sample.answers - 1]
    close(got, expected)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("window", [EVERYTHING, Window(600, 1), Window(280, 40)])
def test_a_window_over_everything_changes_nothing(llama, prefill, window):
    reading = llama.read(samples()[0], prefill)
    dense = llama.recall(reading, NONE, window)
    close(llama.recall(reading, ALL, window), dense)
    assert float(divergence(dense, llama.recall(reading, ALL, WINDOW))) > 0.1


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_calibration_measures_is_what_the_runtime_does(opened, family, prefill):
    checkpoint, model = opened(family)
    (sample,) = samples(length=512)
    layers = tuple(LayerPlan(tuple(row), WINDOW.sink, WINDOW.window) for row in MIXED.tolist())
    engine = Engine.load(checkpoint, plan=Plan(base_of(checkpoint), layers, prefill))
    cache = engine.new_cache(1, 512)
    engine.extend(cache, sample.context)
    logits = engine.extend(cache, sample.tail, all_logits=True)
    expected = logits.log_softmax(-1)[sample.answers - 1]
    reading = model.read(sample, prefill)
    got = model.recall(reading, MIXED, WINDOW)
    close(got, expected)
    assert float(divergence(model.recall(reading, NONE, WINDOW), got)) > 0.1


def test_divergence_is_the_mean_kl_from_the_original() -> None:
    generator = torch.Generator().manual_seed(0)
    original, other = torch.randn(2, 3, 5, 7, generator=generator).log_softmax(-1)
    expected = F.kl_div(other, original, log_target=True, reduction="none").sum(-1).mean(-1)
    close(divergence(original, other), expected, atol=1e-6)
    assert float(divergence(original, original).abs().max()) == 0.0


# ------------------------------------------------------------------------------------ ablation


@pytest.mark.parametrize("prefill", PREFILLS)
def test_the_ablation_score_of_a_head_is_what_streaming_it_alone_does(llama, prefill):
    readings = [llama.read(sample, prefill) for sample in samples(2)]
    reports: list[tuple[int, int]] = []
    scores = ablation_scores(llama, readings, WINDOW, lambda stage, *done: reports.append(done))
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for reading in readings:
        dense = llama.recall(reading, NONE, WINDOW)
        for layer in range(3):
            for head in range(2):
                alone = torch.zeros(3, 2, dtype=torch.bool)
                alone[layer, head] = True
                kl = divergence(dense, llama.recall(reading, alone, WINDOW))
                expected[layer, head] += float(kl) / 2
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)
    assert float(scores.min()) > 1e-3
    assert reports[0] == (0, 6)
    assert reports[-1] == (6, 6)


def test_ablation_finds_nothing_in_a_window_over_everything(llama):
    scores = ablation_scores(llama, [llama.read(samples()[0])], EVERYTHING, silent)
    assert float(scores.abs().max()) < 1e-5


# ------------------------------------------------------------------------------- DuoAttention


class MixedAttention(nn.Module):
    """Equation 1 with every score written out; the rows of a dense prompt see everything."""

    teacher: Tensor | None = None

    def __init__(self, module, name: str) -> None:
        super().__init__()
        self.stages = GroupedQueryAttention(module, name)

    def forward(self, hidden_states, position_embeddings, **_):
        stages = self.stages
        q, k, v = stages.project(hidden_states)
        q, k = stages.normalise(q, k)
        q, k = stages.rotate(q, k, *(table[:, None] for table in position_embeddings))
        group, n = q.shape[1] // k.shape[1], q.shape[2]
        scores = stages.layout.scaling * q @ k.repeat_interleave(group, dim=1).mT
        v = v.repeat_interleave(group, dim=1)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        near = (j < WINDOW.sink) | (i - j < WINDOW.window) | (i < self.prompt)
        full, streaming = (
            scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
            for mask in (j <= i, (j <= i) & near)
        )
        self.full = full
        gate = self.gates.repeat_interleave(group)[:, None, None]
        mixed = full if self.teacher is None else self.teacher
        return stages.output(gate * mixed + (1 - gate) * streaming, hidden_states), None


@torch.inference_mode()
def mixed_by_hand(checkpoint, sample, alpha, mix, prefill) -> Tensor:
    """Final hidden states `[1, M, hidden]` of the tail, from transformers' own layers."""
    model = checkpoint.load_transformers(torch.float32)
    layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        layer.self_attn = MixedAttention(layer.self_attn, str(i))
        layer.self_attn.prompt = len(sample.context) if prefill == "dense" else 0
        layer.self_attn.gates = torch.ones(alpha.shape[1])
    ids = torch.cat((sample.context, sample.tail))[None]
    model.model(ids)
    for layer, gates in zip(layers, alpha, strict=True):
        layer.self_attn.gates = gates
        if mix == "teacher":
            layer.self_attn.teacher = layer.self_attn.full
    return model.model(ids).last_hidden_state[:, len(sample.context) :]


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("mix", ["self", "teacher"])
@pytest.mark.parametrize(
    "alpha", [[[1.0, 1], [0.5, 1], [1, 1]], [[0.2, 0.9], [0.6, 0], [1, 0.4]]], ids=["one", "all"]
)
def test_gates_mix_full_and_streaming_attention(opened, alpha, mix, prefill):
    checkpoint, model = opened("qwen3")
    (sample,) = samples()
    gates = torch.tensor(alpha)
    lesson = teach(model, model.read(sample, prefill), mix)
    got = run_gated(model, lesson.reading, gates, WINDOW, lesson.contexts)
    close(got, mixed_by_hand(checkpoint, sample, gates, mix, prefill))
    assert float((got - lesson.hidden).abs().max()) > 0.1


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("mix", ["self", "teacher"])
def test_open_gates_leave_no_distance_at_all(llama, mix, prefill):
    student = GatedModel(llama, WINDOW, mix, penalty=0.25)
    nn.init.ones_(student.alpha)
    loss, numbers = student(teach(llama, llama.read(samples()[0], prefill), mix))
    assert numbers["distillation"].item() == 0.0
    assert numbers["mean_gate"].item() == 1.0
    assert loss.item() == 0.25


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("mix", ["self", "teacher"])
def test_closed_gates_stream_every_head(llama, mix, prefill):
    (sample,) = samples()
    reading = llama.read(sample, prefill)
    contexts = teach(llama, reading, mix).contexts
    hidden = run_gated(llama, reading, torch.zeros(3, 2), WINDOW, contexts)
    got = (hidden[0, sample.answers - 1] @ llama.head.T).log_softmax(-1)
    close(got, llama.recall(reading, ALL, WINDOW))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_only_the_tail_is_distilled(llama, prefill):
    (sample,) = samples()
    lesson = teach(llama, llama.read(sample, prefill), "self")
    assert lesson.hidden.shape == (1, len(sample.tail), 64)
    assert lesson.scale == pytest.approx(float(lesson.hidden.square().mean()))
    student = GatedModel(llama, WINDOW, penalty=0.0)
    nn.init.constant_(student.alpha, 0.5)
    hidden = run_gated(llama, lesson.reading, student.alpha, WINDOW, {})
    expected = (hidden - lesson.hidden).square().mean() / lesson.hidden.square().mean()
    torch.testing.assert_close(student(lesson)[0], expected)


@pytest.mark.parametrize("mix", ["self", "teacher"])
def test_the_gradient_of_the_gates_is_that_of_finite_differences(llama, mix):
    lesson = teach(llama, llama.read(samples()[0]), mix)
    student = GatedModel(llama, WINDOW, mix, penalty=0.3)
    start = 0.3 + 0.4 * torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    student.alpha.data.copy_(start)
    student(lesson)[0].backward()
    step, expected = 5e-3, torch.zeros(3, 2)
    for place in range(6):
        losses = []
        for sign in (1, -1):
            student.alpha.data.copy_(start)
            student.alpha.data.view(-1)[place] += sign * step
            losses.append(student(lesson)[0].item())
        expected.view(-1)[place] = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(student.alpha.grad, expected, rtol=1e-2, atol=1e-4)


def test_only_the_gates_are_trained(llama):
    student = GatedModel(llama, WINDOW)
    assert [name for name, _ in student.named_parameters()] == ["alpha"]
    student(teach(llama, llama.read(samples()[0]), "self"))[0].backward()
    frozen = [*llama.norm.parameters(), llama.table, llama.head]
    for layer in llama.layers:
        frozen += [*layer._module.parameters(), *layer.attention.parameters()]
    assert not any(weight.requires_grad for weight in frozen)
    assert all(weight.grad is None for weight in frozen)
    assert student.alpha.grad is not None
    assert bool((student.alpha.grad != 0).all())


def test_gates_start_a_little_below_one_and_stay_between_zero_and_one(llama):
    gates = [GatedModel(llama, WINDOW, seed=seed).alpha.detach() for seed in (0, 0, 1)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    assert bool(((gates[0] >= 1 - JITTER) & (gates[0] < 1)).all())
    student = GatedModel(llama, WINDOW)
    student.alpha.data = torch.tensor([[-0.5, 0.25], [1.5, 1.0], [0.0, 2.0]])
    student.constrain()
    assert student.alpha.tolist() == [[0.0, 0.25], [1.0, 1.0], [0.0, 1.0]]


def test_gates_that_nothing_needs_fall_to_zero_and_others_do_not(llama):
    lesson = teach(llama, llama.read(samples()[0]), "self")
    fallen = GatedModel(llama, EVERYTHING)
    train(fallen, lambda i: lesson, Training(30, learning_rate=0.1), None)
    assert bool((fallen.alpha == 0).all())
    needed = GatedModel(llama, WINDOW)
    train(needed, lambda i: lesson, Training(30, learning_rate=0.1), None)
    assert float(needed.alpha.detach().max()) > 0.5


def test_training_moves_the_gates_from_the_first_steps_on(llama):
    student = GatedModel(llama, WINDOW)
    before = student.alpha.detach().clone()
    lessons = [teach(llama, llama.read(sample), "self") for sample in samples(2)]
    log = train(student, lambda i: lessons[i % 2], Training(5, learning_rate=0.02), None)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]
    assert not bool((student.alpha == before).any())
    assert {"loss", "distillation", "mean_gate"} <= log[0].keys()


def test_an_interrupted_ablation_goes_on_with_the_same_bits(opened, text, tmp_path, no_bar):
    checkpoint, _ = opened()
    options = HeadOptions("ablation", WINDOW.sink, WINDOW.window, lengths=(300,), data=text)
    whole = calibrate_heads(checkpoint, options, folder=tmp_path / "whole")
    seen: list[int] = []

    def record(stage: str, done: int, total: int) -> None:
        if stage == "ablating heads":
            seen.append(done)
            if len(seen) == 12:  # in the fourth reading of three layers
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(checkpoint, options, folder=tmp_path / "some", report=record)
    assert seen[-1] == 11
    resumed = calibrate_heads(checkpoint, options, folder=tmp_path / "some", report=record)
    assert seen[12] == 9
    assert torch.equal(resumed.scores, whole.scores)
    for change in ({"seed": 1}, {"window": 30}):
        seen.clear()
        other = HeadOptions(**{**vars(options), **change})
        with pytest.raises(KeyboardInterrupt):
            calibrate_heads(checkpoint, other, folder=tmp_path / "some", report=record)
        assert seen[0] == 0, "the sums of another run were taken for this one's"
    (tmp_path / "some" / STATE).write_bytes(b"damaged")
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(checkpoint, options, folder=tmp_path / "some", report=record)
    assert seen[0] == 0


def test_interrupted_gates_go_on_with_the_same_bits(opened, text, tmp_path, no_bar):
    checkpoint, _ = opened()
    options = HeadOptions(
        "duo", WINDOW.sink, WINDOW.window, lengths=(300,), samples=2, steps=30, data=text
    )
    whole = calibrate_heads(checkpoint, options, folder=tmp_path / "whole")

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", 28):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(checkpoint, options, folder=tmp_path / "gates", report=interrupt)
    steps: list[int] = []

    def record(stage: str, done: int, total: int) -> None:
        if stage == "training":
            steps.append(done)

    resumed = calibrate_heads(checkpoint, options, folder=tmp_path / "gates", report=record)
    assert steps[0] == 25
    assert torch.equal(resumed.scores, whole.scores)
    assert resumed.provenance == whole.provenance
    assert 0 < whole.provenance[0]["mean_gate"] < 1
    steps.clear()
    other = HeadOptions(**{**vars(options), "penalty": 0.1})
    calibrate_heads(checkpoint, other, folder=tmp_path / "gates", report=record)
    assert steps[0] == 0, "the state of another run was taken for this one's"


# --------------------------------------------------------------------------- attention scores


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(("family", "more"), [*((x, {}) for x in FAMILIES), GPT_OSS])
def test_looked_at_attention_is_that_of_the_original(opened, tiny, family, more, prefill):
    _, model = opened(family, **more)
    (sample,) = samples(length=512)
    reading = model.read(sample, prefill)
    rows, recalled = look(model, reading)
    original = AutoModelForCausalLM.from_pretrained(
        tiny(family, **more), dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.cat((sample.context, sample.tail))
    with torch.inference_mode():
        out = original(ids[None], output_attentions=True, use_cache=False)
    before = len(sample.context) + sample.answers - 1
    assert list(rows) == model.planned_layers
    for index, got in rows.items():
        close(got, out.attentions[index][0, :, before])
    predicted = out.logits[0, before].argmax(-1)
    assert torch.equal(recalled, predicted == sample.tail[sample.answers])


def test_attention_rows_sum_to_one_and_do_not_see_the_future(llama):
    reading = llama.read(samples()[0])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, len(reading.ids), 16, generator=generator)
    k = torch.randn(1, 2, reading.start + len(reading.ids), 16, generator=generator)
    rows = answer_attention(q, k, reading, 0.25)
    assert rows.shape == (4, len(reading.answers), k.shape[2])
    close(rows.sum(-1), torch.ones(rows.shape[:2]), atol=1e-6)
    for row, answer in zip(rows.unbind(1), reading.answers.tolist(), strict=True):
        assert bool((row[:, reading.start + answer :] == 0).all())
        assert bool((row[:, : reading.start + answer] > 0).all())


def crafted_parts(secret: tuple[int, ...] = (10, 11, 12, 13)) -> tuple[Any, Any]:
    """A reading and a model of one layer with two KV heads.

    The needle is at 10 to 13 of a context of 20 tokens; behind it one token asks for all four.
    """
    sample = RecallSample(
        context=torch.tensor([*range(10), *secret, *range(14, 20)]),
        tail=torch.tensor([5, *secret, 6]),
        source=torch.tensor([-1, 10, 11, 12, 13, -1]),
        first=torch.tensor([False, True, False, False, False, False]),
        spans=torch.tensor([[-1, -1]] + [[10, 14]] * 4 + [[-1, -1]]),
    )
    layouts = [SimpleNamespace(kind="gqa", stores_all=True, sees_all=True, heads=4, kv_heads=2)]
    model = SimpleNamespace(layers=[None], layouts=layouts, device=torch.device("cpu"))
    return SimpleNamespace(sample=sample, ids=sample.tail, answers=sample.answers), model


def crafted(
    rows: Tensor, recalled: list[bool], monkeypatch, secret: tuple[int, ...] = (10, 11, 12, 13)
) -> tuple[list[float], list[float]]:
    """Scores from attention rows `[4, 4, 26]`."""
    reading, model = crafted_parts(secret)
    monkeypatch.setattr(attention_module, "look", lambda *_: ({0: rows}, torch.tensor(recalled)))
    retrieval, semantic = attention_scores(model, [reading], silent)
    return retrieval[0].tolist(), semantic[0].tolist()


def test_scores_are_hits_and_mass_at_recalled_tokens_of_the_best_head_of_a_group(monkeypatch):
    rows = torch.zeros(4, 4, 26)
    rows[:, :, 0] = 1.0  # a sink takes what is not set below
    # Head 0 copies the first two, looks beside the third, and copies one that is not recalled.
    for answer, column in ((0, 10), (1, 11), (2, 13), (3, 13)):
        rows[0, answer, [0, column]] = torch.tensor([0.4, 0.6])
    # Head 1 copies the third only, by little, and has much of the needle always.
    rows[1, :, :14] = torch.tensor([0.2, *[0] * 9, 0.25, 0.05, 0.3, 0.2])
    # Head 2 sees nothing of the needle; head 3 half of it, but its sink always more.
    rows[3, :, [0, 13]] = torch.tensor([0.5, 0.25]).expand(4, 2)
    rows[3, :, 14] = 0.25
    recalled = [True, True, True, False]
    retrieval, semantic = crafted(rows, recalled, monkeypatch)
    assert retrieval == pytest.approx([2 / 3, 0.0])
    assert semantic == pytest.approx([0.8, 0.25])
    retrieval, _ = crafted(rows[[1, 2, 0, 3]], recalled, monkeypatch)
    assert retrieval == pytest.approx([1 / 3, 2 / 3])


def test_a_token_may_be_copied_from_wherever_the_needle_holds_it(monkeypatch):
    rows = torch.zeros(4, 4, 26)
    rows[:, range(4), [12, 11, 10, 5]] = 1.0  # the first and third are the same; 5 is elsewhere
    retrieval, _ = crafted(rows, [True] * 4, monkeypatch, secret=(7, 11, 7, 5))
    assert retrieval == [3 / 4, 3 / 4]


def test_a_group_is_as_good_as_its_best_head_over_all_readings(monkeypatch):
    rows = torch.zeros(2, 4, 4, 26)
    rows[..., 0] = 1.0
    for reading, head in ((0, 0), (1, 1)):  # each head of a group copies in one reading only
        rows[reading, head, range(4), range(10, 14)] = 2.0
    halves = [crafted(each, [True] * 4, monkeypatch)[0][0] for each in rows]
    assert halves == [1.0, 1.0]
    turns = iter(rows)
    sample, model = crafted_parts()
    monkeypatch.setattr(attention_module, "look", lambda *_: ({0: next(turns)}, torch.ones(4) > 0))
    retrieval, _ = attention_scores(model, [sample, sample], silent)
    assert retrieval[0, 0] == 0.5


def test_tokens_that_are_not_recalled_do_not_count(monkeypatch):
    rows = torch.zeros(4, 4, 26)
    rows[:, range(4), range(10, 14)] = 1.0
    assert crafted(rows, [True] * 4, monkeypatch) == ([1.0, 1.0], [1.0, 1.0])
    assert crafted(rows, [False] * 3 + [True], monkeypatch) == ([1.0, 1.0], [1.0, 1.0])
    assert crafted(rows, [False] * 4, monkeypatch) == ([0.0, 0.0], [0.0, 0.0])


def test_attention_scores_do_not_depend_on_how_the_context_was_read(llama, monkeypatch):
    pair = []
    for prefill in PREFILLS:
        readings = [llama.read(sample, prefill) for sample in samples(2)]
        monkeypatch.setattr(
            attention_module, "look", lambda *a: (look(*a)[0], torch.tensor([True]))
        )
        pair.append(torch.stack(attention_scores(llama, readings, silent)))
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
    assert float(pair[0][1].min()) > 0


# --------------------------------------------------------------------------------- all methods


def test_rank_correlation_is_spearmans_with_shared_ranks_for_ties():
    def naive(a: list[float], b: list[float]) -> float:
        def ranks(values: list[float]) -> list[float]:
            ordered = sorted(values)
            return [
                sum(i for i, other in enumerate(ordered) if other == value) / ordered.count(value)
                for value in values
            ]

        x, y = ranks(a), ranks(b)
        mean = (len(x) - 1) / 2
        pairs = list(zip(x, y, strict=True))
        covariance = sum((i - mean) * (j - mean) for i, j in pairs)
        spread = sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y)
        return covariance / spread**0.5

    choose = random.Random(0)
    scores = [torch.tensor([choose.choice(range(5)) for _ in range(24)]) / 3 for _ in range(3)]
    scores[2] = torch.rand(24, generator=torch.Generator().manual_seed(0))
    got = rank_correlation([score.view(4, 6) for score in scores])
    expected = [[naive(a.tolist(), b.tolist()) for b in scores] for a in scores]
    close(got.float(), torch.tensor(expected), atol=1e-5)
    falling = torch.arange(6.0).view(2, 3)
    assert rank_correlation([falling, -falling])[0, 1].item() == pytest.approx(-1)
    assert rank_correlation([falling.exp(), falling])[0, 1].item() == pytest.approx(1)
    assert rank_correlation([falling]).tolist() == [[1.0]]


def read(model: TailModel, checkpoint: Checkpoint, **options) -> tuple[list[Reading], list]:
    asked = HeadOptions(sink=4, window=24, **{"lengths": (300,), "samples": 2, **options})
    return read_samples(model, checkpoint, Corpus("numbers", NUMBERS), asked, silent)


def test_a_model_that_recalls_nothing_is_refused_with_what_was_tried(opened):
    checkpoint, model = opened()
    with pytest.raises(CalibrationError) as caught:
        read(model, checkpoint)
    for kind in ("ordinals", "names", "repetition"):
        assert f"{kind}: " in str(caught.value)
    assert "nats" in str(caught.value)
    assert "entropy" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("able", "used", "tried"),
    [
        (["ordinals", "names", "repetition"], ["ordinals", "names"], 2),
        (["names", "repetition"], ["names"], 2),
        (["repetition"], ["repetition"], 3),
    ],
)
def test_tasks_that_the_model_can_do_are_used(opened, monkeypatch, able, used, tried):
    checkpoint, model = opened()
    can = property(lambda check: check.kind in able)
    monkeypatch.setattr(heads.RecallCheck, "passed", can)
    readings, checks = read(model, checkpoint, samples=4, lengths=(300, 320))
    assert [check.kind for check in checks] == ["ordinals", "names", "repetition"][:tried]
    each = 4 if used == ["repetition"] else 2
    lengths = [len(r.sample.context) + len(r.sample.tail) for r in readings]
    assert lengths == [300, 320] * (each // 2) * len(used)
    needles = [TOKENIZER.decode(r.sample.context) for r in readings]
    assert sum("passkey to the vault" in needle for needle in needles) == 2 * ("ordinals" in used)
    assert sum("The code of" in needle for needle in needles) == 2 * ("names" in used)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_a_check_counts_the_answer_tokens_behind_the_first(opened, no_bar, prefill):
    checkpoint, model = opened()
    readings, checks = read(model, checkpoint, prefill=prefill, samples=4)
    losses, hits = [], []
    for reading in readings[2:]:  # of names
        sample = reading.sample
        predicted = model.recall(reading, NONE, WINDOW)
        for row, answer in zip(predicted, sample.answers.tolist(), strict=True):
            if not sample.first[answer]:
                losses.append(-float(row[sample.tail[answer]]))
                hits.append(int(row.argmax()) == int(sample.tail[answer]))
    assert len(losses) == 2 * 8
    assert checks[1].nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert checks[1].accuracy == pytest.approx(sum(hits) / len(hits))


def test_recall_lengths_fit_the_context() -> None:
    assert sample_lengths(HeadOptions(), 8192) == [1024, 2048]
    assert sample_lengths(HeadOptions(), 1500) == [1024]
    assert sample_lengths(HeadOptions(), 512) == [512]
    assert sample_lengths(HeadOptions(lengths=(700, 300)), 700) == [700, 300]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lengths": (300, 513)}, "513 .* context of 512"),
        ({"window": 500}, "512 tokens does not leave the 516"),
        ({"lengths": (272,)}, "272 tokens does not leave the 272"),
        ({"sink": -1}, "--sink"),
        ({"window": 0}, "--window"),
        ({"samples": 0}, "--samples"),
        ({"steps": 0}, "--steps"),
        ({"penalty": -0.1}, "--penalty"),
    ],
)
def test_impossible_options_are_refused_before_weights_are_read(
    tiny, monkeypatch, options, complaint
):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    check_options(checkpoint, HeadOptions())
    for reader in ("read", "read_prefix"):
        monkeypatch.setattr(Checkpoint, reader, lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=complaint):
        check_options(checkpoint, HeadOptions(**options))


def test_models_with_a_sliding_window_are_refused(tiny):
    checkpoint = Checkpoint.open(str(tiny("mistral", sliding_window=64)))
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        calibrate_heads(checkpoint, HeadOptions())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_plan_that_says_how_it_was_made(
    opened, text, tmp_path, no_bar, method
):
    checkpoint, _ = opened()

    def calibrate(seed: int = 0) -> Plan:
        options = HeadOptions(
            method, 4, 24, lengths=(300,), samples=2, steps=3, data=text, seed=seed
        )
        return calibrate_heads(checkpoint, options)

    plan = calibrate()
    plan.write(tmp_path / "heads.plan")
    stored = Plan.read(tmp_path / "heads.plan")
    assert torch.equal(stored.scores, plan.scores)
    assert stored.base == base_of(checkpoint)
    assert plan.scores.shape == (3, 2)
    assert plan.streaming_heads == 0
    assert stream_heads(plan, 3, 4, 24).streaming_heads == 3
    (made,) = stored.provenance
    assert made["method"] == made["options"]["method"] == method
    assert made["options"]["window"] == 24
    assert made["corpus"] == calibration_text(text).id
    assert made["tokens"] == (16384 if method == "entropy" else 600)
    assert set(made["versions"]) == {"kvtool", "torch", "transformers"}
    tried = [check["kind"] for check in made["recall"]]
    assert tried == ([] if method == "entropy" else ["ordinals", "names"])
    assert torch.equal(calibrate().scores, plan.scores)
    if method in ("ablation", "duo"):  # a random model recalls nothing to score attention by
        assert not torch.equal(calibrate(seed=1).scores, plan.scores)


def test_attention_and_semantic_are_the_two_scores_of_one_pass(opened, text, monkeypatch, no_bar):
    copied = torch.tensor([[0.0, 0.0], [0.5, 0.25], [0.0, 1.0]], dtype=torch.float64)
    mass = torch.tensor([[0.2, 0.1], [0.9, 0.3], [0.0, 0.4]], dtype=torch.float64)
    monkeypatch.setattr(heads, "attention_scores", lambda *_: (copied, mass))

    def scores(method: str) -> torch.Tensor:
        options = HeadOptions(method, 4, 24, lengths=(300,), samples=2, data=text)
        return calibrate_heads(opened()[0], options).scores

    assert torch.equal(scores("semantic"), mass.float())
    torch.testing.assert_close(scores("attention"), copied.float(), atol=1e-5, rtol=0)
    # Heads that never copy come in the order of what they pay to the needle, not of their layers.
    assert scores("attention").flatten().argsort().tolist() == [4, 1, 0, 3, 2, 5]


def test_the_entropy_of_a_head_is_the_largest_of_its_queries(opened, text):
    checkpoint, _ = opened()
    statistics = collect(checkpoint, StatisticsOptions(data=text))
    scores = calibrate_heads(checkpoint, HeadOptions("entropy", data=text)).scores
    for index, row in enumerate(scores):
        of_queries = statistics.layer(index).query_entropy.tolist()
        assert row.tolist() == pytest.approx([max(of_queries[:2]), max(of_queries[2:])])


def test_the_prefill_of_a_plan_is_the_one_that_was_measured(opened, text, no_bar):
    plans = [
        calibrate_heads(
            opened()[0],
            HeadOptions("ablation", 4, 24, prefill, lengths=(300,), samples=2, data=text),
        )
        for prefill in PREFILLS
    ]
    assert [plan.prefill for plan in plans] == list(PREFILLS)
    assert not torch.allclose(plans[0].scores, plans[1].scores, rtol=0.01)


def test_every_round_of_training_sees_each_lesson_once_in_another_order():
    rounds = [[heads._shuffled(5 * turn + i, 5, seed=0) for i in range(5)] for turn in range(4)]
    assert all(sorted(lessons) == [0, 1, 2, 3, 4] for lessons in rounds)
    assert len({tuple(lessons) for lessons in rounds}) > 1


# ------------------------------------------------------------------------------- a real model


def test_ablation_finds_the_head_that_a_real_model_recalls_with(smollm2):
    model = TailModel(LayerStream(smollm2))
    options = HeadOptions(sink=4, window=64, lengths=(512,), samples=2)
    readings, checks = read_samples(model, smollm2, calibration_text(), options, silent)
    assert [check.kind for check in checks if check.passed] == ["ordinals", "names"]
    window, readings = Window(options.sink, options.window), readings[1:]  # names: a short tail
    scores = ablation_scores(model, readings, window, silent).flatten()
    order = scores.argsort().tolist()
    assert divmod(order[-1], 3) == (18, 2)
    assert float(scores.min()) > -1e-5

    def accuracy(streaming: list[int]) -> float:
        mask = torch.zeros(90, dtype=torch.bool)
        mask[streaming] = True
        hits = []
        for reading in readings:
            predicted = model.recall(reading, mask.view(30, 3), window).argmax(-1)
            hits.append(predicted == reading.ids[reading.answers])
        return float(torch.cat(hits).float().mean())

    original = accuracy([])
    assert original > 0.8
    assert accuracy(order[-9:]) < 0.5
    assert accuracy(order[:45]) >= 0.9 * original

"""Trained codes: orthogonal bases with searched ranks, and free ones along the budget."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import one_thread, random_ids
from _family_cases import GPT_OSS
from torch import Tensor

from kvtool.calibrate import lessons, pca, students
from kvtool.calibrate.matryoshka import PARTS, STEPS, MatryoshkaStudent, greedy_ranks, ranked
from kvtool.calibrate.past import Past, measure, read_again, read_past
from kvtool.calibrate.projections import ProjectionOptions, calibrate_projections
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.students import FreeStudent
from kvtool.calibrate.tail import TailModel, divergence
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.codes import CodePlan, Fitted, Part, Projection, share_budget
from kvtool.distill import Amount, Training, train
from kvtool.errors import PlanError
from kvtool.plan import Plan
from kvtool.slices import cut

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

RING = (2, 6)
LENGTH, END = 64, 16


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny("llama", num_key_value_heads=2)))


@pytest.fixture(scope="module")
def model(llama: Checkpoint) -> TailModel:
    return TailModel(LayerStream(llama))


@pytest.fixture
def past(model: TailModel) -> Past:
    return read_past(model, random_ids(LENGTH), END)


@pytest.fixture
def student(llama: Checkpoint, model: TailModel) -> MatryoshkaStudent:
    statistics = collect(llama, StatisticsOptions(tokens=1024, sinks=RING[0]))
    start = [pca.fit(statistics.layer(i), 2) for i in range(len(model.layers))]
    return MatryoshkaStudent(model, start, 2, RING)


@pytest.fixture(autouse=True)
def short_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "RECALL", 0.0)  # recall tasks are longer than these windows
    monkeypatch.setattr("kvtool.calibrate.students.fast_bfloat16", lambda _: False)


def at_ranks(student: MatryoshkaStudent, past: Past, ranks: Tensor) -> float:
    attends = [student.attend(past, i, own) for i, own in enumerate(ranks)]
    return float(divergence(past.expected, read_again(student.model, past, attends)))


def full(student: MatryoshkaStudent, past: Past) -> Tensor:
    size = past.keys[0].shape[-1]
    return torch.full((len(student.model.layers), 2, student.heads), size)


def taught(student: Any, steps: int = 4) -> list[dict[str, float]]:
    ids = random_ids(LENGTH)
    return train(student, lambda _: ids, Training(steps, 1e-2, cooldown=0.5), None)


def test_at_full_rank_nothing_is_lost_before_and_after_training(student, past):
    with torch.no_grad():
        assert at_ranks(student, past, full(student, past)) < 1e-6
        assert at_ranks(student, past, full(student, past) // 2) > 1e-5
    taught(student)
    with torch.no_grad():
        assert at_ranks(student, past, full(student, past)) < 1e-6


@torch.no_grad()
def test_at_full_rank_nothing_is_lost_beside_sink_logits(tiny):
    family, more = GPT_OSS
    checkpoint = Checkpoint.open(str(tiny(family, **more)))
    model = TailModel(LayerStream(checkpoint))
    statistics = collect(checkpoint, StatisticsOptions(tokens=1024, sinks=RING[0]))
    start = [pca.fit(statistics.layer(i), 2) for i in model.planned_layers]
    student, past = MatryoshkaStudent(model, start, 2, RING), read_past(model, random_ids(64), END)
    attends: list[Any] = [None] * len(model.layers)
    for place, layer in enumerate(model.planned_layers):
        attends[layer] = student.attend(past, place, torch.full((2, 2), 16))
    assert float(divergence(past.expected, read_again(model, past, attends))) < 1e-6


def test_bases_start_at_the_principal_components_and_stay_orthogonal(llama, student):
    statistics = collect(llama, StatisticsOptions(tokens=1024, sinks=RING[0]))
    for i, parts in enumerate(student.fitted()):
        start = pca.fit(statistics.layer(i), 2)
        for part in PARTS:
            torch.testing.assert_close(
                parts[part].projection.encode, start[part].projection.encode, rtol=0, atol=1e-5
            )
    taught(student)
    moved = 0.0
    for i, parts in enumerate(student.fitted()):
        for part in PARTS:
            encode = parts[part].projection.encode
            identity = torch.eye(len(encode), dtype=torch.float64)
            torch.testing.assert_close(encode @ encode.T, identity, rtol=0, atol=1e-5)
            start = pca.fit(statistics.layer(i), 2)[part].projection.encode
            moved = max(moved, float((encode - start).abs().max()))
    assert moved > 1e-3


def test_training_lowers_the_loss(student):
    log = taught(student, 24)
    first, last = (sum(x["loss"] for x in part) for part in (log[:6], log[-6:]))
    assert last < first


def test_a_fitted_code_is_what_the_student_reads(model, student, past):
    taught(student)
    size = past.keys[0].shape[-1]
    fitted = student.fitted()
    code = CodePlan("rotated", 1, (size, size), *RING)  # half of two heads
    ready = [
        (
            code,
            {
                p: Projection(*(x.float() for x in vars(f.projection).values()))
                for p, f in y.items()
            },
        )
        for y in fitted
    ]
    with torch.no_grad():
        expected = at_ranks(student, past, full(student, past) // 2)
    assert measure(model, [past], ready) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def greedy(student: MatryoshkaStudent, past: Past, steps: int) -> list[tuple[int, int, int]]:
    """Algorithm 1 as it is written."""
    ranks = full(student, past)
    slab = int(ranks.max()) // STEPS
    taken = []
    for _ in range(steps):
        costs = {}
        for place in (ranks > slab).nonzero().tolist():
            trial = ranks.clone()
            trial[tuple(place)] -= slab
            costs[tuple(place)] = at_ranks(student, past, trial)
        best = min(costs, key=lambda place: costs[place])
        ranks[best] -= slab
        taken.append(best)
    return taken


def test_the_rank_search_is_the_greedy_one(student, past):
    removal = greedy_ranks(student, past, lambda *_: None)
    size = past.keys[0].shape[-1]
    with torch.no_grad():
        wanted = greedy(student, past, 12)
    found = [tuple((removal == step + 1).nonzero()[0].tolist()) for step in range(12)]
    assert [place[:3] for place in found] == wanted
    total = removal[..., 1:].numel()
    assert sorted(removal[..., 1:].flatten().tolist()) == list(range(1, total + 1))
    assert bool((removal[..., 0] == total + 1).all())  # the first eighth is never taken
    assert bool((removal.diff(dim=-1) < 0).all())  # a head loses its last columns first
    assert size % STEPS == 0


def test_searched_ranks_are_slices(student, past):
    removal = greedy_ranks(student, past, lambda *_: None)
    fitted = student.fitted()
    size = past.keys[0].shape[-1]
    for parts, before, own in zip(ranked(fitted, removal), fitted, removal, strict=True):
        for place, part in enumerate(PARTS):
            spectrum = parts[part].spectrum
            assert bool((spectrum.diff() <= 0).all())
            kept = parts[part].projection.encode[: size // STEPS * 3]
            worth = own[place].repeat_interleave(size // STEPS, dim=1)
            threshold = worth.flatten().sort(descending=True).values[len(kept) - 1]
            assert float(spectrum[len(kept) - 1]) == float(threshold)
            rows = {tuple(row) for row in before[part].projection.encode.tolist()}
            assert {tuple(row) for row in kept.tolist()} <= rows


# ------------------------------------------------------------------------------------ free codes


def calibrated(llama: Checkpoint, **options: Any) -> Plan:
    wanted = ProjectionOptions(sink=2, window=6, context=200, tokens=1024, **options)
    budget = int(0.6 * 200 * 2 * 2 * 32 * 3)
    return calibrate_projections(llama, wanted, budget, 2)


def fitted_of(plan: Plan) -> list[dict[Part, Fitted]]:
    return [
        {
            part: Fitted(
                Projection(*(plan.tensors[f"codes.{i}.{part}.{x}"] for x in _PARTS)),
                plan.tensors[f"codes.{i}.{part}.spectrum"],
            )
            for part in code.parts
        }
        for i, code in enumerate(plan.codes)
    ]


_PARTS = ("encode", "decode", "mean")


def loss(model: TailModel, past: Past, codes: Any, fitted: list[dict[Part, Fitted]]) -> float:
    projections = [{part: one.projection for part, one in parts.items()} for parts in fitted]
    return measure(model, [past], list(zip(codes, projections, strict=True)))


@pytest.mark.parametrize(("read", "together"), [("absorbed", 1), ("rebuilt", 2)])
def test_free_codes_start_at_the_closed_form_and_learn(llama, model, read, together):
    plan = calibrated(llama, read=read, together=together)
    student = FreeStudent(model, plan.codes, fitted_of(plan), "spectrum")
    past = read_past(model, random_ids(LENGTH), LENGTH // 2)
    before = loss(model, past, plan.codes, fitted_of(plan))
    assert loss(model, past, plan.codes, student.fitted()) == pytest.approx(before, rel=1e-4)
    taught(student, 30)
    after = student.fitted()
    assert loss(model, past, plan.codes, after) < 0.9 * before
    for parts, code in zip(after, plan.codes, strict=True):  # only what was trained is there
        assert [len(f.spectrum) for f in parts.values()] == list(code.widths)


def test_distilled_plans_are_cut_to_smaller_sizes_only(llama):
    plan = calibrated(llama, train=Amount(tokens=2 * 512))
    assert plan.provenance[0]["steps"] == 2
    native = plan.native_bytes(200, 2)
    small = cut(plan, int(0.4 * native), 200, 2)
    assert small.cache_bytes(200, 2) <= 0.4 * native < plan.cache_bytes(200, 2)
    assert cut(plan, native, 200, 2).codes == plan.codes


def test_widths_are_drawn_along_the_budget(llama, model, past, monkeypatch):
    plan = calibrated(llama)
    drawn = []

    def watched(*arguments: Any) -> Any:
        drawn.append(share_budget(*arguments))
        return drawn[-1]

    monkeypatch.setattr(students, "share_budget", watched)
    student = FreeStudent(model, plan.codes, fitted_of(plan), "spectrum", least=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            student.attends(past)
    rows = [sum(code.width for code in codes) for codes in drawn]
    most = sum(code.width for code in plan.codes)
    assert max(rows) == most
    assert 0.5 * most - 8 * len(plan.codes) <= min(rows) < 0.95 * most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "cskv", "--train", "1k"), "nothing of cskv is trained"),
        (("--method", "aware", "--search-ranks"), "--search-ranks is for --method matryoshka"),
        (("--method", "pca", "--read", "rebuilt"), "--read is for --method aware"),
        (("--method", "cskv", "--layers-together", "2"), "--layers-together is for aware and xkv"),
        (("--train", "soon"), "--train soon is neither"),
    ],
)
def test_wrong_training_is_one_sentence(llama, tmp_path, capsys, arguments, message):
    words = ["calibrate", "projections", str(llama.path), "-o", str(tmp_path / "p"), *arguments]
    assert run_command(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_matryoshka_plans_are_cut_evenly_or_by_the_search(llama):
    even = calibrated(llama, method="matryoshka", train=Amount(tokens=1024))
    assert even.allocation == "even"
    assert len({code.widths for code in even.codes}) == 1
    searched = calibrated(llama, method="matryoshka", train=Amount(tokens=1024), search_ranks=True)
    assert searched.allocation == "spectrum"
    with pytest.raises(PlanError):
        replace(searched, allocation=None)


def test_ranks_are_searched_where_8_does_not_divide_the_head_size(tiny):
    checkpoint = Checkpoint.open(str(tiny("llama", head_dim=20)))  # OpenLLaMA 3B has 100
    plan = calibrated(checkpoint, method="matryoshka", train=Amount(tokens=1024), search_ranks=True)
    for parts in fitted_of(plan):
        for part in PARTS:
            encode = parts[part].projection.encode
            torch.testing.assert_close(encode @ encode.T, torch.eye(40), rtol=0, atol=1e-4)

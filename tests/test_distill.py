"""The training loop: what it does in a step, and that stopping and sharing it change nothing."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import dropout

from kvtool import distill
from kvtool.distill import LOG, STATE, Student, Training, train
from kvtool.errors import CalibrationError, CheckpointError, UsageError

TRAINING = Training(steps=11, learning_rate=0.1, clip=0.5, save_every=4)


class Gates(Student):
    """Gates on a frozen layer, a correction beside them, and dropout, which draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(4, 4, generator=generator), requires_grad=False)
        self.gate = nn.Parameter(torch.ones(4))
        self.correction = nn.Parameter(0.1 * torch.randn(4, 4, generator=generator))
        self.seen: list[Tensor] = []

    def forward(self, batch: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        self.seen.append(self.gate.detach().clone())
        target = batch @ self.base
        output = self.gate * target + dropout(batch, 0.2) @ self.correction
        loss = (output - target).square().mean() + 5 * self.gate.mean()
        return loss, {"gate": self.gate.mean(), "rows": len(batch)}

    def constrain(self) -> None:
        self.gate.clamp_(0, 1)  # fails on a leaf that requires a gradient, unless under no_grad


class Sum(Student):
    """The loss is a sum, so the gradient is the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, batch: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return (self.weight * batch).sum() + batch[0], {}


def batch(index: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1000 + index))


def weights(student: Student) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def untimed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in log]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def failing_at(step: int, error: BaseException) -> Callable[[int], Tensor]:
    """Batches, one for each step, of which one cannot be had."""

    def batches(index: int) -> Tensor:
        if index == step:
            raise error
        return batch(index)

    return batches


def interrupted(folder: Path, step: int, training: Training = TRAINING, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Gates(), failing_at(step, KeyboardInterrupt()), training, folder, **options)


def steps_taken(folder: Path | None, training: Training = TRAINING, **options: Any) -> int:
    student = Gates()
    train(student, batch, training, folder, **options)
    return len(student.seen)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gates, list[dict[str, float]], Path]:
    """A run that nothing interrupted: the student, the log, the folder. Not to be changed."""
    student, folder = Gates(), tmp_path_factory.mktemp("whole")
    return student, train(student, batch, TRAINING, folder), folder


# ---------------------------------------------------------------------------------------- a step


def test_the_learning_rate_is_a_trapezoid_with_a_floor() -> None:
    duo = Training(steps=2000, learning_rate=0.02)
    for step in (0, 1, 39, 40, 200, 399, 400, 1000, 1599, 1600, 1601, 1900, 1960, 1961, 1999):
        factor = min(1, max((step + 1) / 400, 0.1), max((2000 - step) / 400, 0.1))
        assert duo.rate(step) == pytest.approx(0.02 * factor, rel=1e-12)
    assert duo.rate(0) == duo.rate(1999) == pytest.approx(0.002)
    assert duo.rate(399) == duo.rate(1000) == duo.rate(1600) == 0.02


def test_without_warmup_and_cooldown_the_learning_rate_is_constant() -> None:
    flat = Training(steps=7, learning_rate=0.3, warmup=0, cooldown=0)
    assert {flat.rate(step) for step in range(7)} == {0.3}


def test_the_optimizer_uses_the_learning_rate_of_the_schedule() -> None:
    training, student = Training(steps=10, learning_rate=0.1), Sum()
    log = train(student, lambda _: torch.tensor([3.0, -5.0]), training, None)
    assert [record["learning_rate"] for record in log] == [training.rate(t) for t in range(10)]
    # Under a constant gradient AdamW moves every weight by the learning rate, against its sign.
    way = sum(training.rate(t) for t in range(10))
    torch.testing.assert_close(student.weight.detach(), torch.tensor([-way, way]))


class Rated(Gates):
    """Gates whose correction moves at a rate of its own."""

    def rates(self) -> Mapping[str, float]:
        return {"correction": 0.25, "base": 7.0}


def test_a_parameter_with_a_rate_of_its_own_moves_at_that_share_of_the_schedule() -> None:
    student, before = Rated(), weights(Rated())
    log = train(student, batch, Training(steps=1, learning_rate=0.1, warmup=0, cooldown=0), None)
    # AdamW's first step is the learning rate in every weight, whatever the gradient.
    for name, rate in (("gate", 0.1), ("correction", 0.025)):
        moved = (weights(student)[name] - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), atol=1e-4, rtol=0)
    assert torch.equal(student.base, before["base"])
    assert log[0]["learning_rate"] == 0.1


def test_rates_hold_in_a_run_that_goes_on(tmp_path: Path) -> None:
    whole, resumed = Rated(), Rated()
    train(whole, batch, TRAINING, None)
    with pytest.raises(KeyboardInterrupt):
        train(Rated(), failing_at(6, KeyboardInterrupt()), TRAINING, tmp_path)
    train(resumed, batch, TRAINING, tmp_path)
    assert all(torch.equal(weights(resumed)[n], w) for n, w in weights(whole).items())
    plain = Gates()
    train(plain, batch, TRAINING, None)
    assert not torch.equal(plain.correction, whole.correction)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup", -0.1),
        ("cooldown", 1.1),
        ("floor", 2.0),
        ("clip", 0.0),
        ("accumulate", 0),
        ("save_every", 0),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        replace(TRAINING, **{field: value})


def test_the_gradient_is_clipped_as_a_whole_and_its_own_norm_is_logged() -> None:
    student = Sum()
    training = Training(steps=1, learning_rate=0.1, clip=0.5)
    log = train(student, lambda _: torch.tensor([3.0, 4.0]), training, None)
    torch.testing.assert_close(student.weight.grad, torch.tensor([0.3, 0.4]))
    assert log[0]["grad_norm"] == pytest.approx(5.0)


def test_without_clip_the_gradient_is_untouched() -> None:
    student = Sum()
    log = train(student, lambda _: torch.tensor([3.0, 4.0]), Training(1, 0.1), None)
    torch.testing.assert_close(student.weight.grad, torch.tensor([3.0, 4.0]), rtol=0, atol=0)
    assert log[0]["grad_norm"] == pytest.approx(5.0)


def test_accumulation_averages_gradients_and_numbers_over_its_batches() -> None:
    student = Sum()
    training = Training(steps=2, learning_rate=0.1, accumulate=2)
    log = train(student, lambda i: torch.tensor([float(i), 10.0 * i]), training, None)
    torch.testing.assert_close(student.weight.grad, torch.tensor([2.5, 25.0]))
    assert log[0]["loss"] == pytest.approx(0.5)


def test_constraints_hold_at_every_forward_and_at_the_end() -> None:
    student = Gates()
    with torch.no_grad():
        student.gate += 0.5
    train(student, batch, replace(TRAINING, learning_rate=0.8), None)
    for gate in (*student.seen, student.gate.detach()):
        assert ((gate >= 0) & (gate <= 1)).all()
    assert (student.gate == 0).any()


def test_frozen_weights_stay_and_the_loss_falls() -> None:
    student, before = Gates(), weights(Gates())
    log = train(student, batch, replace(TRAINING, steps=40), None)
    assert torch.equal(student.base, before["base"])
    assert not torch.equal(student.correction, before["correction"])
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


def test_the_mode_of_the_student_is_left_alone() -> None:
    student = Gates().eval()
    train(student, batch, TRAINING, None)
    assert not student.training


class Breaking(Sum):
    """Gives values that are not finite at the batch of 2: in the loss, its gradient or the log."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, batch: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        value = torch.tensor(math.inf if batch[0] == 2 else 1.0)
        weight = self.weight.sum()
        if self.where == "loss":
            return weight + value, {}
        if self.where == "grad_norm":
            return weight + torch.sqrt(0 * weight + (0.0 if batch[0] == 2 else 1.0)), {}
        return weight, {"mass": value}


@pytest.mark.parametrize("where", ["loss", "grad_norm", "mass"])
def test_values_that_are_not_finite_end_the_training_before_they_reach_the_weights(
    where: str, tmp_path: Path
) -> None:
    student = Breaking(where)
    with pytest.raises(CalibrationError, match=rf"{where} .*step 3 of 5") as raised:
        train(student, lambda i: torch.full((2,), float(i)), Training(5, 0.25), tmp_path)
    assert raised.value.hint == "Train for less, or on other text with --data."
    assert student.weight.isfinite().all()
    assert len(lines(tmp_path)) == 2


def test_sharded_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UsageError, match="FSDP"):
        train(Gates(), batch, TRAINING, None)


# ------------------------------------------------------------------------------ log and progress


def test_every_step_is_one_line_of_the_log(whole: tuple[Gates, list[Any], Path]) -> None:
    _, log, folder = whole
    assert lines(folder) == log
    assert [record["step"] for record in log] == list(range(1, 12))
    fields = ["step", "learning_rate", "loss", "gate", "rows", "grad_norm", "seconds"]
    assert all(list(record) == fields for record in log)
    assert all(record["rows"] == 3 and record["seconds"] >= 0 for record in log)


def test_without_a_folder_the_training_is_the_same(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert untimed(train(Gates(), batch, TRAINING, None)) == untimed(whole[1])
    assert list(tmp_path.iterdir()) == []


def test_progress_starts_with_the_steps_done(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    interrupted(tmp_path, 9)
    train(Gates(), batch, TRAINING, tmp_path, report=lambda *progress: told.append(progress))
    assert told == [("training", done, 11) for done in range(8, 12)]


# ---------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [0, 2, 4, 6, 8, 10])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    step: int, whole: tuple[Gates, list[Any], Path], tmp_path: Path
) -> None:
    interrupted(tmp_path, step)
    student = Gates()
    log = train(student, batch, TRAINING, tmp_path)
    assert len(student.seen) == 11 - step // 4 * 4
    assert untimed(log) == untimed(whole[1])
    assert lines(tmp_path) == log
    for name, weight in weights(whole[0]).items():
        assert torch.equal(weights(student)[name], weight), name
    ours, theirs = load_file(tmp_path / STATE), load_file(whole[2] / STATE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_interrupted_twice_goes_on_to_the_same_bits(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path
) -> None:
    interrupted(tmp_path, 6)
    interrupted(tmp_path, 9)
    assert untimed(train(Gates(), batch, TRAINING, tmp_path)) == untimed(whole[1])


def test_a_finished_run_is_restored_without_a_step(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path
) -> None:
    first = train(Gates(), batch, TRAINING, tmp_path)
    student = Gates()
    assert train(student, batch, TRAINING, tmp_path) == first
    assert student.seen == []
    assert torch.equal(student.gate, whole[0].gate)


def test_an_interrupt_while_a_state_is_written_leaves_the_former_one(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if metadata["steps"] == "8":
            file.write_bytes(b"half a sta")
            raise KeyboardInterrupt
        save_file(tensors, file, metadata)

    save_file = distill.save_file
    with monkeypatch.context() as patched:
        patched.setattr(distill, "save_file", torn)
        with pytest.raises(KeyboardInterrupt):
            train(Gates(), batch, TRAINING, tmp_path)
    student = Gates()
    log = train(student, batch, TRAINING, tmp_path)
    assert len(student.seen) == 7
    assert untimed(log) == untimed(whole[1])


def test_only_what_is_trained_is_saved(whole: tuple[Gates, list[Any], Path]) -> None:
    assert {path.name for path in whole[2].iterdir()} == {LOG, STATE}
    state = load_file(whole[2] / STATE)
    fields = ("value", "step", "exp_avg", "exp_avg_sq")
    assert set(state) == {f"{field}.{name}" for field in fields for name in ("gate", "correction")}
    assert torch.equal(state["value.gate"], whole[0].gate)


class Idle(Gates):
    """One of the parameters plays no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(2))


def test_a_parameter_without_gradient_is_resumed(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Idle(), failing_at(6, KeyboardInterrupt()), TRAINING, tmp_path)
    student = Idle()
    assert untimed(train(student, batch, TRAINING, tmp_path)) == untimed(whole[1])
    assert torch.equal(student.idle, torch.ones(2))


@pytest.mark.parametrize(
    ("training", "options"),
    [
        (TRAINING, {"key": "another"}),
        (TRAINING, {"key": "this", "resume": False}),
        (replace(TRAINING, steps=12), {"key": "this"}),
        (replace(TRAINING, learning_rate=0.2), {"key": "this"}),
        (replace(TRAINING, accumulate=2), {"key": "this"}),
    ],
)
def test_what_determines_another_run_starts_over(
    training: Training, options: dict[str, Any], tmp_path: Path
) -> None:
    interrupted(tmp_path, 9, key="this")
    assert steps_taken(tmp_path, training, **options) == training.steps * training.accumulate
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, training.steps + 1))


def test_a_student_of_another_shape_starts_over(tmp_path: Path) -> None:
    interrupted(tmp_path, 9)
    student = Idle()
    train(student, batch, TRAINING, tmp_path)
    assert len(student.seen) == 11


def test_a_run_that_starts_over_leaves_no_state_of_the_former_one(tmp_path: Path) -> None:
    interrupted(tmp_path, 9)
    interrupted(tmp_path, 2, key="another")
    assert not (tmp_path / STATE).exists()


def test_how_often_states_are_saved_does_not_make_another_run(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path
) -> None:
    interrupted(tmp_path, 9)
    student = Gates()
    log = train(student, batch, replace(TRAINING, save_every=3), tmp_path)
    assert len(student.seen) == 3
    assert untimed(log) == untimed(whole[1])


@pytest.mark.parametrize("damage", ["torn state", "short log", "torn log", "no log"])
def test_a_damaged_folder_is_refused_unless_started_over(damage: str, tmp_path: Path) -> None:
    interrupted(tmp_path, 9)
    log = (tmp_path / LOG).read_text(encoding="utf-8")
    if damage == "torn state":
        (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:50])
    elif damage == "no log":
        (tmp_path / LOG).unlink()
    else:
        kept = log.splitlines(keepends=True)[:5] if damage == "short log" else log[: len(log) // 2]
        (tmp_path / LOG).write_text("".join(kept), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot go on") as raised:
        train(Gates(), batch, TRAINING, tmp_path)
    assert raised.value.hint is not None
    assert "--no-resume" in raised.value.hint
    assert steps_taken(tmp_path, resume=False) == 11


def test_a_run_can_be_stopped_where_states_are_saved_and_stays_stopped(
    whole: tuple[Gates, list[Any], Path], tmp_path: Path
) -> None:
    asked: list[int] = []

    def stop(done: int) -> bool:
        asked.append(done)
        return done == 8

    log = train(Gates(), batch, TRAINING, tmp_path, stop=stop)
    assert asked == [4, 8]
    assert untimed(log) == untimed(whole[1][:8])
    assert steps_taken(tmp_path, stop=stop) == 0
    assert steps_taken(tmp_path) == 3


# ----------------------------------------------------------------------------- several processes


def run_process(folder: Path) -> None:
    """One of two processes: is interrupted in step 9, begins again, and leaves what it came to."""
    rank = int(os.environ["RANK"])
    with pytest.raises(KeyboardInterrupt):
        train(Gates(), failing_at(16 + rank, KeyboardInterrupt()), TRAINING, folder)
    student, asked = Gates(), []

    def batches(index: int) -> Tensor:
        asked.append(index)
        return batch(index)

    log = train(student, batches, TRAINING, folder)
    stopped = train(Gates(), batch, TRAINING, None, stop=lambda done: done == 4 and rank == 1)
    left = {"weights": weights(student), "log": log, "asked": asked, "stopped": len(stopped)}
    torch.save(left, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes left behind, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    code = f"import pathlib, test_distill; test_distill.run_process(pathlib.Path({str(folder)!r}))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for process in processes:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_train_as_one_that_accumulates_twice_as_much(
    two_processes: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (first, second) = two_processes
    alone = Gates()
    log = train(alone, batch, replace(TRAINING, accumulate=2), None)
    for name, weight in weights(alone).items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-6)
    assert untimed(first["log"]) == untimed(second["log"])
    assert lines(folder) == first["log"]
    for ours, theirs in zip(untimed(first["log"]), untimed(log), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_processes_resume_and_share_the_batches(
    two_processes: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert [left["asked"] for left in two_processes[1]] == [[16, 18, 20], [17, 19, 21]]


def test_one_process_stops_all(two_processes: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [left["stopped"] for left in two_processes[1]] == [4, 4]

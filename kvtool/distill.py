"""The one training loop: AdamW under accelerate, and a state from which a killed run goes on.

A method supplies a :class:`Student`, which is its forward and its loss, and the batches. What it
trains are the parameters that require a gradient; all others are neither copied nor saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import (  # type: ignore[import-untyped]
    Accelerator,
    DistributedType,
    InitProcessGroupKwargs,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvtool._tensors import first_line
from kvtool.errors import CalibrationError, CheckpointError, UsageError
from kvtool.progress import Progress, silent

LOG = "log.jsonl"
STATE = "state.safetensors"

Record = dict[str, float]
"""One step: `step` (from 1), `learning_rate`, `loss`, what the student logs, `grad_norm` before
clipping, and `seconds`. Loss and logged numbers are means over the batches of the step."""


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Attributes:
        steps: How often the parameters are updated.
        learning_rate: The rate between warm-up and cool-down.
        warmup: The share of the steps in which the rate rises.
        cooldown: The share of the steps in which it falls.
        floor: The smallest share of the learning rate, at both ends.
        weight_decay: AdamW's.
        clip: The largest norm of the whole gradient; None does not clip.
        accumulate: Batches per step and process.
        save_every: Steps between two states.
        seed: Batch i and its forward find torch's global generators seeded with `seed + i`.

    Raises:
        UsageError: A number is out of range.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.2
    cooldown: float = 0.2
    floor: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    save_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("steps", "accumulate", "save_every") and value < 1:
                raise UsageError(f"Training needs {name} of at least 1, not {value}.")
            if name in ("warmup", "cooldown", "floor") and not 0 <= value <= 1:
                raise UsageError(f"Training needs {name} as a share from 0 to 1, not {value}.")
            if name in ("learning_rate", "clip") and value is not None and not value > 0:
                raise UsageError(f"Training needs {name} above 0, not {value}.")

    def rate(self, step: int) -> float:
        """The learning rate of step t, from 0: a trapezoid with a floor.

        learning_rate · min(1, max((t+1)/W, floor), max((steps-t)/C, floor)), where W and C are the
        steps of warm-up and cool-down (DuoAttention, arXiv 2410.10819, as its `train.py` has it).
        """
        rise = (step + 1) / max(self.warmup * self.steps, 1)
        fall = (self.steps - step) / max(self.cooldown * self.steps, 1)
        return self.learning_rate * min(1.0, max(rise, self.floor), max(fall, self.floor))


_MOST = 1e9  # tokens; their windows are held in memory


@dataclass(frozen=True)
class Amount:
    """How long to train: tokens, or seconds of the machine that does it."""

    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str, flag: str, auto: int) -> Amount:
        """Reads `200k`, `1.5M`, `40000` (tokens), `20min`, `2h` or `auto`.

        Args:
            flag: What the user calls it. auto: Tokens that `auto` means.

        Raises:
            UsageError: It is none of these.
        """
        units = {"min": 60.0, "h": 3600.0, "k": 1e3, "M": 1e6, "": 1.0}
        number = text.strip()
        if number == "auto":
            return cls(tokens=auto)
        if not number.endswith("M"):
            number = number.lower()  # but `20m` is neither minutes nor millions
        unit = next(u for u in units if number.endswith(u))
        try:
            value = float(number.removesuffix(unit)) * units[unit]
        except ValueError:
            value = -1.0
        if not 1 <= value <= _MOST:
            raise UsageError(
                f"{flag} {text} is neither a number of tokens such as 200k or 1.5M, nor a "
                "time such as 20min or 2h, nor 'auto'"
            )
        return cls(seconds=value) if unit in ("min", "h") else cls(tokens=int(value))

    def steps(self, size: int) -> int:
        """Steps of `size` tokens each that a number of tokens makes, at least one."""
        assert self.tokens is not None
        return max(1, self.tokens // size)


class Student(nn.Module):
    """What is trained: the parameters that require a gradient, and how good they are."""

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The loss `[]` and other numbers for the log. Moves the batch to its own device."""
        raise NotImplementedError

    def constrain(self) -> None:
        """Puts the parameters back where they may be, before the first and after every step."""

    def rates(self) -> Mapping[str, float]:
        """By the name of a parameter, what its learning rate is multiplied by; 1 if not named."""
        return {}


def train(
    student: Student,
    batches: Callable[[int], Any],
    training: Training,
    folder: Path | None,
    *,
    key: str = "",
    resume: bool = True,
    report: Progress = silent,
    stop: Callable[[int], bool] = lambda done: False,
) -> list[Record]:
    """Trains the student in place.

    One process trains on the device where the student is. Each of the n processes of `accelerate
    launch` moves its student to its own device, and the gradients are averaged. Process r takes
    batches (t·accumulate + a)·n + r, a < accumulate, at step t, so that each is seen once.

    Every step is one line of `log.jsonl`. `state.safetensors` holds the trainable parameters and
    AdamW's moments, and replaces its predecessor in one rename. A resumed run of one process ends
    with the same bits as one that was never interrupted.

    Args:
        student: The parameters, the forward and the loss. Its train or eval mode is left alone.
        batches: The i-th batch, the same whenever it is asked for.
        training: How long and how fast.
        folder: Where log and state are kept, seen by all processes; None keeps neither.
        key: A hash of what determines the run besides `training` and the shapes of the parameters.
            A folder with the state of any other run is started over.
        resume: Go on from a state at all.
        report: Told ("training", steps done, steps in all), by the main process.
        stop: Asked with the steps done wherever a state is due, also before a resumed run goes on;
            True from any process ends the training.

    Returns:
        The log from the first step on, also where the run was resumed.

    Raises:
        CalibrationError: The loss, the gradient or a logged number is not finite.
        CheckpointError: The folder cannot be resumed from.
        UsageError: accelerate is set up for something else than data parallelism.
    """
    accelerator = _accelerator()
    model = accelerator.prepare_model(student) if accelerator.num_processes > 1 else student
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    relative = student.rates()
    groups = [{"params": [p], "relative": relative.get(n, 1.0)} for n, p in trainable.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    run = _identity(key, training, accelerator.num_processes, trainable)
    state = None if folder is None else _State(folder, run, trainable, optimizer)

    log = state.load() if state is not None and resume else []
    accelerator.wait_for_everyone()  # the main process must not write while others read
    if not accelerator.is_main_process:
        state, report = None, silent
    if state is not None:
        state.begin(log)
    _constrain(student)
    report("training", len(log), training.steps)
    for step in range(len(log), training.steps):
        if step and step % training.save_every == 0 and _any(accelerator, stop(step)):
            break
        started = time.perf_counter()
        optimizer.zero_grad()
        measured = _backward(accelerator, model, batches, training, step)
        limit = math.inf if training.clip is None else training.clip
        measured["grad_norm"] = float(nn.utils.clip_grad_norm_(trainable.values(), limit))
        _check_finite(measured, step, training)
        rate = training.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["relative"]
        optimizer.step()
        _constrain(student)
        seconds = time.perf_counter() - started
        log.append({"step": step + 1, "learning_rate": rate, **measured, "seconds": seconds})
        if state is not None:
            state.append(log[-1])
            if len(log) % training.save_every == 0 or len(log) == training.steps:
                state.save(len(log))
        report("training", len(log), training.steps)
    return log


def step_seconds(student: Student, batch: Any, device: torch.device) -> float:
    """Of a forward and backward pass on this machine."""
    times = []
    for _ in range(2):  # the first also warms up
        started = time.perf_counter()
        loss, _logged = student(batch)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        student.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    return min(times)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than of float32.

    On a processor with AMX they are. With AVX512 alone a step of `smollm2` in bfloat16 takes 1.7
    times as long as in float32: its parameters are converted anew in every step.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_amx_tile_supported()


def processes() -> tuple[int, int]:
    """Which process this is, and of how many, under `accelerate launch`; (0, 1) without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def wait_for_everyone() -> None:
    """Returns when all processes are here, however long one of them worked alone.

    Raises:
        CalibrationError: Another process ended instead.
    """
    if processes()[1] > 1:
        accelerator = _accelerator()
        try:
            accelerator.wait_for_everyone()
        except RuntimeError as error:
            raise CalibrationError(
                f"Another process stopped, and its message says why: {first_line(error)}"
            ) from error


def _accelerator() -> Any:
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # Precision is the student's business, whatever the launcher was configured for.
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    started = processes()[1]
    if started != accelerator.num_processes:
        raise UsageError(
            f"{started} processes were started, but accelerate found {accelerator.num_processes}",
            hint="without a GPU, set ACCELERATE_USE_CPU=true for all of them",
        )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UsageError(
            f"Training is data-parallel, but accelerate is configured for {kind.value}.",
            hint="Run 'accelerate launch --multi_gpu', or a single process.",
        )
    return accelerator


def _identity(key: str, training: Training, processes: int, trainable: Mapping[str, Tensor]) -> str:
    """Hash of what determines a run. Two processes are the same as twice the accumulation."""
    same = replace(training, accumulate=training.accumulate * processes, save_every=1)
    shapes = {name: [str(p.dtype), *p.shape] for name, p in trainable.items()}
    return hashlib.sha256(json.dumps([key, asdict(same), shapes]).encode()).hexdigest()


def _backward(
    accelerator: Any,
    model: nn.Module,
    batches: Callable[[int], Any],
    training: Training,
    step: int,
) -> Record:
    """Adds up the gradient of one step over its batches; returns what the batches logged."""
    parts = []
    for part in range(training.accumulate):
        turn = step * training.accumulate + part
        index = turn * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(training.seed + index)
        last = part + 1 == training.accumulate
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss, logged = model(batches(index))
            (loss / training.accumulate).backward()
        numbers = {"loss": loss, **logged}
        parts.append([torch.as_tensor(number).item() for number in numbers.values()])
    means = accelerator.reduce(torch.tensor(parts, device=loss.device).mean(0), "mean")
    return dict(zip(numbers, means.tolist(), strict=True))


def _any(accelerator: Any, said: bool) -> bool:
    """Whether any process said so, the same in all of them."""
    return bool(accelerator.reduce(torch.tensor(float(said), device=accelerator.device), "sum"))


@torch.no_grad()
def _constrain(student: Student) -> None:
    student.constrain()


def _check_finite(measured: Record, step: int, training: Training) -> None:
    for name, value in measured.items():
        if not math.isfinite(value):
            raise CalibrationError(
                f"Training reached a {name} of {value} at step {step + 1} of {training.steps}.",
                hint="Train for less, or on other text with --data."
                if step
                else "Nothing is trained yet: the weights hold no numbers, or the text is at "
                "fault; --data takes another.",
            )


class _State:
    """What a folder keeps of one run."""

    def __init__(
        self,
        folder: Path,
        run: str,
        trainable: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.folder, self.run = folder, run
        self.trainable, self.optimizer = trainable, optimizer

    @torch.no_grad()
    def load(self) -> list[Record]:
        """Restores what `save` wrote for this run; returns the log up to there, or an empty one."""
        if not (self.folder / STATE).is_file():
            return []
        try:
            with safe_open(self.folder / STATE, "pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("run") != self.run:
                    return []
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            steps = int(metadata["steps"])
            lines = (self.folder / LOG).read_text(encoding="utf-8").splitlines()[:steps]
            log: list[Record] = [json.loads(line) for line in lines]
            if len(log) < steps:
                raise ValueError(f"{LOG} ends before step {steps}")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"Training cannot go on from {self.folder}: {first_line(error)}.",
                hint="Start over with --no-resume.",
            ) from error
        moments = {}
        for index, (name, parameter) in enumerate(self.trainable.items()):
            parameter.copy_(tensors[f"value.{name}"])
            moments[index] = {
                field: tensors[f"{field}.{name}"]
                for field in ("step", "exp_avg", "exp_avg_sq")
                if f"{field}.{name}" in tensors  # what never had a gradient has none of them
            }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return log

    def begin(self, log: list[Record]) -> None:
        """Cuts the folder back to this log; to an empty one belongs no state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not log:
            (self.folder / STATE).unlink(missing_ok=True)
        unfinished = self.folder / f"{LOG}.unfinished"
        unfinished.write_text("".join(map(_line, log)), encoding="utf-8")
        unfinished.replace(self.folder / LOG)

    def append(self, record: Record) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def save(self, steps: int) -> None:
        """Writes `value.NAME` and AdamW's `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        tensors = {}
        for name, parameter in self.trainable.items():
            for field, tensor in {"value": parameter, **self.optimizer.state[parameter]}.items():
                tensors[f"{field}.{name}"] = tensor.detach().to("cpu").contiguous()
        unfinished = self.folder / f"{STATE}.unfinished"
        save_file(tensors, unfinished, {"run": self.run, "steps": str(steps)})
        unfinished.replace(self.folder / STATE)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"

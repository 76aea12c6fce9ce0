"""Makes the replacements of a hybrid: seeds them in closed form, and lets the original teach them.

The same for the result and for its controls, with the same texts in the same order:

1. read-outs are solved on the calibration text;
2. :class:`~kvtool.hybrid.Alignment`, of what is not inherited and then of everything, each followed
   by another solution of the read-outs: what trains the rest need not train them as well;
3. :class:`~kvtool.hybrid.Distillation` of the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import distill
from kvtool.attention import GroupedQueryAttention
from kvtool.checkpoint import Checkpoint
from kvtool.distill import Student, Training
from kvtool.divergence import Loss
from kvtool.hybrid import (
    Alignment,
    Arm,
    Distillation,
    HybridModel,
    Judged,
    judge,
)
from kvtool.progress import Progress, silent
from kvtool.replacements import Pointwise, random_mixer, seeded_mixer

ARMS: tuple[Arm, ...] = ("mamba", "random", "pointwise")
"""The result, and its controls."""
ALIGNED = 0.4
"""Share of the text that alignment reads, of which :data:`FIRST` without what is inherited."""
FIRST = 0.35
EVALUATIONS = 5
"""How often the model is judged during a stage, at most."""

# Rates are relative, see `kvtool.hybrid`.
_ALIGNMENT = Training(1, 3e-3, warmup=0.2, cooldown=0.6, floor=0.02, clip=1.0)
_DISTILLATION = Training(1, 1.5e-3, warmup=0.15, cooldown=0.6, floor=0.02, clip=1.0)


@dataclass(frozen=True)
class Steps:
    """Of the three stages.

    Attributes:
        batch: Windows of a step.
    """

    batch: int
    seeding: int
    aligning: int
    distilling: int

    @classmethod
    def of(cls, steps: int, batch: int) -> Steps:
        """So many steps shared among the stages, at least one each."""
        aligned = max(2, round(ALIGNED * steps))
        first = max(1, round(FIRST * aligned))
        return cls(batch, first, aligned - first, max(1, steps - aligned))

    @property
    def total(self) -> int:
        """All of them."""
        return self.seeding + self.aligning + self.distilling


@dataclass(frozen=True)
class Lessons:
    """Texts `[N, T]`: to solve read-outs on, to learn from, and to judge by."""

    solve: Tensor
    learn: Tensor
    judge: Tensor


@dataclass
class Taught:
    """One arm.

    Attributes:
        error: By layer, what closed form and alignment left of the attention's output, relative.
        judged: At the end, on held-out text.
        learned: Whether teaching brought it nearer to the original there. It is what the closed
            form made of it otherwise: a few steps, at the rates of many, make it worse.
    """

    hybrid: HybridModel
    error: dict[int, float]
    judged: Judged
    learned: bool


class Teacher:
    """Teaches the arms of one conversion.

    Args:
        reach: By layer `[Q]`, see :func:`kvtool.replacements.seeded_mixer`.
        steps: None stops behind the closed form.
        teacher: Another model than the original, for distillation.
        rate: Multiplies all learning rates.
        folder: Where states are kept that a killed run goes on from; None keeps none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        reach: dict[int, Tensor],
        lessons: Lessons,
        steps: Steps | None,
        *,
        loss: Loss = "forward-kl",
        teacher: Any | None = None,
        device: str = "cpu",
        seed: int = 0,
        rate: float = 1.0,
        folder: Path | None = None,
        report: Progress = silent,
    ) -> None:
        self.checkpoint, self.reach, self.lessons, self.steps = checkpoint, reach, lessons, steps
        self.loss, self.teacher, self.device, self.seed = loss, teacher, device, seed
        self.rate, self.folder, self.report = rate, folder, report

    def new(self, arm: Arm) -> HybridModel:
        """The hybrid before anything is solved or learned."""
        generator = torch.Generator().manual_seed(self.seed)

        def make(index: int, attention: GroupedQueryAttention) -> torch.nn.Module:
            if arm == "mamba":
                return seeded_mixer(attention, self.reach[index].float().to(self.device))
            if arm == "random":
                return random_mixer(attention, generator)
            return Pointwise(attention.layout.hidden_size).to(self.device)

        model = self.checkpoint.load_transformers(torch.float32, self.device)
        return HybridModel(model, self.reach, make)

    def step_seconds(self) -> float:
        """Of a step that learns from all of `lessons.learn`, the stages by their shares."""
        hybrid = self.new("mamba")
        students = (Alignment(hybrid, inherited=True), Distillation(hybrid, self.teacher))
        align, distil = (
            distill.step_seconds(student, self.lessons.learn, hybrid.device) for student in students
        )
        return ALIGNED * align + (1 - ALIGNED) * distil

    def teach(self, arm: Arm) -> Taught:
        """One arm from beginning to end."""
        hybrid = self.new(arm)
        self.report(f"{arm}: closed form", 0, 1)
        if arm == "mamba":
            hybrid.seed_own_tokens(self.lessons.solve)
        error = hybrid.fit_outputs(self.lessons.solve)
        self.report(f"{arm}: closed form", 1, 1)
        closed = error, _copied(hybrid), judge(hybrid, self.lessons.judge)
        if self.steps is None:
            return Taught(hybrid, error, closed[-1], learned=False)
        learn = iter(self.lessons.learn.split(self.steps.batch))
        for inherited, steps in ((False, self.steps.seeding), (True, self.steps.aligning)):
            student = Alignment(hybrid, inherited=inherited)
            texts = [next(learn) for _ in range(steps * distill.processes()[1])]
            name = "align" if inherited else "mimic"
            self._train(arm, name, student, texts, replace(_ALIGNMENT, steps=steps))
            student.release()
            error = hybrid.fit_outputs(self.lessons.solve)
        texts = list(learn)
        training = replace(_DISTILLATION, steps=self.steps.distilling)
        self._train(arm, "distil", Distillation(hybrid, self.teacher, self.loss), texts, training)
        judged = judge(hybrid, self.lessons.judge)
        # Nearness to the original says nothing of what another model taught.
        if self.teacher is None and got_worse(closed[-1], judged):
            error, states, judged = closed
            for index, slot in hybrid.slots.items():
                slot.replacement.load_state_dict(states[index])
            return Taught(hybrid, error, judged, learned=False)
        return Taught(hybrid, error, judged, learned=True)

    def _train(
        self, arm: Arm, stage: str, student: Student, texts: Sequence[Tensor], training: Training
    ) -> None:
        every = max(1, -(-training.steps // EVALUATIONS))
        training = replace(
            training,
            learning_rate=self.rate * training.learning_rate,
            save_every=every,
            seed=self.seed,
        )
        folder = None if self.folder is None else self.folder / f"{arm}-{stage}"

        def judged(done: int) -> bool:
            if stage == "distil" and distill.processes()[0] == 0 and folder is not None:
                found = judge(student.hybrid, self.lessons.judge)  # type: ignore[arg-type]
                line = {"step": done, "kl": found.mean_kl, "ratio": found.perplexity_ratio}
                with (folder / EVALUATION).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            return False

        distill.train(
            student,
            texts.__getitem__,
            training,
            folder,
            key=json.dumps([arm, stage, self.loss, asdict(self.steps) if self.steps else None]),
            report=lambda _, done, total: self.report(f"{arm}: {stage}", done, total),
            stop=judged,
        )


def _copied(hybrid: HybridModel) -> dict[int, dict[str, Tensor]]:
    """The tensors of all replacements as they are now."""
    slots = hybrid.slots.items()
    return {i: {n: x.clone() for n, x in s.replacement.state_dict().items()} for i, s in slots}


EVALUATION = "evaluation.jsonl"
"""Of a stage: KL to the original and perplexity ratio on held-out text, now and then."""


def got_worse(closed: Judged, taught: Judged) -> bool:
    """Whether teaching took an arm away from the original."""
    return taught.mean_kl >= closed.mean_kl


def beats(result: Judged, control: Judged) -> bool:
    """Whether the result is nearer to the original than a control, by window and clearly.

    The mean of the paired differences is more than two standard errors below zero.
    """
    differences = torch.tensor(result.kl, dtype=torch.float64) - torch.tensor(control.kl)
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else 0.0
    return float(differences.mean()) < -2 * error

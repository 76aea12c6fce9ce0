"""Students whose past is coded: what training of codes has in common.

The teacher is the model itself, on a window whose end the student reads again through its codes
(`past.py`): KL(teacher ‖ student) behind the tokens of the end. Nothing but the codes is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvtool.calibrate.lessons import lessons
from kvtool.calibrate.past import Past, read_again, read_past, through
from kvtool.calibrate.tail import Attend, TailModel, divergence
from kvtool.checkpoint import Checkpoint
from kvtool.codes import STEP, Allocation, CodePlan, Fitted, Part, Projection, share_budget
from kvtool.distill import Amount, Student, Training, fast_bfloat16, step_seconds, train
from kvtool.progress import Progress

LENGTH = 1024
"""Tokens of a window."""
END = 512
"""Tokens at the end of a window that the student reads through its codes."""


class CodeStudent(Student):
    """A model whose codes are trained.

    Args:
        truth: Share of the loss that is the cross-entropy of the text instead of the divergence.
    """

    def __init__(self, model: TailModel, truth: float = 0.0) -> None:
        super().__init__()
        self.model, self.truth = model, truth

    def attends(self, past: Past) -> Sequence[Attend | None]:
        """How the layers read a past, drawn anew at every call; None as they do themselves."""
        raise NotImplementedError  # pragma: no cover

    def forward(self, ids: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The loss on a window `ids [S]`, in nats per token, and its two parts."""
        end = min(END, len(ids) // 2)
        fast = fast_bfloat16(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=fast):
            past = read_past(self.model, ids, end)
            said = read_again(self.model, past, self.attends(past))
        kl = divergence(past.expected.float(), said.float())
        if not self.truth:
            return kl, {}
        entropy = -said.float()[:-1].gather(1, past.reading.ids[1:, None]).mean()
        return (1 - self.truth) * kl + self.truth * entropy, {"kl": kl.detach()}


class FreeStudent(CodeStudent):
    """Free encoders and decoders, trained at widths that are drawn anew at every step.

    MatryoshkaKV (arXiv 2410.14731) draws ranks of all heads independently, and needs orthogonal
    bases for it. Here the rows that a budget takes are known: a width is drawn for all codes
    together, along the budgets from `least` to the full one, and what is cut later was trained.

    Args:
        codes: At the widths that are trained.
        fitted: The start.
        least: Share of the rows, of all codes together, that the smallest budget takes.
    """

    def __init__(
        self,
        model: TailModel,
        codes: Sequence[CodePlan],
        fitted: Sequence[Mapping[Part, Fitted]],
        allocation: Allocation,
        least: float = 0.5,
    ) -> None:
        super().__init__(model)
        self.codes, self.allocation, self.least = codes, allocation, least
        self.spectra = [
            [one.spectrum[:width] for one, width in zip(parts.values(), code.widths, strict=True)]
            for parts, code in zip(fitted, codes, strict=True)
        ]
        self.names: list[list[Part]] = [list(parts) for parts in fitted]
        self.means = [[one.projection.mean.float() for one in parts.values()] for parts in fitted]
        for index, (parts, code) in enumerate(zip(fitted, codes, strict=True)):
            for (part, one), width in zip(parts.items(), code.widths, strict=True):
                used = one.projection.cut(width)
                for name, x in (("encode", used.encode), ("decode", used.decode)):
                    parameter = torch.nn.Parameter(x.float().to(model.device).contiguous())
                    self.register_parameter(f"{index}_{part}_{name}", parameter)

    def rates(self) -> Mapping[str, float]:
        """Each parameter moves in its own measure."""
        sizes = {name: x.detach().square().mean().sqrt() for name, x in self.named_parameters()}
        return {name: max(float(size), 1e-6) for name, size in sizes.items()}

    def projections(self, index: int) -> dict[Part, Projection]:
        """Of one code, as they are now."""
        return {
            part: Projection(
                self.get_parameter(f"{index}_{part}_encode"),
                self.get_parameter(f"{index}_{part}_decode"),
                mean.to(self.model.device),
            )
            for part, mean in zip(self.names[index], self.means[index], strict=True)
        }

    def attends(self, past: Past) -> Sequence[Attend | None]:
        numbers = sum(code.width for code in self.codes)
        share = 1.0 if torch.rand(()) < 0.5 else float(torch.empty(()).uniform_(self.least, 1))
        floor = sum(min(STEP, len(x)) for own in self.spectra for x in own)
        taken = max(floor, int(share * numbers))
        narrow = share_budget(self.codes, self.spectra, self.allocation, taken)
        codes = [(code, self.projections(index)) for index, code in enumerate(narrow)]
        return through(self.model, past, codes)

    def fitted(self) -> list[dict[Part, Fitted]]:
        """What was trained; only the rows of these widths are there."""
        return [
            {
                part: Fitted(
                    Projection(*(x.detach().cpu() for x in vars(projection).values())), spectrum
                )
                for (part, projection), spectrum in zip(
                    self.projections(index).items(), spectra, strict=True
                )
            }
            for index, spectra in enumerate(self.spectra)
        ]


def train_codes(
    student: CodeStudent,
    checkpoint: Checkpoint,
    amount: Amount,
    learning_rate: float,
    data: str | None,
    seed: int,
    report: Progress,
) -> dict[str, float]:
    """Trains in place; returns the number of steps, their tokens, and the last losses' mean."""
    length = min(LENGTH, int(checkpoint.hf_config().max_position_embeddings))
    if amount.seconds is not None:
        (ids,) = lessons(checkpoint, data, 1, length, seed)
        one = step_seconds(student, ids, student.model.device)
        steps = max(1, int(amount.seconds / one))
    else:
        steps = amount.steps(length)
    windows = lessons(checkpoint, data, steps, length, seed)
    training = Training(steps, learning_rate, warmup=0.1, cooldown=0.5, clip=1.0, seed=seed)
    log = train(
        student, windows.__getitem__, training, None,
        report=lambda _, done, total: report("training", done, total),
    )  # fmt: skip
    last = log[-max(1, steps // 10) :]
    loss = sum(record["loss"] for record in last) / len(last)
    return {"steps": steps, "trained_tokens": steps * length, "loss": loss}

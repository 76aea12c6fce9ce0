"""Healing: the original model teaches the converted one, KL(original ‖ converted) of their logits.

What is left to learn is where a closed form does not reach: through the softmax and across layers.
The factors, if any, projections and biases of every attention module are trained, from what the fit
left there; the other weights stay, and both models share them. The latent norm is no part of it: a
healed layer is written like a fitted one, with its norm made linear.

Text alone does not teach a cache to be searched, so a quarter of the windows are recall tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvtool import distill
from kvtool._staging import write_file
from kvtool.attention import DenseAttention, GroupedQueryAttention
from kvtool.calibrate.lessons import lessons
from kvtool.checkpoint import Checkpoint
from kvtool.convert.fitting import ConvertedLayer, converted_stages
from kvtool.distill import Amount, Student, Training, fast_bfloat16
from kvtool.divergence import SLICE, divergence
from kvtool.errors import UsageError
from kvtool.latent import FactoredAttention, LatentFactors
from kvtool.layout import PLAIN, decoder_layers
from kvtool.progress import Progress
from kvtool.rope import Rope

WINDOW = 2048
"""Tokens of a window."""
BATCH = 1
"""Windows of a step."""
AUTO = 16 * 1024
"""Tokens of `--heal auto`."""
LEARNING_RATE = 5e-4
"""Relative: AdamW moves a parameter by this share of its root mean square per step."""


class _Either(nn.Module):
    """Stands where a decoder layer expects its attention: the original's, or the converted one.

    Args:
        scale: Of the model's RoPE.
    """

    def __init__(
        self,
        original: DenseAttention,
        converted: FactoredAttention | DenseAttention,
        scale: float,
    ) -> None:
        super().__init__()
        self.original, self.converted, self.scale = original, converted, scale
        self.teaching = False

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        stages = self.original if self.teaching else self.converted
        return stages.output(stages.context(hidden_states, self.scale)), None


class ConvertedStudent(Student):
    """The converted model; the original shares all its weights outside the attention.

    Args:
        model: The original as transformers loads it; its attention modules are replaced.
        teacher: Another model with the same vocabulary, instead of the original.
        rope: Of the model.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[ConvertedLayer],
        rope: Rope,
        teacher: Any | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        # In a tuple, so that its weights are no parameters of this module.
        self._teacher = (teacher,)
        self.attentions: list[_Either] = []
        for index, layer in enumerate(decoder_layers(model)):
            name = f"model.layers.{index}.self_attn"
            own = GroupedQueryAttention(layer.self_attn, name)
            converted = converted_stages(own, layers[index], rope)
            either = _Either(DenseAttention(own, rope), converted, rope.scale)
            if isinstance(converted, FactoredAttention):
                for part, factor in list(converted.named_buffers(recurse=False)):
                    delattr(converted, part)
                    setattr(converted, part, nn.Parameter(factor))
            for projection in (converted.gqa.qkv, converted.gqa.o_proj):
                projection.requires_grad_(True)
            layer.self_attn = either
            self.attentions.append(either)

    def rates(self) -> Mapping[str, float]:
        """Parameters differ in size by orders of magnitude: each moves in its own measure."""
        trained = {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}
        return {n: max(float(p.square().mean().sqrt()), 1e-4) for n, p in trained.items()}

    def hidden(self, ids: Tensor, teaching: bool) -> Tensor:
        """Final hidden states `[B, T, hidden]` of windows `[B, T]`."""
        for attention in self.attentions:
            attention.teaching = teaching
        states: Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return states

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean KL per position of windows `ids [B, T]`, in nats."""
        device = self.model.device
        ids = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
            with torch.no_grad():
                (teacher,) = self._teacher
                head = self.model.lm_head if teacher is None else teacher.lm_head
                told = self.hidden(ids, True) if teacher is None else _states(teacher, ids)
            size = min(len(head.weight), len(self.model.lm_head.weight))  # some are padded
            states = self.hidden(ids, False)
            weights = (self.model.lm_head.weight[:size], head.weight[:size])
            total = divergence(states.flatten(0, 1), told.flatten(0, 1), *weights)
        return total / ids.numel(), {}

    def converted(self) -> list[ConvertedLayer]:
        """The layers as they are now."""
        return [_layer(either.converted) for either in self.attentions]


def _states(model: Any, ids: Tensor) -> Tensor:
    model.to(ids.device)  # the student may have been moved
    states: Tensor = model.model(ids, use_cache=False).last_hidden_state
    return states


def _layer(stages: FactoredAttention | DenseAttention) -> ConvertedLayer:
    factors = None
    if isinstance(stages, FactoredAttention):
        trained = {n: p.detach().double() for n, p in stages.named_parameters(recurse=False)}
        factors = LatentFactors(inv_freq=stages.inv_freq, **trained)
    weights: dict[str, Tensor] = {}
    names = ("q_proj", "k_proj", "v_proj")
    for kind, tensor in stages.gqa.qkv.named_parameters():
        rows = tensor.detach().split(stages.gqa.sizes)
        weights |= {f"{name}.{kind}": part for name, part in zip(names, rows, strict=True)}
    weights |= {f"o_proj.{kind}": t.detach() for kind, t in stages.gqa.o_proj.named_parameters()}
    return ConvertedLayer(factors, weights)


def heal(
    checkpoint: Checkpoint,
    layers: Sequence[ConvertedLayer],
    rope: Rope,
    amount: Amount,
    folder: Path,
    *,
    data: str | None,
    teacher: Checkpoint | None,
    device: str,
    seed: int,
    report: Progress,
) -> list[ConvertedLayer]:
    """Trains the converted layers; goes on where a killed run stopped that left its state.

    Args:
        folder: Where the state of the training is kept.

    Raises:
        UsageError: The teacher has another tokenizer.
        KvtoolError: See :func:`kvtool.distill.train`.
    """
    student = ConvertedStudent(
        checkpoint.load_transformers(torch.float32, device),
        layers,
        rope,
        None if teacher is None else _load_teacher(teacher, checkpoint, device),
    )
    length = window(checkpoint, teacher)
    rank, processes = distill.processes()
    if amount.seconds is not None and rank == 0:
        _measure_steps(student, amount.seconds, checkpoint, length, data, folder, seed)
    distill.wait_for_everyone()
    if amount.tokens is None:
        steps = int((folder / STEPS).read_text())
    else:
        steps = amount.steps(BATCH * length * processes)
    training = Training(steps, LEARNING_RATE, warmup=0.1, cooldown=0.5, clip=1.0, seed=seed)
    windows = lessons(checkpoint, data, steps * BATCH * processes, length, seed)
    batches = windows.split(BATCH)
    distill.train(
        student,
        batches.__getitem__,
        training,
        folder,
        report=lambda _, done, total: report("healing", done, total),
    )
    return student.converted()


def memory_bytes(config: Any, weights: int, trained: int) -> int:
    """About what healing holds besides Python and its libraries.

    Args:
        weights: Numbers in the checkpoint. trained: Those in the parameters that healing trains.
    """
    length = BATCH * min(WINDOW, int(config.max_position_embeddings))
    sizes = 8 * int(config.hidden_size) + 4 * int(config.intermediate_size)
    kept = 4 * sizes  # of a token, per layer
    logits = 4 * 4 * min(SLICE, length) * int(config.vocab_size)
    # Twice the original attention, and of the trained numbers also gradients, AdamW's moments, and
    # the factors that they started from, in float64.
    activations = length * kept * int(config.num_hidden_layers)
    return 4 * weights + 28 * trained + activations + logits


def window(checkpoint: Checkpoint, teacher: Checkpoint | None) -> int:
    """Tokens of a window that all models have positions for."""
    models = [checkpoint] if teacher is None else [checkpoint, teacher]
    return min(WINDOW, *(int(m.hf_config().max_position_embeddings) for m in models))


def check_teacher(teacher: Checkpoint, checkpoint: Checkpoint) -> None:
    """Raises UsageError unless it is of a known family and both have the same tokens."""
    family = teacher.config.get("model_type")
    if family not in PLAIN:
        known = ", ".join(PLAIN)
        raise UsageError(f"the teacher {teacher.source} is of type '{family}', not of {known}")
    if teacher.tokenizer().get_vocab() != checkpoint.tokenizer().get_vocab():
        raise UsageError(
            f"the teacher {teacher.source} and {checkpoint.source} have different tokenizers, so "
            "their predictions cannot be compared"
        )


def _load_teacher(teacher: Checkpoint, checkpoint: Checkpoint, device: str) -> Any:
    check_teacher(teacher, checkpoint)
    return teacher.load_transformers(torch.float32, device).requires_grad_(False)


STEPS = "steps"


def _measure_steps(
    student: ConvertedStudent,
    seconds: float,
    checkpoint: Checkpoint,
    length: int,
    data: str | None,
    folder: Path,
    seed: int,
) -> None:
    """Notes how many steps a time is worth here, once: a resumed run keeps the number."""
    if (folder / STEPS).is_file():
        return
    ids = lessons(checkpoint, data, BATCH, length, seed)
    one = distill.step_seconds(student, ids, student.model.device)
    write_file(folder / STEPS, str(max(1, int(seconds / one))).encode())

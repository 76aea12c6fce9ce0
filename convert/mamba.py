"""Attention layers to Mamba-2: a stock hybrid checkpoint, taught by the original, with controls.

After Apriel-H1 (arXiv 2511.02651) and mmMamba (arXiv 2502.13145). Mixers inherit queries, keys and
values, mimic how far each head looks back, and are taught (`teaching.py`); so are two controls, on
the same text: mixers that inherit nothing, and linear maps that do not mix tokens. A result that is
not clearly nearer to the original than both is no success.

The whole model is in memory, twice while another teacher teaches.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvtool import distill
from kvtool._staging import write_file
from kvtool.calibrate import statistics
from kvtool.calibrate.lessons import lessons
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.checkpoint import (
    Checkpoint,
    Staging,
    scratch_folder,
    torch_dtype,
)
from kvtool.convert import artifact, granite
from kvtool.convert.conversion import ConversionResult
from kvtool.convert.fitting import save
from kvtool.convert.mamba_planning import WINDOW, MambaOptions, plan, save_dtype
from kvtool.convert.options import PROBE
from kvtool.convert.teaching import ARMS, Lessons, Steps, Teacher, beats
from kvtool.corpus import calibration_text, evaluation_text, training_text
from kvtool.hybrid import Arm, Judged
from kvtool.layout import describe
from kvtool.mamba import Mixer
from kvtool.progress import Progress, peak_memory, silent
from kvtool.replacements import mixer_shape

SOLVE = 16
"""Texts that read-outs are solved on."""
JUDGE = 8
"""Texts of `WINDOW` tokens that arms are judged by."""


@dataclass(frozen=True)
class MambaResult(ConversionResult):
    """What a conversion did.

    Attributes:
        arms: By arm, `kl` and `perplexity_ratio` on held-out text, by layer the `error` that
            alignment left, and whether it `learned`: see :class:`~kvtool.convert.teaching.Taught`.
        beaten: Whether the result is clearly nearer to the original than each control.
    """

    arms: dict[str, Any] = dataclasses.field(default_factory=dict)
    beaten: dict[str, bool] = dataclasses.field(default_factory=dict)


def convert(
    checkpoint: Checkpoint,
    output: Path,
    options: MambaOptions,
    *,
    report: Progress = silent,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "cpu",
    teacher: Checkpoint | None = None,
) -> MambaResult | None:
    """Converts the attention of some layers, and the controls beside it.

    Under `accelerate launch` all processes train, and the first writes; the others get None.

    Args:
        output: The folder to make; it appears only when everything is in it.
        device: Where the arms are taught.
        teacher: What `options.teacher` names, opened.
        resume: Go on where a killed run with the same model and options stopped.

    Raises:
        KvtoolError: See `plan`, and :func:`kvtool.distill.train`.
    """
    started = time.perf_counter()
    first = distill.processes()[0] == 0
    distill.wait_for_everyone()
    if teacher is None and options.teacher is not None:
        teacher = Checkpoint.open(options.teacher)
    planned = plan(
        checkpoint, options, output if first else None,
        device=device, overwrite=overwrite, teacher=teacher,
    )  # fmt: skip
    staging, corpus = None, calibration_text(options.data)
    if first:
        models = [checkpoint] if teacher is None else [checkpoint, teacher]
        made_of = (training_text(options.data).id, options.sizes(checkpoint, device))
        staging = Staging(
            output,
            key=artifact.key_of(models, *made_of, dataclasses.asdict(options)),
            overwrite=overwrite,
            resume=resume,
            source=checkpoint.path,
        )
        reaches(checkpoint, options, report)  # the others find the statistics there
    distill.wait_for_everyone()
    work = _Work(checkpoint, options, teacher, device, scratch_folder(output), report)
    judged = {arm: work.arm(arm) for arm in ARMS}
    if staging is None:
        return None
    artifact.write_weights(staging.path, *work.tensors(), options, report)
    work.write_probe(staging.path)
    work.write_log(staging.path / artifact.HEALING)
    checkpoint.copy_side_files(staging.path)
    result = MambaResult(
        output=output,
        plan=planned,
        ranks=[],
        freqfold=None,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(),
        arms={arm: about for arm, (_, about) in judged.items()},
        beaten={arm: beats(judged["mamba"][0], judged[arm][0]) for arm in ARMS[1:]},
    )
    dtype = str(save_dtype(checkpoint, options)).removeprefix("torch.")
    config = granite.stock_config(
        checkpoint.hf_config(), describe(checkpoint.hf_config())[0], options.layers, dtype
    )
    artifact.write(staging.path, checkpoint, options, corpus, config, [], result)
    staging.commit()
    return result


def reaches(
    checkpoint: Checkpoint,
    options: MambaOptions,
    report: Progress = silent,
) -> dict[int, Tensor]:
    """How far the heads of the layers look back, `[Q]` each, from the model's statistics."""
    found = statistics.collect(
        checkpoint,
        StatisticsOptions(data=options.data, tokens=options.tokens, seed=options.seed),
        report,
    )
    return {index: found.layer(index).reach for index in options.layers}


def texts(checkpoint: Checkpoint, options: MambaOptions, window: int, learned: int) -> Lessons:
    """What read-outs are solved on, so many texts to learn from, and what arms are judged by."""
    tokenizer = checkpoint.tokenizer()
    chat = StatisticsOptions.chat
    short = min(WINDOW, window)
    return Lessons(
        solve=calibration_text(options.data).windows(tokenizer, short, SOLVE, options.seed, chat),
        learn=lessons(checkpoint, options.data, learned, window, options.seed)
        if learned
        else torch.empty(0, window, dtype=torch.long),
        judge=evaluation_text(options.data).windows(tokenizer, short, JUDGE),
    )


class _Work:
    """What is made in the scratch folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: MambaOptions,
        teacher: Checkpoint | None,
        device: str,
        scratch: Path,
        report: Progress,
    ) -> None:
        self.checkpoint, self.options, self.scratch = checkpoint, options, scratch
        self.report, self.device = report, device
        self.steps: Steps | None = None
        reach = reaches(checkpoint, options)
        batch, window = options.sizes(checkpoint, device)
        taught: Any = None
        if teacher is not None:
            taught = teacher.load_transformers(torch.float32, device).requires_grad_(False)
        seconds = None if options.amount is None else options.amount.seconds
        processes = distill.processes()[1]
        if options.amount is not None:
            steps = 3
            if seconds is None:
                steps = options.amount.steps(batch * window * processes)
            self.steps = Steps.of(steps, batch)
        if seconds is not None:
            self.steps = Steps.of(self._steps_in(seconds, reach, taught, window), batch)
        learned = 0 if self.steps is None else self.steps.total * batch * processes
        self.teacher = Teacher(
            checkpoint,
            reach,
            texts(checkpoint, options, window, learned),
            self.steps,
            loss=options.loss,
            teacher=taught,
            device=device,
            seed=options.seed,
            folder=scratch,
            report=report,
        )

    def _steps_in(self, seconds: float, reach: dict[int, Tensor], taught: Any, window: int) -> int:
        """How many steps a time is worth here, once: a resumed run keeps the number."""
        noted, first = self.scratch / "steps", distill.processes()[0] == 0
        assert self.steps is not None
        if first and not noted.is_file():
            batch = self.steps.batch
            lesson = texts(self.checkpoint, self.options, window, batch)
            trial = Teacher(
                self.checkpoint, reach, lesson, None, teacher=taught, device=self.device
            )
            steps = max(3, int(seconds / trial.step_seconds()))
            write_file(noted, str(steps).encode())
        distill.wait_for_everyone()
        return int(noted.read_text())

    def arm(self, arm: Arm) -> tuple[Judged, dict[str, Any]]:
        """Teaches an arm, unless that is done; how good it is, and what to tell of it."""
        weights, about = self.scratch / f"{arm}.safetensors", self.scratch / f"{arm}.json"
        if not about.is_file():
            taught = self.teacher.teach(arm)
            if distill.processes()[0] == 0:
                self._save(taught.hybrid.slots, weights)
                what = {
                    "judged": dataclasses.asdict(taught.judged),
                    "error": taught.error,
                    "learned": taught.learned,
                }
                write_file(about, json.dumps(what).encode())
            distill.wait_for_everyone()
        found = json.loads(about.read_text())
        judged = Judged(**found["judged"])
        told = {
            "kl": judged.mean_kl,
            "perplexity_ratio": judged.perplexity_ratio,
            "error": found["error"],
            "learned": found.get("learned", True),
        }
        return judged, told

    def _save(self, slots: Mapping[int, Any], file: Path) -> None:
        tensors = {
            f"{index}.{name}": tensor.detach().cpu()
            for index, slot in slots.items()
            for name, tensor in slot.replacement.state_dict().items()
        }
        save(tensors, file, {})

    def mixer(self, index: int) -> Mixer:
        """The result of one layer."""
        layout = describe(self.checkpoint.hf_config())[index]
        with safe_open(self.scratch / "mamba.safetensors", "pt") as stored:
            names = [n for n in stored.keys() if n.startswith(f"{index}.")]  # noqa: SIM118
            state = {name.split(".", 1)[1]: stored.get_tensor(name) for name in names}
        mixer = Mixer(mixer_shape(layout), linear=True)
        mixer.load_state_dict(state)
        return mixer

    def tensors(self) -> tuple[Mapping[str, Callable[[], Tensor]], Mapping[str, Any]]:
        """How to get each tensor of the output, and its shape and dtype."""
        made: dict[str, Callable[[], Tensor]] = {}
        infos: dict[str, Any] = {}
        source, layout = self.checkpoint.tensors, describe(self.checkpoint.hf_config())[0]
        shapes = {name: info.shape for name, info in source.items()}
        for name, parts in granite.other_tensors(source, self.options.layers).items():
            made[name] = granite.reader(self.checkpoint.read, parts)
            shape = granite.joined_shape(shapes, parts)
            infos[name] = SimpleNamespace(shape=shape, dtype=source[parts[0]].dtype)
        dtype = save_dtype(self.checkpoint, self.options)
        eps = float(self.checkpoint.config["rms_norm_eps"])
        for index in range(len(describe(self.checkpoint.hf_config()))):
            prefix = f"model.layers.{index}."
            if index not in self.options.layers:
                if granite.zero_bias(layout):
                    own = source[f"{prefix}self_attn.o_proj.weight"]
                    name = f"{prefix}self_attn.o_proj.bias"
                    zeros = torch.zeros(own.shape[0], dtype=torch_dtype(own.dtype))
                    _add(made, infos, name, zeros)
                continue
            for name, tensor in granite.stock_mixer(self.mixer(index), eps).items():
                kept = torch.float32 if name in granite.KEPT_FLOAT32 else dtype
                _add(made, infos, f"{prefix}mamba.{name}", tensor.to(kept))
        return made, infos

    def write_probe(self, folder: Path) -> None:
        """Leaves a text and its logits in the output, for `verify`."""
        config = self.checkpoint.hf_config()
        length = min(PROBE, int(config.max_position_embeddings))
        tokenizer = self.checkpoint.tokenizer()
        ids = evaluation_text(self.options.data).windows(tokenizer, length, 1)[0]
        hybrid = self.teacher.new("mamba")
        for index, slot in hybrid.slots.items():
            slot.replacement.load_state_dict(self.mixer(index).state_dict())
        positions = artifact.probe_positions(len(ids))
        with torch.inference_mode():
            states = hybrid.states(ids[None].to(hybrid.device))[0]
            logits = (states[positions] @ hybrid.head.T).cpu()
        artifact.write_probe(folder, ids, positions, logits)

    def write_log(self, target: Path) -> None:
        """The steps of all arms and stages, without the times: a resumed run ends the same."""
        lines = []
        for folder in sorted(self.scratch.glob("*-*/")):
            arm, stage = folder.name.split("-")
            for line in (folder / distill.LOG).read_text(encoding="utf-8").splitlines():
                record = {k: v for k, v in json.loads(line).items() if k != "seconds"}
                lines.append(json.dumps({"arm": arm, "stage": stage, **record}) + "\n")
        if lines:
            target.parent.mkdir(exist_ok=True)
            target.write_text("".join(lines), encoding="utf-8")


def _add(
    made: dict[str, Callable[[], Tensor]], infos: dict[str, Any], name: str, tensor: Tensor
) -> None:
    from kvtool.checkpoint import dtype_name

    made[name] = lambda: tensor
    infos[name] = SimpleNamespace(shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))

"""A conversion: fit layer by layer, write, resume. `planning.py` says what is to be done.

The order of work: statistics of the model are measured, or found where an earlier run left them;
from them a :class:`ConvertedLayer` is fitted for each one (`fitting.py`, as `mla.py` or `gqa.py`
say); all layers together are healed if asked for (`heal.py`); the tensors of the target are written
layer by layer, and put together as shards at the end. A killed run goes on behind what it finished
last and ends with the same bytes.

While the tensors are written, a *probe* text goes through what was fitted, in fp32. Its
logits are what the written checkpoint must reproduce in any engine; `verify` holds it to them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtool import distill
from kvtool.calibrate import statistics
from kvtool.calibrate.statistics_file import Statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import (
    Checkpoint,
    Staging,
    read_header,
    scratch_folder,
)
from kvtool.convert import artifact, fitting, heal
from kvtool.convert.fitting import (
    Conversion,
    ConvertedLayer,
    fitted_file,
    healed_file,
    save,
)
from kvtool.convert.fp8_kv import ToFp8Kv
from kvtool.convert.gqa import ToGqa
from kvtool.convert.mla import ToMla
from kvtool.convert.options import ConvertOptions, statistics_options, texts
from kvtool.convert.planning import opened, plan, replaced_parts
from kvtool.corpus import calibration_text
from kvtool.errors import CalibrationError
from kvtool.progress import Progress, peak_memory, silent


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did; `to_dict` is what `--json` prints.

    Attributes:
        ranks: Widths of the latents; none without latents.
        freqfold: F, where TransMLA used one.
    """

    output: Path
    plan: dict[str, Any]
    ranks: list[int]
    freqfold: int | None
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def convert(
    checkpoint: Checkpoint,
    output: Path,
    options: ConvertOptions,
    *,
    report: Progress = silent,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "cpu",
    teacher: Checkpoint | None = None,
) -> ConversionResult | None:
    """Converts a GQA checkpoint to MLA or to fewer KV heads, or adds scales for an fp8 cache.

    Under `accelerate launch` the first process does everything but healing alone; the others take
    part in that, and get None.

    Args:
        output: The folder to make; it appears only when everything is in it.
        device: Where healing runs; everything else is done on the CPU.
        teacher: What `options.teacher` names, opened.
        report: Progress.
        overwrite: Replace an existing checkpoint there.
        resume: Go on where a killed run with the same model and options stopped.

    Raises:
        KvtoolError: See `plan`; also a full disk (predicted), bad values met on the way.
    """
    started = time.perf_counter()
    teacher = opened(options, teacher)
    if options.heal is not None:
        distill.wait_for_everyone()  # all connect before some wait for hours
    if distill.processes()[0] > 0:
        if options.heal is not None:
            _heal(checkpoint, options, teacher, scratch_folder(output), device, report)
        return None
    planned = plan(checkpoint, options, output, overwrite=overwrite, teacher=teacher)
    stream = LayerStream(checkpoint)
    corpus = calibration_text(options.data)
    models = [checkpoint] if teacher is None else [checkpoint, teacher]
    lessons = None if planned["healing"] is None else planned["healing"]["text"]
    staging = Staging(
        output,
        key=artifact.key_of(models, corpus.id, lessons, dataclasses.asdict(options)),
        overwrite=overwrite,
        resume=resume,
        source=checkpoint.path,
    )
    cost = _Cost(staging.scratch / "cost.json", started)

    def noted(stage: str, done: int, total: int) -> None:
        cost.note()
        report(stage, done, total)

    work = _Work(stream, options, planned, staging.scratch, noted)
    work.fit(resume)
    if options.heal is not None:
        _heal(checkpoint, options, teacher, staging.scratch, device, noted)
    work.emit()
    layers = [work.layer_file(i) for i in range(len(stream))]
    artifact.write_weights(staging.path, *_all_tensors(work.to, layers), options, report)
    about = [_read_metadata(file) for file in layers]
    ranks = [int(metadata["rank"]) for metadata in about if "rank" in metadata]
    result = ConversionResult(
        output=output,
        plan=planned,
        ranks=ranks,
        freqfold=work.to.freqfold,
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
    )
    work.write_probe(staging.path)
    if options.heal is not None:
        _copy_log(staging.scratch / distill.LOG, staging.path / artifact.HEALING)
    work.to.source.copy_side_files(staging.path)
    work.to.write_beside(staging.path)
    last = ConvertedLayer.load(work.converted_file(len(stream) - 1))
    config = work.to.config(last)
    artifact.write(
        staging.path,
        checkpoint,
        options,
        corpus,
        config,
        work.to.replaced,
        result,
    )
    staging.commit()
    return result


class _Cost:
    """Seconds and peak memory of a conversion, over all the runs that it took."""

    def __init__(self, file: Path, started: float) -> None:
        self.file, self.started = file, started
        self.before = {"seconds": 0.0, "peak_memory_bytes": 0}
        if file.is_file():
            self.before = json.loads(file.read_text())

    @property
    def seconds(self) -> float:
        return self.before["seconds"] + time.perf_counter() - self.started

    @property
    def peak_memory_bytes(self) -> int:
        return max(int(self.before["peak_memory_bytes"]), peak_memory())

    def note(self) -> None:
        """Keeps them for a run that goes on."""
        unfinished = self.file.with_suffix(".unfinished")
        known = {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}
        unfinished.write_text(json.dumps(known))
        unfinished.replace(self.file)


class _Work:
    """The streaming pass of one conversion and what it leaves in the scratch folder."""

    def __init__(
        self,
        stream: LayerStream,
        options: ConvertOptions,
        planned: dict[str, Any],
        scratch: Path,
        report: Progress,
    ) -> None:
        self.stream, self.options, self.planned = stream, options, planned
        self.scratch, self.report = scratch, report
        self.checkpoint = stream.checkpoint
        self.to: Conversion
        if options.to == "fp8-kv":
            self.to = ToFp8Kv(stream, options)
        elif options.to == "gqa":
            self.to = ToGqa(stream, options, replaced_parts(options))
        else:
            replaced = replaced_parts(options)
            self.to = ToMla(stream, options, replaced, planned, scratch, report)

    def layer_file(self, index: int) -> Path:
        """Where the finished tensors of a layer wait for the shards."""
        return self.scratch / f"layer-{index:05d}.safetensors"

    def fit(self, resume: bool) -> None:
        """Fits every layer that is not there yet."""
        (text, _), measured = texts(self.checkpoint, self.options), None
        by_text = not self.to.by_statistics
        if text is not None and not by_text:
            measured = self._statistics(resume)
        fit = self.to.method(measured, text)
        read = text if by_text or self.options.method == "aware" else None
        fitting.fit_layers(self.stream, fit, self.scratch, self.report, read, refit=not by_text)
        files = (fitted_file(self.scratch, i) for i in range(len(self.stream)))
        self.to.check(map(ConvertedLayer.load, files))

    def _statistics(self, resume: bool) -> Statistics:
        options = statistics_options(self.checkpoint, self.options)
        return statistics.collect(self.checkpoint, options, self.report, resume)

    def emit(self) -> None:
        """Writes the tensors of every layer, and takes the probe through what they mean."""
        _, probe_ids = texts(self.checkpoint, self.options)
        first, state_file = 0, self.scratch / "probe_states.safetensors"
        if state_file.is_file():
            first = int(_read_metadata(state_file)["next_layer"])
            with safe_open(state_file, "pt") as stored:
                probe = stored.get_tensor("probe")
        else:
            probe = self.stream.embed(probe_ids[None])
            save_file({"ids": probe_ids}, self.scratch / "probe_ids.safetensors")
        total = len(self.stream)
        self.report("converting", first, total)
        for index in range(first, total):
            converted = ConvertedLayer.load(self.converted_file(index))
            self.to.run(index, converted, probe)
            factors = converted.factors
            rank = {} if factors is None else {"rank": str(factors.rank)}
            save(self.to.tensors(index, converted), self.layer_file(index), rank)
            save({"probe": probe}, state_file, {"next_layer": str(index + 1)})
            self.report("converting", index + 1, total)
        self.probe = probe[0]

    def converted_file(self, index: int) -> Path:
        """The layer as it is to be written: healed, or as fitted."""
        file = fitted_file if self.options.heal is None else healed_file
        return file(self.scratch, index)

    def write_probe(self, folder: Path) -> None:
        """Leaves the probe and its logits in the output, for `verify`."""
        with safe_open(self.scratch / "probe_ids.safetensors", "pt") as stored:
            ids = stored.get_tensor("ids")
        positions = artifact.probe_positions(len(ids))
        logits = self.stream.logits(self.probe[positions])
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError(
                "the final norm or the output head gives values that are not finite"
            )
        artifact.write_probe(folder, ids, positions, logits)


def _heal(
    checkpoint: Checkpoint,
    options: ConvertOptions,
    teacher: Checkpoint | None,
    scratch: Path,
    device: str,
    report: Progress,
) -> None:
    """Trains all fitted layers together, unless that is done; every process takes part."""
    assert options.heal is not None
    distill.wait_for_everyone()  # until the first one has fitted
    stream = LayerStream(checkpoint)
    total = len(stream)
    done = healed_file(scratch, total - 1).is_file()
    distill.wait_for_everyone()  # until all have looked: the first may soon remove it
    if done:
        return
    healed = heal.heal(
        checkpoint,
        [ConvertedLayer.load(fitted_file(scratch, i)) for i in range(total)],
        stream.rope,
        distill.Amount.parse(options.heal, "--heal", heal.AUTO),
        scratch,
        data=options.data,
        teacher=teacher,
        device=device,
        seed=options.seed,
        report=report,
    )
    if distill.processes()[0] == 0:
        for index, layer in enumerate(healed):
            layer.save(healed_file(scratch, index))


def _copy_log(log: Path, target: Path) -> None:
    """Without the times: a resumed conversion ends with the same bytes."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({k: v for k, v in r.items() if k != "seconds"}) + "\n" for r in records]
    target.write_text("".join(lines), encoding="utf-8")


def _all_tensors(
    to: Conversion, layers: list[Path]
) -> tuple[Mapping[str, Callable[[], Tensor]], Mapping[str, Any]]:
    """How to get each tensor of the output, and its shape and dtype."""
    tensors: dict[str, Callable[[], Tensor]] = {}
    infos: dict[str, Any] = {}

    def from_source(name: str) -> Callable[[], Tensor]:
        return lambda: to.source.read(name)

    for name, info in to.source.tensors.items():
        if to.stays(name):
            tensors[name], infos[name] = from_source(name), info
    for file in layers:
        converted = read_header(file)
        for name, info in converted.items():
            tensors[name], infos[name] = artifact.reader(file, name), info
    if to.options.target == "vllm" and "lm_head.weight" not in tensors:
        # vLLM's class does not tie the output head to the embedding.
        tensors["lm_head.weight"] = from_source("model.embed_tokens.weight")
        infos["lm_head.weight"] = to.source.tensors["model.embed_tokens.weight"]
    return tensors, infos


def _read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stored:
        return dict(stored.metadata() or {})

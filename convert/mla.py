"""GQA to MLA: fit layer by layer, write, resume. `planning.py` says what is to be done.

The order of work: statistics of the model are measured, or found where an earlier run left them;
from them :class:`LatentFactors` are fitted layer by layer (`fitting.py`, by the method of
`aware.py`, `transmla.py` or `exact.py`); all layers together are healed if asked for (`heal.py`);
the tensors of the target are written layer by layer, and put together as shards at the end. A
killed run goes on behind what it finished last and ends with the same bytes.

While the tensors are written, a *probe* text goes through the factors themselves, in fp32. Its
logits are what the written checkpoint must reproduce in any engine; `verify` holds it to them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtool import __version__, distill
from kvtool.calibrate import statistics
from kvtool.calibrate.statistics import Statistics
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.checkpoint import (
    Checkpoint,
    Staging,
    read_header,
    scratch_folder,
    write_shards,
)
from kvtool.convert import artifact, aware, deepseek_v3, fitting, heal, targets, transmla
from kvtool.convert.exact import exact_factors
from kvtool.convert.fitting import (
    ConvertedLayer,
    converted_attention,
    fitted_file,
    healed_file,
    save,
)
from kvtool.convert.planning import (
    MlaOptions,
    is_replaced,
    opened,
    plan,
    replaced_parts,
    save_dtype,
    shard_bytes,
    statistics_options,
    texts,
)
from kvtool.corpus import calibration_text
from kvtool.errors import CalibrationError
from kvtool.factored import factor_tensors, factored_config
from kvtool.latent import LatentFactors

Report = Callable[[str, int, int], None]
"""Told (stage, steps done, steps in all)."""

SEARCH_WINDOWS = 4
"""How many of them serve to choose FreqFold."""


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did; `to_dict` is what `--json` prints."""

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
    options: MlaOptions,
    *,
    report: Report = lambda stage, done, total: None,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "cpu",
    teacher: Checkpoint | None = None,
) -> ConversionResult | None:
    """Converts a GQA checkpoint to MLA.

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
    fingerprint = checkpoint.fingerprint()
    # The fingerprint samples large tensors; a file changed since the run was killed must not slip
    # through.
    files = sorted({info.file for info in checkpoint.tensors.values()})
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = [__version__, torch.__version__, transformers.__version__]
    made_of = [*versions, fingerprint, stamps, corpus.id]
    if planned["healing"] is not None:
        made_of.append(planned["healing"]["text"])
    if teacher is not None:
        made_of.append(teacher.fingerprint())
    key = json.dumps([*made_of, dataclasses.asdict(options)])
    staging = Staging(
        output,
        key=hashlib.sha256(key.encode()).hexdigest(),
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
    tensors, infos = _all_tensors(checkpoint, options, layers)
    report("writing", 0, 1)
    write_shards(
        staging.path,
        tensors,
        infos,
        shard_size=shard_bytes(options.shard_size),
        metadata={"kvtool_version": __version__},
    )
    report("writing", 1, 1)
    ranks = [int(_read_metadata(file)["rank"]) for file in layers]
    result = ConversionResult(
        output=output,
        plan=planned,
        ranks=ranks,
        freqfold=work.freqfold,
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
    )
    work.write_probe(staging.path)
    if options.heal is not None:
        _copy_log(staging.scratch / distill.LOG, staging.path / artifact.HEALING)
    checkpoint.copy_side_files(staging.path)
    config, replaced = work.config(), replaced_parts(options)
    artifact.write(staging.path, checkpoint, fingerprint, options, corpus, config, replaced, result)
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


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Work:
    """The streaming pass of one conversion and what it leaves in the scratch folder."""

    def __init__(
        self,
        stream: LayerStream,
        options: MlaOptions,
        planned: dict[str, Any],
        scratch: Path,
        report: Report,
    ) -> None:
        self.stream, self.options, self.planned = stream, options, planned
        self.scratch, self.report = scratch, report
        self.checkpoint = stream.checkpoint
        self.dtype = save_dtype(self.checkpoint, options)
        self.freqfold: int | None = None

    def layer_file(self, index: int) -> Path:
        """Where the finished tensors of a layer wait for the shards."""
        return self.scratch / f"layer-{index:05d}.safetensors"

    def fit(self, resume: bool) -> None:
        """Fits every layer that is not there yet."""
        text, _ = texts(self.checkpoint, self.options)
        measured = None if text is None else self._statistics(resume)
        fit = self._method(measured, text)
        refit = text if self.options.method == "aware" else None
        fitting.fit_layers(self.stream, fit, self.scratch, self.report, refit)

    def _statistics(self, resume: bool) -> Statistics:
        options = statistics_options(self.checkpoint, self.options)
        return statistics.collect(self.checkpoint, options, self.report, resume)

    def _method(
        self, measured: Statistics | None, text: Tensor | None
    ) -> Callable[[StreamedLayer], LatentFactors]:
        """How the factors of a layer come from its weights and statistics."""
        rope, layout = self.stream.rope, self.stream.layouts[0]
        heads, width = layout.kv_heads, layout.kv_heads * layout.head_dim
        rope_dim, rank = self.planned["rope_dim"], self.planned["rank"]
        if measured is None or text is None:
            return lambda layer: exact_factors(layout, rope)
        if self.options.method == "transmla":
            self.freqfold = fold = self._freqfold(text)

            def published(layer: StreamedLayer) -> LatentFactors:
                # Sinks included, as published: the latent holds them too.
                moment = measured.layer(layer.index).joint_moment
                gram = transmla.key_gram(moment[:width, :width], heads)
                basis = transmla.RotatedBasis(gram, rope_dim, fold)
                return transmla.latent_factors(moment, basis, rope, heads, rank)

            return published

        def components(index: int) -> aware.Components:
            return aware.rope_components(measured.layer(index), layout, rope)

        shared: Tensor | None = None
        if self.options.target == "vllm":
            shared = aware.one_per_frequency(layout.head_dim, rope_dim)
        elif self.options.target == "transformers":
            every = [components(i) for i in range(len(self.stream))]
            shared = aware.shared_by_layers(every, rope_dim // 2)

        def ours(layer: StreamedLayer) -> LatentFactors:
            found = components(layer.index)
            kept = shared
            if kept is None:
                kept = aware.most_damaging(found.damage, rope_dim // 2)
            output = layer.attention.o_proj.weight
            basis = aware.basis_of(found, kept)
            return aware.latent_factors(measured.layer(layer.index), basis, output, rope, rank)

        return ours

    def _freqfold(self, ids: Tensor) -> int:
        if self.options.freqfold != "auto":
            return int(self.options.freqfold)
        chosen = self.scratch / "freqfold"
        if not chosen.is_file():
            head_dim, rope_dim = self.stream.layouts[0].head_dim, self.planned["rope_dim"]
            candidates = targets.freqfold_candidates(head_dim, rope_dim)
            sample = ids[:SEARCH_WINDOWS]
            fold = transmla.choose_freqfold(self.stream, sample, rope_dim, candidates, self.report)
            chosen.write_text(str(fold))
        return int(chosen.read_text())

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
            layer = self.stream.layer(index)
            converted = ConvertedLayer.load(self.converted_file(index))
            layer.run(probe, converted_attention(layer, converted, self.stream.rope.scale))
            metadata = {"rank": str(converted.factors.rank)}
            save(self._emit(index, converted), self.layer_file(index), metadata)
            save({"probe": probe}, state_file, {"next_layer": str(index + 1)})
            del layer
            self.report("converting", index + 1, total)
        self.probe = probe[0]

    def converted_file(self, index: int) -> Path:
        """The layer as it is to be written: healed, or as fitted."""
        file = fitted_file if self.options.heal is None else healed_file
        return file(self.scratch, index)

    def _emit(self, index: int, converted: ConvertedLayer) -> dict[str, Tensor]:
        """The tensors of one layer under their full names, in the dtype of the output."""
        prefix = f"model.layers.{index}."
        own = {f"self_attn.{name}": weight for name, weight in converted.weights.items()}
        if self.options.target == "kvtool":
            replaced = {prefix + name: weight.to(self.dtype) for name, weight in own.items()}
            return replaced | factor_tensors(index, converted.factors, self.dtype)
        read = self.checkpoint.read_prefix(prefix) | own

        def double(name: str) -> Tensor | None:
            return read[name].double() if name in read else None

        source = deepseek_v3.SourceLayer(
            query=read["self_attn.q_proj.weight"].double(),
            key=read["self_attn.k_proj.weight"].double(),
            value=read["self_attn.v_proj.weight"].double(),
            query_bias=double("self_attn.q_proj.bias"),
            key_bias=double("self_attn.k_proj.bias"),
            value_bias=double("self_attn.v_proj.bias"),
            input_norm=read["input_layernorm.weight"].double(),
        )
        layout = self.stream.layouts[index]
        eps = targets.latent_eps(self.stream.config, self.options.target)
        rank = self.planned["rank"]
        tensors = deepseek_v3.stock_layer(source, layout, converted.factors, rank, eps)
        tensors |= {n: t for n, t in converted.weights.items() if n.startswith("o_proj.")}
        if layout.qkv_bias and not layout.output_bias:
            tensors["o_proj.bias"] = torch.zeros(layout.hidden_size)
        return {
            f"{prefix}self_attn.{name}": tensor.to(self.dtype).contiguous()
            for name, tensor in tensors.items()
        }

    def write_probe(self, folder: Path) -> None:
        """Leaves the probe and its logits in the output, for `verify`."""
        with safe_open(self.scratch / "probe_ids.safetensors", "pt") as stored:
            ids = stored.get_tensor("ids")
        positions = artifact.probe_positions(len(ids))
        logits = self.stream.logits(self.probe[positions])
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError("the final norm or the output head gives values not finite")
        artifact.write_probe(folder, ids, positions, logits)

    def config(self) -> dict[str, Any]:
        """`config.json` of the output."""
        if self.options.target == "kvtool":
            return factored_config(self.checkpoint.config)
        layout, planned = self.stream.layouts[0], self.planned
        last = ConvertedLayer.load(self.converted_file(len(self.stream) - 1)).factors
        nope_dim = last.key_up.shape[1]
        return deepseek_v3.stock_config(
            self.stream.config,
            layout,
            last.inv_freq,  # the same in every layer
            self.stream.rope,
            planned["rank"],
            nope_dim,
            self.options.target,
            planned["attention_dtype"],
        )


def _heal(
    checkpoint: Checkpoint,
    options: MlaOptions,
    teacher: Checkpoint | None,
    scratch: Path,
    device: str,
    report: Report,
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
        stream.rope.scale,
        heal.Amount.parse(options.heal),
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
    checkpoint: Checkpoint, options: MlaOptions, layers: list[Path]
) -> tuple[Mapping[str, Callable[[], Tensor]], Mapping[str, Any]]:
    """How to get each tensor of the output, and its shape and dtype."""
    tensors: dict[str, Callable[[], Tensor]] = {}
    infos: dict[str, Any] = {}

    def from_source(name: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.read(name)

    for name, info in checkpoint.tensors.items():
        if not is_replaced(name, options):
            tensors[name], infos[name] = from_source(name), info
    for file in layers:
        converted = read_header(file)
        for name, info in converted.items():
            tensors[name], infos[name] = artifact.reader(file, name), info
    if options.target == "vllm" and "lm_head.weight" not in tensors:
        # vLLM's class does not tie the output head to the embedding.
        tensors["lm_head.weight"] = from_source("model.embed_tokens.weight")
        infos["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"]
    return tensors, infos


def _read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stored:
        return dict(stored.metadata())

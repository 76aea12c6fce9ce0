"""GQA to MLA: plan, fit layer by layer, write, resume.

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
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtool import __version__, distill
from kvtool.attention import AttentionLayout, LatentFactors
from kvtool.calibrate import statistics
from kvtool.calibrate.statistics import Statistics, StatisticsOptions
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.checkpoint import (
    Checkpoint,
    Staging,
    check_disk,
    check_output,
    read_header,
    scratch_folder,
    torch_dtype,
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
from kvtool.corpus import calibration_text, can_chat, evaluation_text
from kvtool.errors import CalibrationError, UnsupportedModelError, UsageError
from kvtool.factored import factor_tensors, factored_config

Report = Callable[[str, int, int], None]
"""Told (stage, steps done, steps in all)."""

WINDOW = 2048
"""Tokens per calibration window (TransMLA's converter: 256): rotations matter at long distances."""
SEARCH_WINDOWS = 4
"""How many of them serve to choose FreqFold."""
PROBE = 2112
"""Tokens of the probe: beyond 2048, where some engines switch their RoPE."""


@dataclass(frozen=True)
class MlaOptions:
    """Everything that determines the output besides the model.

    Attributes:
        method: `exact`, `transmla` or `aware`.
        target: `transformers`, `vllm` or `kvtool`.
        kv_budget, rope_dim, rank: Widths, see :func:`targets.latent_size`.
        freqfold: F of TransMLA, or `auto`.
        data: Calibration text; `None` is Python's own documentation.
        tokens: Calibration tokens.
        heal: How long the original teaches the result, see :meth:`heal.Amount.parse`.
        teacher: Another model that teaches instead, with the same tokenizer.
        dtype: Of the attention tensors; `auto` keeps the source's.
    """

    method: str = "aware"
    target: str = "transformers"
    kv_budget: str | None = None
    rope_dim: int | None = None
    rank: int | None = None
    freqfold: str = "auto"
    data: str | None = None
    tokens: int = 16384
    heal: str | None = None
    teacher: str | None = None
    seed: int = 0
    dtype: str = "auto"
    shard_size: str = "2GB"


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


def plan(
    checkpoint: Checkpoint,
    options: MlaOptions,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """Checks everything that can be checked before work starts, and says what it will cost.

    Args:
        teacher: What `options.teacher` names, opened.
        output: Where it would be written; checked too if given.
        overwrite: Whether something may be there already.

    Raises:
        UnsupportedModelError: The target cannot express the model.
        UsageError: A width or budget is impossible, the text is too short, the output in the way.
        CheckpointError: Tensors are missing or have the wrong shape.
        ResourceError: The disk is too small.
    """
    for value, known, flag in (
        (options.method, targets.METHODS, "--method"),
        (options.target, targets.TARGETS, "--target"),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value} is unknown: choose {', '.join(known)}")
    if checkpoint.config.get("model_type") == "kvtool_mla":
        targets.refuse_latent()
    config = checkpoint.hf_config()
    targets.require(config, options.method, options.target)
    stream = LayerStream(checkpoint)
    layout, layers = stream.layouts[0], len(stream)
    width = layout.kv_heads * layout.head_dim
    if options.method == "exact":
        if any(x is not None for x in (options.kv_budget, options.rope_dim, options.rank)):
            raise UsageError(
                "--method exact keeps every byte: --kv-budget, --rope-dim and --rank have no place"
            )
        size = targets.Size(width, width, layout.cached_values)
    else:
        widths = (options.kv_budget, options.rope_dim, options.rank)
        size = targets.latent_size(config, options.method, options.target, *widths)
        if options.method == "transmla" and options.freqfold != "auto":
            if not options.freqfold.isdecimal():
                raise UsageError(f"--freqfold {options.freqfold} is neither 'auto' nor a number")
            targets.check_freqfold(int(options.freqfold), layout.head_dim, size.rope_dim)
        window = min(WINDOW, _context(config))
        if options.tokens < window:
            raise UsageError(f"--tokens {options.tokens} is less than one window of {window}")
    if options.method != "transmla" and options.freqfold != "auto":
        raise UsageError(f"--freqfold has no place in --method {options.method}")
    teacher = _opened(options, teacher)
    planned_healing = _check_healing(checkpoint, options, teacher)
    dtype = _save_dtype(checkpoint, options)
    nope = 0 if options.method == "exact" else layout.head_dim
    attention = layers * _attention_values(layout, size, nope, options)
    others = sum(t.nbytes for n, t in checkpoint.tensors.items() if not _is_replaced(n, options))
    untied = config.tie_word_embeddings and options.target == "vllm"
    head = checkpoint.tensors["model.embed_tokens.weight"].nbytes if untied else 0
    output_bytes = others + head + attention * dtype.itemsize
    probe = 4 * layout.hidden_size * min(PROBE, _context(config))
    measuring = 0
    if options.method != "exact":
        measuring = statistics.memory_bytes(stream, options.tokens)
    layer_bytes = max(
        sum(t.nbytes for n, t in checkpoint.tensors.items() if n.startswith(f"model.layers.{i}."))
        for i in range(layers)
    )
    shard = min(output_bytes, _shard_bytes(options.shard_size))
    # Layer files lie beside the shards until the end, the states of the probe until the shards
    # are written, and twice while they are replaced. Statistics have a place of their own.
    disk_bytes = attention * dtype.itemsize + probe + max(output_bytes, probe)
    fitted = layers * _fitted_bytes(layout, size, nope)
    disk_bytes += fitted
    if options.method == "aware":
        disk_bytes += 4 * 4 * options.tokens * layout.hidden_size  # two streams, old and new
    healing = 0
    if options.heal is not None:
        trained = layers * _attention_values(layout, size, nope, replace(options, target="kvtool"))
        disk_bytes += fitted + 2 * 3 * 4 * trained  # a state of values and moments, old and new
        weights = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        healing = _BASE_MEMORY + heal.memory_bytes(config, weights, trained)
        if teacher is not None:
            healing += sum(4 * math.prod(t.shape) for t in teacher.tensors.values())
    if output is not None:
        check_output(output, overwrite=overwrite, source=checkpoint.path)
        partial = scratch_folder(output).parent
        there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        check_disk(output, max(0, disk_bytes - there))
    _texts(checkpoint, options, _context(config))
    return {
        "method": options.method,
        "target": options.target,
        "layers": layers,
        "rope_dim": size.rope_dim,
        "rank": size.rank,
        "bytes_per_token_before": 2 * layers * size.native,
        "bytes_per_token_after": 2 * layers * (size.rank + size.rope_dim),
        "share": size.share,
        "output_bytes": output_bytes,
        "disk_bytes": disk_bytes,
        "memory_bytes": _BASE_MEMORY
        + max(measuring, 2 * probe + max(shard, 3 * layer_bytes, 2 * head)),
        "attention_dtype": str(dtype).removeprefix("torch."),
        "healing": planned_healing and {**planned_healing, "memory_bytes": healing},
    }


_BASE_MEMORY = 500_000_000
"""Python, torch and transformers themselves."""


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
    teacher = _opened(options, teacher)
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
    made_of = [__version__, torch.__version__, fingerprint, stamps, corpus.id]
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
        shard_size=_shard_bytes(options.shard_size),
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
        self.dtype = _save_dtype(self.checkpoint, options)
        self.freqfold: int | None = None

    def layer_file(self, index: int) -> Path:
        """Where the finished tensors of a layer wait for the shards."""
        return self.scratch / f"layer-{index:05d}.safetensors"

    def fit(self, resume: bool) -> None:
        """Fits every layer that is not there yet."""
        text, _ = _texts(self.checkpoint, self.options, _context(self.stream.config))
        measured = None if text is None else self._statistics(resume)
        fit = self._method(measured, text)
        refit = text if self.options.method == "aware" else None
        fitting.fit_layers(self.stream, fit, self.scratch, self.report, refit)

    def _statistics(self, resume: bool) -> Statistics:
        options = _statistics_options(self.options, _context(self.stream.config))
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
        _, probe_ids = _texts(self.checkpoint, self.options, _context(self.stream.config))
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
    if healed_file(scratch, total - 1).is_file():
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


def _texts(
    checkpoint: Checkpoint, options: MlaOptions, context: int
) -> tuple[Tensor | None, Tensor]:
    """Calibration windows `[N, T]`, unless the method needs none, and the probe `[T]`, held out."""
    tokenizer = checkpoint.tokenizer()
    ids = None
    if options.method != "exact":
        used = _statistics_options(options, context)
        assert used.window is not None
        count = used.tokens // used.window
        chat = used.chat if can_chat(tokenizer) else 0.0
        corpus = calibration_text(options.data)
        ids = corpus.windows(tokenizer, used.window, count, options.seed, chat)
    probe = evaluation_text(options.data).windows(tokenizer, min(PROBE, context), 1)[0]
    return ids, probe


def _statistics_options(options: MlaOptions, context: int) -> StatisticsOptions:
    """The text that a conversion reads."""
    return StatisticsOptions(
        data=options.data, tokens=options.tokens, window=min(WINDOW, context), seed=options.seed
    )


def _is_replaced(name: str, options: MlaOptions) -> bool:
    """Whether the output holds other tensors instead of this one of the source."""
    return any(f".self_attn.{part}." in name for part in replaced_parts(options))


def replaced_parts(options: MlaOptions) -> list[str]:
    """Parts of an attention module of which the output does not hold the source's tensors."""
    parts = list(artifact.REPLACED) if options.target != "kvtool" else []
    if options.heal is not None:
        parts = [*artifact.REPLACED, "o_proj"]
    elif options.method == "aware":
        parts.append("o_proj")
    return parts


def _all_tensors(
    checkpoint: Checkpoint, options: MlaOptions, layers: list[Path]
) -> tuple[Mapping[str, Callable[[], Tensor]], Mapping[str, Any]]:
    """How to get each tensor of the output, and its shape and dtype."""
    tensors: dict[str, Callable[[], Tensor]] = {}
    infos: dict[str, Any] = {}

    def from_source(name: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.read(name)

    for name, info in checkpoint.tensors.items():
        if not _is_replaced(name, options):
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


def _save_dtype(checkpoint: Checkpoint, options: MlaOptions) -> torch.dtype:
    """Dtype of the attention tensors written."""
    if options.dtype == "auto":
        own = torch_dtype(checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].dtype)
        if own == torch.float16 and options.target != "kvtool":
            raise UnsupportedModelError(targets.FLOAT16)
        return own
    if options.dtype == "float16" and options.target != "kvtool":
        raise UsageError(
            "--dtype float16 underflows in the scaling that makes the latent norm linear",
            hint="use bfloat16 or float32, or --target kvtool",
        )
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _opened(options: MlaOptions, teacher: Checkpoint | None) -> Checkpoint | None:
    """The teacher, by its name if the caller did not open it."""
    return teacher or (None if options.teacher is None else Checkpoint.open(options.teacher))


def _check_healing(
    checkpoint: Checkpoint, options: MlaOptions, teacher: Checkpoint | None
) -> dict[str, Any] | None:
    """What healing is planned."""
    if options.heal is None:
        if teacher is not None:
            raise UsageError("--teacher teaches while healing: give --heal, too")
        return None
    if options.method == "exact":
        raise UsageError("--method exact loses nothing that --heal could bring back")
    if teacher is not None:
        heal.check_teacher(teacher, checkpoint)
    amount = heal.Amount.parse(options.heal)
    length = heal.window(checkpoint, teacher)
    steps = None if amount.tokens is None else amount.steps(length, 1)
    return {**dataclasses.asdict(amount), "window": length, "steps": steps}


def _fitted_bytes(layout: AttentionLayout, size: targets.Size, nope: int) -> int:
    """Of the file that keeps a fitted layer until it is written: float64 factors, and weights."""
    width = layout.kv_heads * layout.head_dim
    factors = 2 * size.rope_dim * width + size.rank * (3 * width + (nope and width))
    return 8 * factors + 4 * layout.hidden_size * (2 * layout.heads * layout.head_dim + 2 * width)


def _attention_values(
    layout: AttentionLayout, size: targets.Size, nope: int, options: MlaOptions
) -> int:
    """Numbers in the attention tensors that one layer's conversion writes."""
    width, inner = layout.kv_heads * layout.head_dim, layout.heads * layout.head_dim
    replaced = replaced_parts(options)
    output = inner * layout.hidden_size + int(layout.output_bias) * layout.hidden_size
    output *= "o_proj" in replaced
    if options.target == "kvtool":
        ups = (nope and width) + width
        factors = 2 * size.rope_dim * width + size.rope_dim // 2 + size.rank * (2 * width + ups)
        rows = inner + 2 * width
        own = rows * (layout.hidden_size + int(layout.qkv_bias)) if "q_proj" in replaced else 0
        return factors + own + output
    heads, hidden, bias = layout.heads, layout.hidden_size, int(layout.qkv_bias)
    query_in, query_out = heads * layout.head_dim, heads * (nope + size.rope_dim)
    query = query_out * hidden
    if bias:
        query = query_in * (hidden + 2) + query_in * query_out
    down = (size.rank + size.rope_dim) * (hidden + bias) + size.rank
    zeros = hidden if bias and not layout.output_bias else 0  # the stock bias of o_proj
    return query + down + heads * (nope + layout.head_dim) * size.rank + output + zeros


def _context(config: Any) -> int:
    return int(config.max_position_embeddings)


def _shard_bytes(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}
    for unit in ("GIB", "MIB", "KIB", "GB", "MB", "KB"):
        if text.upper().endswith(unit):
            try:
                size = int(float(text[: -len(unit)]) * units[unit])
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
            break
    raise UsageError(f"--shard-size {text} is not a size such as 2GB or 500MB")

"""Prefill and decode speed of our runtime against transformers' own `generate`, in turn.

All sides run the same greedy generation of the same prompt in the same process, repeat by repeat,
and every token is stamped when it arrives: the first stamp is the prefill, the differences between
the others are the decode steps. How fast a step can get is told by the memory floor: the bytes of
weights and cache that it must read, over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from kvtool import __version__
from kvtool._transformers import quiet_transformers
from kvtool.checkpoint import Checkpoint
from kvtool.errors import UsageError
from kvtool.evaluate.protocol import CacheSize, cache_size
from kvtool.layout import experts_of
from kvtool.progress import Progress, silent
from kvtool.progress import peak_memory as peak_of_process
from kvtool.runtime.layers import LatentRuntimeAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtool.runtime import Engine

BANDWIDTH_BYTES = 512 * 2**20  # larger than any last-level cache
BANDWIDTH_REPEATS = 5
WARMUP_CONTEXT = 32
CONTEXTS = (512, 4096, 8000)

# Decode steps have the first three inside the absorbed matrices, and the last as a shared table.
NOT_READ_BY_DECODE = {"key_up", "value_up", "rope_query", "inv_freq"}

Generation = Callable[[Callable[[], None]], None]
"""Runs one greedy generation and calls back at every token it produces."""


@dataclass(frozen=True)
class Timing:
    """One side of the comparison at one context length.

    Attributes:
        prefill_seconds: Time to first token; median over repeats.
        step_seconds: One decode step of the whole batch; median over all steps of all repeats.
    """

    prefill_seconds: float
    prefill_tokens_per_second: float
    step_seconds: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Speed:
    """Our runtime and transformers at one context length.

    Attributes:
        ours: The model under test in our runtime.
        transformers: The original in transformers' `generate`.
        dense: The original in our runtime, where that was asked for.
        decode_ratio: Decode tokens/s of ours over transformers'.
        cache_bytes: Of the cache, what a step has to read.
        floor_seconds: Weights and these bytes read once, at the measured bandwidth.
        share_of_floor: floor_seconds / step_seconds of ours; 1 is as fast as memory allows.
    """

    context: int
    batch: int
    new_tokens: int
    repeats: int
    ours: Timing
    transformers: Timing
    dense: Timing | None
    prefill_ratio: float
    decode_ratio: float
    weight_bytes: int
    cache_bytes: float
    floor_seconds: float
    share_of_floor: float


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that the device reads, in a matrix-vector product and in a sum."""

    matrix_vector: float
    sum: float

    @property
    def best(self) -> float:
        return max(self.matrix_vector, self.sum)


def measure_bandwidth(device: torch.device, nbytes: int = BANDWIDTH_BYTES) -> Bandwidth:
    """Best of a few reads of a matrix too large for any cache."""
    matrix = torch.ones(nbytes // 4 // 8192, 8192, device=device)
    vector = torch.ones(8192, device=device)

    def best(read: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(BANDWIDTH_REPEATS):
            _synchronize(device)
            start = perf_counter()
            read()
            _synchronize(device)
            seconds.append(perf_counter() - start)
        return matrix.nbytes / min(seconds)

    return Bandwidth(best(lambda: torch.mv(matrix, vector)), best(matrix.sum))


def weight_bytes(engine: Engine) -> int:
    """Bytes of weights that one decode step reads at least.

    The embedding table is read one row at a time, unless it is also the output head, and of the
    experts of a layer as many as one token takes.
    """
    model = engine.model
    embedding = model.get_input_embeddings().weight
    read = sum(weight.nbytes for weight in model.parameters())  # a tied table is listed once
    if model.lm_head.weight is not embedding:
        read -= embedding.nbytes
    names = ("num_experts_per_tok", "top_k_experts")  # the second is Gemma 4's
    taken = next((n for name in names if (n := getattr(engine.config, name, None))), 0)
    for experts in experts_of(model):
        whole = sum(weight.nbytes for weight in experts.parameters())
        read -= whole - whole * taken // experts.num_experts
    for attention in engine.attentions:
        if isinstance(attention, LatentRuntimeAttention):
            read += attention.absorb_query.nbytes + attention.absorb_value.nbytes
            buffers = attention.stages.named_buffers()
            read += sum(part.nbytes for name, part in buffers if name not in NOT_READ_BY_DECODE)
    return int(read)


def fit_contexts(
    contexts: Sequence[int] | None, new_tokens: int, max_context: int
) -> tuple[list[int], str | None]:
    """Check requested lengths against a model's context; without a request, keep what fits.

    Returns:
        The lengths, and a sentence for the report if a default was dropped.
    """
    room = max_context - new_tokens
    if contexts is not None:
        for context in contexts:
            if context < 1:
                raise UsageError(f"a context must be at least one token, got {context}")
            if context > room:
                raise UsageError(
                    f"a context of {context} tokens and {new_tokens} new ones need "
                    f"{context + new_tokens} positions, but the model's context is {max_context}"
                )
        return list(contexts), None
    if room < 1:
        raise UsageError(f"{new_tokens} new tokens do not fit the model's context of {max_context}")
    kept = [context for context in CONTEXTS if context <= room] or [room]
    if kept == list(CONTEXTS):
        return kept, None
    return (
        kept,
        f"measured at {', '.join(map(str, kept))} tokens: the model's context is {max_context}",
    )


def load_rival(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The original as transformers runs it, with none of the checkpoint's sampling settings."""
    from transformers import GenerationConfig

    model = checkpoint.load_transformers(dtype, device)
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True)
    return model


def engine_generation(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Generation:
    """Greedy generation in our runtime."""

    def run(on_token: Callable[[], None]) -> None:
        for _ in engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True):
            on_token()

    return run


def transformers_generation(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int
) -> Generation:
    """Greedy generation with transformers' own cache and loop."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    ids = torch.tensor(prompts, device=model.device)

    class Stamp(StoppingCriteria):
        """Stops nothing: it is the hook that `generate` calls after every token."""

        def __init__(self, on_token: Callable[[], None]) -> None:
            self.on_token = on_token

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.on_token()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(on_token: Callable[[], None]) -> None:
        with torch.inference_mode(), quiet_transformers():
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([Stamp(on_token)]),
            )

    return run


def in_turn(
    generations: Sequence[Generation],
    repeats: int,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> list[list[list[float]]]:
    """Run every generation once per repeat, one after the other, so that drift hits all alike.

    Returns:
        For each generation and repeat, the seconds from its start to each of its tokens.
    """
    runs: list[list[list[float]]] = [[] for _ in generations]
    for _ in range(repeats):
        for collected, generation in zip(runs, generations, strict=True):
            collected.append(_stamps(generation, device))
            advance()
    return runs


def timing(runs: Sequence[Sequence[float]], context: int, batch: int) -> Timing:
    """Medians of `runs`: per repeat the seconds from start to each token."""
    prefill = median(stamps[0] for stamps in runs)
    step = median(after - before for stamps in runs for before, after in pairwise(stamps))
    return Timing(prefill, batch * context / prefill, step, batch / step)


def compare_speed(
    engine: Engine,
    rival: PreTrainedModel,
    *,
    contexts: Sequence[int],
    new_tokens: int,
    batch: int,
    repeats: int,
    bandwidth: Bandwidth,
    dense: Engine | None = None,
    report: Progress = silent,
) -> Iterator[Speed]:
    """Time all sides at every context length.

    Args:
        engine: The model under test in our runtime.
        rival: The original in transformers, from `load_rival`.
        dense: The original in our runtime; measured in the same turns where given.
    """
    sides = 2 if dense is None else 3
    total = repeats * sides
    store = cache_size(engine)
    weights = weight_bytes(engine)
    vocabulary = min(engine.vocab_size, rival.config.get_text_config().vocab_size)

    def generations(prompts: list[list[int]], count: int) -> list[Generation]:
        ours = engine_generation(engine, prompts, count)
        theirs = transformers_generation(rival, prompts, count)
        extra = [] if dense is None else [engine_generation(dense, prompts, count)]
        return [ours, theirs, *extra]

    in_turn(generations(_prompts(vocabulary, 1, WARMUP_CONTEXT), 2), 1, engine.device)
    for context in contexts:
        stage, done = f"context {context}", 0
        report(stage, done, total)

        def advance(stage: str = stage) -> None:
            nonlocal done
            done += 1
            report(stage, done, total)

        sides_at = generations(_prompts(vocabulary, batch, context), new_tokens)
        runs = in_turn(sides_at, repeats, engine.device, advance)
        timings = [timing(side, context, batch) for side in runs]
        ours, theirs = timings[:2]
        cache_bytes = batch * _cache_bytes(engine, store, context + new_tokens / 2)
        floor = (weights + cache_bytes) / bandwidth.best
        yield Speed(
            context=context,
            batch=batch,
            new_tokens=new_tokens,
            repeats=repeats,
            ours=ours,
            transformers=theirs,
            dense=timings[2] if dense is not None else None,
            prefill_ratio=theirs.prefill_seconds / ours.prefill_seconds,
            decode_ratio=theirs.step_seconds / ours.step_seconds,
            weight_bytes=weights,
            cache_bytes=cache_bytes,
            floor_seconds=floor,
            share_of_floor=floor / ours.step_seconds,
        )


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes so far: of the whole process, and of the device where it has its own memory."""
    peak = {"process_bytes": peak_of_process()}
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that a measured number depends on besides the model."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "kvtool": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    }


def _stamps(generation: Generation, device: torch.device) -> list[float]:
    times: list[float] = []
    _synchronize(device)
    start = perf_counter()

    def on_token() -> None:
        _synchronize(device)
        times.append(perf_counter() - start)

    generation(on_token)
    return times


def _prompts(vocabulary: int, batch: int, context: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        vocabulary, (batch, context), generator=generator
    ).tolist()
    return prompts


def _cache_bytes(engine: Engine, store: CacheSize, tokens: float) -> float:
    if engine.plan is not None:  # what token budgets keep is not in proportion to the length
        return engine.plan.read_bytes(round(tokens), engine.dtype.itemsize)
    item, windows = engine.dtype.itemsize, [x.window for x in engine.attentions if x.window]
    empty: int = sum(
        x.cache_bytes(x.window, item) - x.cache_bytes(round(tokens), item) for x in windows
    )
    return store.constant_bytes + store.bytes_per_token * tokens - empty


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""Runs the whole protocol on one model, beside its original in the same process."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from time import perf_counter

import torch

from kvtool.checkpoint import MANIFEST, Checkpoint
from kvtool.corpus import Corpus
from kvtool.errors import CheckpointError, UnsupportedModelError, UsageError
from kvtool.evaluate import layers, protocol, retrieval, throughput
from kvtool.evaluate.chat import PROMPTS, Chat, Sample, converse
from kvtool.evaluate.layers import Damage, LayerResult
from kvtool.evaluate.protocol import Divergence, cache_size, layer_sizes
from kvtool.evaluate.report import Report, plan_facts
from kvtool.evaluate.retrieval import Result
from kvtool.evaluate.throughput import Bandwidth, Speed
from kvtool.plan import Plan
from kvtool.progress import Progress, silent, telling
from kvtool.runtime import Engine


@dataclass(frozen=True)
class Settings:
    """How much is measured; the defaults are the published protocol.

    Attributes:
        prefill, continuation: None is the protocol's, or less where the model's context is short.
        layers: Measure what each layer alone breaks.
        layer_prefill, layer_continuation: Of its text; never more than of the other windows. A plan
            that drops nothing of so short a prompt gets a longer one.
        chat: Ask `chat_prompts` questions, each answered in at most `chat_new_tokens`.
    """

    windows: int = 8
    prefill: int | None = None
    continuation: int | None = None
    passkey_lengths: tuple[int, ...] = retrieval.LENGTHS
    passkey_depths: tuple[float, ...] = retrieval.DEPTHS
    needle_lengths: tuple[int, ...] = retrieval.NEEDLE_LENGTHS
    needle_contexts: int = retrieval.NEEDLE_CONTEXTS
    layers: bool = True
    layer_prefill: int = 384
    layer_continuation: int = 128
    chat: bool = True
    chat_prompts: int = len(PROMPTS)
    chat_new_tokens: int = 160
    speed: bool = True
    speed_context: int = 1024
    speed_new_tokens: int = 32
    speed_repeats: int = 2
    seed: int = 0

    @classmethod
    def quick(cls) -> Settings:
        """The same protocol on less text: for a demonstration, not for a claim."""
        return cls(
            windows=4,
            passkey_lengths=(1024, 2048),
            passkey_depths=(0.1, 0.5, 0.9),
            needle_lengths=retrieval.NEEDLE_LENGTHS[:1],
            needle_contexts=1,
            layer_prefill=256,
            layer_continuation=64,
            chat_prompts=8,
            chat_new_tokens=96,
            speed_repeats=1,
        )


def manifest_base(checkpoint: Checkpoint) -> str | None:
    """The original that a conversion's manifest names, None where there is no manifest."""
    manifest = checkpoint.manifest
    try:
        return None if manifest is None else str(manifest["base"]["source"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path / MANIFEST}: not a manifest that names its base: {error!r}"
        ) from error


def conversion_cost(checkpoint: Checkpoint) -> dict[str, float] | None:
    """Seconds and peak memory of the conversion, as its manifest tells; None where none does."""
    manifest = checkpoint.manifest or {}
    known = {name: manifest.get(name) for name in ("seconds", "peak_memory_bytes")}
    return {name: n for name, n in known.items() if isinstance(n, int | float)} or None


def evaluate(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    corpus: Corpus,
    *,
    plan: Plan | None = None,
    settings: Settings = Settings(),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    report: Progress = silent,
) -> Report:
    """Measure bytes, divergence, retrieval and speed of `checkpoint` beside `base`.

    Args:
        plan: What the cache of `checkpoint` keeps; that of `base` keeps everything.

    Raises:
        UsageError: The two models do not share a vocabulary, or what was asked for does not fit
            their context.
    """
    start = perf_counter()
    notes: list[str] = []
    # Before the models are there, so that its buffer does not add to their peak memory.
    bandwidth = throughput.measure_bandwidth(torch.device(device)) if settings.speed else None
    engine = Engine.load(checkpoint, dtype=dtype, device=device, plan=plan)
    original = None if base is None else Engine.load(base, dtype=dtype, device=device)
    if original is not None:
        _check_vocabulary(engine, original)
    max_context = min(e.max_context for e in (engine, original) if e is not None)

    prefill, continuation, note = protocol.fit_window(
        settings.prefill, settings.continuation, max_context
    )
    if note is not None:
        notes.append(note)
    settings = replace(
        settings,
        prefill=prefill,
        continuation=continuation,
        layer_prefill=layers.prompt_length(plan, settings.layer_prefill, prefill),
        layer_continuation=min(settings.layer_continuation, continuation),
    )
    divergence = _divergence(engine, original, corpus, settings, prefill, continuation, report)
    damage = _layers(engine, original, corpus, settings, notes, report)
    results = _retrieval(engine, original, corpus, settings, max_context, notes, report)
    conversation, samples = _chat(engine, original, corpus, settings, max_context, notes, report)
    speed = (
        _speed(engine, original, settings, bandwidth, max_context, notes, report)
        if bandwidth is not None
        else None
    )
    return Report(
        source=checkpoint.source,
        base=None if base is None else base.source,
        settings={**asdict(settings), "corpus": corpus.id},
        environment=throughput.environment(engine.device, dtype),
        plan=None if plan is None else plan_facts(plan),
        conversion=conversion_cost(checkpoint),
        cache=cache_size(engine),
        base_cache=None if original is None else cache_size(original),
        divergence=divergence,
        retrieval=retrieval.summarise(results),
        speed=speed,
        bandwidth=bandwidth,
        peak_memory=throughput.peak_memory(engine.device),
        seconds=perf_counter() - start,
        notes=notes,
        passkey=retrieval.passkeys(results),
        layers=damage,
        samples=samples,
        chat=conversation,
    )


def _check_vocabulary(engine: Engine, base: Engine) -> None:
    sources = f"{engine.checkpoint.source} and {base.checkpoint.source}"
    if engine.vocab_size != base.vocab_size:
        raise UsageError(
            f"{sources} have {engine.vocab_size} and {base.vocab_size} output tokens, "
            "so their predictions cannot be compared"
        )
    if engine.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise UsageError(
            f"{sources} have different tokenizers, so their predictions cannot be compared"
        )


def _divergence(
    engine: Engine,
    base: Engine | None,
    corpus: Corpus,
    settings: Settings,
    prefill: int,
    continuation: int,
    report: Progress,
) -> Divergence:
    # One more than is fed: the last token is only the target of the one before.
    length = prefill + continuation + 1
    windows = corpus.windows(engine.tokenizer, length, settings.windows, settings.seed)
    judged = protocol.score_windows(engine, base, windows, prefill)
    scores = list(telling(report, "continuation", judged, len(windows)))
    found = protocol.summarise(scores, prefill, continuation)
    ours, theirs = (
        None if one is None else protocol.bf16_bytes(one, prefill, prefill + continuation)
        for one in (engine, base)
    )
    return replace(found, bf16_bytes=ours, base_bf16_bytes=theirs)


def _layers(
    engine: Engine,
    base: Engine | None,
    corpus: Corpus,
    settings: Settings,
    notes: list[str],
    report: Progress,
) -> list[LayerResult]:
    sizes = layer_sizes(engine)
    if base is None:
        return layers.layer_results(sizes, None, None)
    if not layers.comparable(engine, base):
        notes.append("layers not compared: the original has other ones")
        return layers.layer_results(sizes, None, None)
    damage: list[Damage] | None = None
    if settings.layers and not layers.separable(engine):
        notes.append("damage by layer not measured: layers share codes")
    elif settings.layers:
        length = settings.layer_prefill + settings.layer_continuation
        (window,) = corpus.windows(engine.tokenizer, length, 1, settings.seed)
        found = layers.layer_damage(engine, base, window, settings.layer_prefill)
        damage = list(telling(report, "layers", found, len(sizes)))
    return layers.layer_results(sizes, layer_sizes(base), damage)


def _retrieval(
    engine: Engine,
    base: Engine | None,
    corpus: Corpus,
    settings: Settings,
    max_context: int,
    notes: list[str],
    report: Progress,
) -> list[Result]:
    lengths, note = retrieval.fit_lengths("pass-key", settings.passkey_lengths, max_context)
    if note is not None:
        notes.append(note)
    cases = retrieval.passkey_cases(
        engine.tokenizer,
        corpus.documents,
        lengths,
        settings.passkey_depths,
        seed=settings.seed,
    )
    if not cases:
        notes.append(f"no pass-key fits in {' or '.join(map(str, lengths))} tokens")
    question = retrieval.needle_question_tokens(engine.tokenizer)
    lengths, note = retrieval.fit_lengths(
        "4-key needle", settings.needle_lengths, max_context, question
    )
    if note is not None:
        notes.append(note)
    needles = retrieval.needle_cases(
        engine.tokenizer,
        corpus.documents,
        lengths,
        contexts=settings.needle_contexts,
        seed=settings.seed,
    )
    if not needles:
        notes.append(f"no 4-key needle fits in {' or '.join(map(str, lengths))} tokens")
    cases += needles
    results = retrieval.run_cases(engine, base, cases)
    return list(telling(report, "retrieval", results, len(cases)))


def _chat(
    engine: Engine,
    base: Engine | None,
    corpus: Corpus,
    settings: Settings,
    max_context: int,
    notes: list[str],
    report: Progress,
) -> tuple[Chat | None, list[Sample]]:
    if not settings.chat:
        return None, []
    conversation, samples = converse(
        engine,
        base,
        corpus.documents,
        prompts=settings.chat_prompts,
        max_new_tokens=settings.chat_new_tokens,
        max_context=max_context,
        report=report,
    )
    if not samples:
        notes.append(f"nothing was asked in chat: the model's context is {max_context}")
    elif conversation is None:
        notes.append("nothing was asked in chat: there is no chat template that takes a question")
    return conversation, samples


def _speed(
    engine: Engine,
    base: Engine | None,
    settings: Settings,
    bandwidth: Bandwidth,
    max_context: int,
    notes: list[str],
    report: Progress,
) -> Speed | None:
    room = max_context - settings.speed_new_tokens
    if room < 1:
        notes.append(f"speed not measured: the model's context is {max_context}")
        return None
    context = min(settings.speed_context, room)
    stock = (base or engine).checkpoint
    try:
        rival = throughput.load_rival(stock, engine.dtype, str(engine.device))
    except UnsupportedModelError as error:
        notes.append(f"speed not measured: transformers cannot run the original: {error}")
        return None
    (speed,) = throughput.compare_speed(
        engine,
        rival,
        contexts=[context],
        new_tokens=settings.speed_new_tokens,
        batch=1,
        repeats=settings.speed_repeats,
        bandwidth=bandwidth,
        dense=base,
        report=report,
    )
    return speed

"""What a compressed cache costs and what it keeps: bytes per token, continuation KL, perplexity.

A plain forward pass never reads a stored key, so it says nothing about a cache. Here the first P
tokens of a window are prefilled, and the next C true tokens are fed through the cache that the
prefill left; only the predictions of the second part are judged. How the loss runs over the window
is told by buckets of positions, for which every few predictions of the first part are judged too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from statistics import fmean, stdev
from typing import Literal

import torch

from kvtool.divergence import kl_divergence
from kvtool.errors import UsageError
from kvtool.layer_plan import LayerPlan
from kvtool.runtime import Engine
from kvtool.runtime.stores import whole_pages
from kvtool.sharing import SharedPlan
from kvtool.sizes import BF16
from kvtool.states import StatePlan

PREFILL, CONTINUATION = 1536, 256
SLICE = 32  # positions compared at once: float64 logits of a large vocabulary are heavy
BUCKET = 128  # positions whose mean is reported
PROMPT_STRIDE = 4  # one prediction of a prompt in so many is judged: logits of all are gigabytes


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error (None where one window gives no spread)."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """Mean of per-window means; windows are the independent samples, positions are not.

        NaN and infinity are what a damaged model gives; they have no spread.
        """
        if not all(map(math.isfinite, samples)):
            return cls(fmean(samples), math.nan if len(samples) > 1 else None)
        error = stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else None
        return cls(fmean(samples), error)

    def exp(self) -> Estimate:
        """exp of the estimate, with its error carried over to first order."""
        value = math.inf if self.value >= 700 else math.exp(self.value)
        error = None if self.standard_error is None else value * self.standard_error
        return Estimate(value, error)


@dataclass(frozen=True)
class CacheSize:
    """What the store of one sequence takes, measured from what was allocated.

    Attributes:
        bytes_per_token: Bytes that every further token costs, at the dtype of the run.
        bytes_per_token_bf16: The same elements at two bytes each.
        constant_bytes: Bytes of one sequence that do not grow with its length.
    """

    bytes_per_token: float
    bytes_per_token_bf16: float
    constant_bytes: float


@dataclass(frozen=True)
class Bucket:
    """Means over the predictions made after the tokens at `start` up to, not including, `end`.

    Attributes:
        judged: `prompt` while it was read, or `cache` for what was fed through the cache it left.
        nll, base_nll: -log p of the token that came, in nats, under the model and the original.
        kl: KL(original || compressed) in nats.
    """

    start: int
    end: int
    judged: Literal["prompt", "cache"]
    nll: float
    base_nll: float | None
    kl: float | None


@dataclass(frozen=True)
class Divergence:
    """The second part of each window, predicted from the cache that the first part left.

    Attributes:
        perplexity: Of the model under test.
        base_perplexity: Of the original, on the same tokens; None where there is no original.
        kl: Mean KL(original || compressed) per position in nats.
        perplexity_ratio: Paired: exp of the mean difference of log-likelihoods per window.
        cache_bytes: Of one sequence when all of it is fed, as allocated; the prompt has been
            compressed by then. base_cache_bytes: the same of the original.
        bf16_bytes, base_bf16_bytes: The same with bfloat16 in the place of the dtype of the run.
        top1_agreement: Share of positions where both models' most likely token is the same.
        positions: The whole window in buckets; means over windows.
    """

    windows: int
    prefill: int
    continuation: int
    cache_bytes: int
    perplexity: Estimate
    base_cache_bytes: int | None = None
    bf16_bytes: int | None = None
    base_bf16_bytes: int | None = None
    base_perplexity: Estimate | None = None
    kl: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    top1_agreement: Estimate | None = None
    positions: list[Bucket] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """Sums or means over some positions; what compares with an original is None without one."""

    positions: int
    nll: float
    base_nll: float | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class WindowScores:
    """Means over the C judged positions of one window, the bytes its cache took, its buckets."""

    nll: float
    cache_bytes: int
    base_cache_bytes: int | None = None
    base_nll: float | None = None
    kl: float | None = None
    top1: float | None = None
    buckets: tuple[Bucket, ...] = ()


def cache_size(engine: Engine) -> CacheSize:
    """What all layers take together."""
    layers = layer_sizes(engine)
    return CacheSize(
        bytes_per_token=sum(layer.bytes_per_token for layer in layers),
        bytes_per_token_bf16=sum(layer.bytes_per_token_bf16 for layer in layers),
        constant_bytes=sum(layer.constant_bytes for layer in layers),
    )


def layer_sizes(engine: Engine) -> list[CacheSize]:
    """Measure each layer's store: two allocations tell what grows with the length."""
    plan, item = engine.plan, engine.dtype.itemsize
    if plan is not None and plan.policy is not None:
        # An empty cache does not show what a token budget will keep of a prompt.
        return [_planned_size(layer, plan.base.head_dim, engine) for layer in plan.layers]
    # Behind its window, a layer grows no more.
    windows = (x.window.window for x in engine.attentions if x.window is not None)
    small = whole_pages(max(1024, *windows, 0))
    large = 2 * small
    sizes = []
    for before, after in zip(_store_bytes(engine, small), _store_bytes(engine, large), strict=True):
        slope = (after - before) / (large - small)
        constant = max(after - slope * large, 0.0)
        sizes.append(CacheSize(slope, slope / item * BF16, constant))
    if plan is not None:
        # Integers of few bits take the same in any dtype; rings do not grow.
        packed = [
            layer.packed or (layer.kept is not None and not isinstance(layer.kept, SharedPlan))
            for layer in plan.layers
        ]
        for code, own in zip(plan.codes, plan.coded_layers, strict=True):
            for layer in own:
                packed[layer] = code.bits is not None
        sizes = [
            replace(size, bytes_per_token_bf16=size.bytes_per_token) if own else size
            for size, own in zip(sizes, packed, strict=True)
        ]
    return sizes


def bf16_bytes(engine: Engine, prompt: int, tokens: int) -> int:
    """Bytes of one sequence of so many tokens, the first of them its prompt, with bfloat16 in the
    place of the dtype of the run: integers, scales and states take what they take.
    """
    if (plan := engine.plan) is not None:
        size = plan.cache_bytes(tokens, BF16)
        for budget in (n for layer in plan.layers for n in layer.budgets if n is not None):
            kept = min(budget, prompt) + tokens - prompt  # what comes later stays
            more = kept - min(budget, tokens)
            size += 2 * BF16 * plan.base.head_dim * more
        return size
    size = 0
    for attention, layer in zip(engine.attentions, layer_sizes(engine), strict=True):
        if attention.window is not None:
            size += attention.window.cache_bytes(tokens, BF16)
        elif layer.bytes_per_token:
            size += round(layer.bytes_per_token_bf16 * tokens)
        elif layer.constant_bytes:
            shape = attention.stages.shape
            size += StatePlan.of(shape).cache_bytes(tokens, BF16)
    return size


def _store_bytes(engine: Engine, capacity: int) -> list[int]:
    return engine.new_cache(1, capacity).layer_bytes


def _planned_size(layer: LayerPlan, head_dim: int, engine: Engine) -> CacheSize:
    """What a layer with token budgets takes behind a prompt as long as the model's context."""
    context, item = engine.max_context, engine.dtype.itemsize
    step = 1 if layer.bits is None else layer.bits.group
    kept, before = (layer.cache_bytes(n, head_dim, item) for n in (context, context - step))
    constant = kept - (kept - before) // step * context
    ours, bf16 = (float(layer.token_bytes(head_dim, size)) for size in (item, BF16))
    return CacheSize(ours, bf16, constant)


def fit_window(
    prefill: int | None, continuation: int | None, max_context: int
) -> tuple[int, int, str | None]:
    """P and C, each as asked for or else the default, which alone shrinks to a model's context.

    Returns:
        P, C, and a sentence for the report if a default had to shrink.

    Raises:
        UsageError: What was asked for does not fit.
    """
    if any(part is not None and part < 1 for part in (prefill, continuation)):
        raise UsageError(
            f"the evaluation needs at least one token on each side, "
            f"got a prefill of {prefill} and a continuation of {continuation}"
        )
    asked = (prefill or 1) + (continuation or 1)
    if asked > max_context:
        raise UsageError(
            f"a prefill of {prefill or 'at least 1'} and a continuation of "
            f"{continuation or 'at least 1'} tokens need {asked} positions, "
            f"but the model's context is {max_context}"
        )
    p, c = prefill or PREFILL, continuation or CONTINUATION
    if p + c <= max_context:
        return p, c, None
    if prefill is not None:
        short = max_context - prefill
    elif continuation is not None:
        short = continuation
    else:
        short = max(1, c * max_context // (p + c))
    note = (
        f"window shrunk from {p}+{c} to {max_context - short}+{short} tokens: "
        f"the model's context is {max_context}"
    )
    return max_context - short, short, note


def judge(
    logits: torch.Tensor, base_logits: torch.Tensor | None, targets: torch.Tensor
) -> list[Scores]:
    """Compare two models' logits [C, V] with the tokens [C] that came, in float64.

    Returns:
        Sums over each `SLICE` positions.
    """
    slices = []
    for start in range(0, len(targets), SLICE):
        part = slice(start, start + SLICE)
        index = targets[part, None]
        q = torch.log_softmax(logits[part].double(), dim=-1)
        scores = Scores(len(index), -q.gather(1, index).sum().item())
        if base_logits is not None:
            p = torch.log_softmax(base_logits[part].double(), dim=-1)
            scores = replace(
                scores,
                base_nll=-p.gather(1, index).sum().item(),
                kl=kl_divergence(p, q).sum().item(),
                top1=(p.argmax(-1) == q.argmax(-1)).sum().item(),
            )
        slices.append(scores)
    return slices


def mean(parts: Sequence[Scores]) -> Scores:
    """Means over all positions of several sums."""
    positions = sum(part.positions for part in parts)

    def over(sums: Sequence[float | None]) -> float | None:
        # Added one by one: from Python 3.12 on, sum() rounds otherwise.
        known = [value for value in sums if value is not None]
        return reduce(operator.add, known) / positions if known else None

    return Scores(
        positions,
        reduce(operator.add, [part.nll for part in parts]) / positions,
        over([part.base_nll for part in parts]),
        over([part.kl for part in parts]),
        over([part.top1 for part in parts]),
    )


def score_windows(
    engine: Engine, base: Engine | None, windows: torch.Tensor, prefill: int
) -> Iterator[WindowScores]:
    """Score windows [N, P + C + 1] one by one; the last token of each is only a target."""
    for window in windows:
        yield _score_window(engine, base, window, prefill)


def _score_window(
    engine: Engine, base: Engine | None, window: torch.Tensor, prefill: int
) -> WindowScores:
    length = len(window) - 1
    engines = [engine] if base is None else [engine, base]
    caches = [one.new_cache(1, length) for one in engines]

    def feed(start: int, end: int, every: int) -> list[Scores]:
        """Judges one prediction in `every` after the tokens from `start` to `end`."""
        ours, *theirs = [
            one.extend(cache, window[start:end], all_logits=True, every=every).cpu()
            for one, cache in zip(engines, caches, strict=True)
        ]
        targets = window[start + 1 : end + 1 : every]
        return judge(ours, theirs[0] if theirs else None, targets)

    read = feed(0, prefill, PROMPT_STRIDE)
    fed = feed(prefill, length, 1)
    scores = mean(fed)
    return WindowScores(
        scores.nll,
        caches[0].allocated_bytes,
        None if base is None else caches[1].allocated_bytes,
        scores.base_nll,
        scores.kl,
        scores.top1,
        (
            *_buckets(read, 0, prefill, "prompt", PROMPT_STRIDE),
            *_buckets(fed, prefill, length, "cache", 1),
        ),
    )


def _buckets(
    slices: Sequence[Scores], start: int, end: int, judged: Literal["prompt", "cache"], every: int
) -> Iterator[Bucket]:
    """Means over each `BUCKET` positions from `start` to `end`, one in `every` of them judged."""
    count = BUCKET // (every * SLICE)
    for first in range(0, len(slices), count):
        scores = mean(slices[first : first + count])
        at = start + first * every * SLICE
        yield Bucket(at, min(at + BUCKET, end), judged, scores.nll, scores.base_nll, scores.kl)


def _mean_buckets(windows: Sequence[tuple[Bucket, ...]]) -> list[Bucket]:
    """Bucket by bucket the means over windows."""

    def over(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return [
        replace(
            group[0],
            nll=fmean([bucket.nll for bucket in group]),
            base_nll=over([bucket.base_nll for bucket in group]),
            kl=over([bucket.kl for bucket in group]),
        )
        for group in zip(*windows, strict=True)
    ]


def summarise(scores: Sequence[WindowScores], prefill: int, continuation: int) -> Divergence:
    """Means and standard errors over windows; the ratio's error is of the paired differences."""
    perplexity = Estimate.of([score.nll for score in scores]).exp()
    size = max(score.cache_bytes for score in scores)
    positions = _mean_buckets([score.buckets for score in scores])
    paired = [
        (score.nll, score.base_nll, score.kl, score.top1)
        for score in scores
        if score.base_nll is not None and score.kl is not None and score.top1 is not None
    ]
    if not paired:
        return Divergence(len(scores), prefill, continuation, size, perplexity, positions=positions)
    return Divergence(
        windows=len(scores),
        prefill=prefill,
        continuation=continuation,
        cache_bytes=size,
        base_cache_bytes=max(score.base_cache_bytes or 0 for score in scores),
        perplexity=perplexity,
        base_perplexity=Estimate.of([base for _, base, _, _ in paired]).exp(),
        kl=Estimate.of([kl for _, _, kl, _ in paired]),
        perplexity_ratio=Estimate.of([nll - base for nll, base, _, _ in paired]).exp(),
        top1_agreement=Estimate.of([top1 for _, _, _, top1 in paired]),
        positions=positions,
    )

"""What a compressed cache costs and what it keeps: bytes per token, continuation KL, perplexity.

A plain forward pass never reads a stored key, so it says nothing about a cache. Here the first P
tokens of a window are prefilled, and the next C true tokens are fed through the cache that the
prefill left; only the predictions of the second part are judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch

from kvtool.errors import UsageError

if TYPE_CHECKING:
    from kvtool.runtime import Engine

PREFILL, CONTINUATION = 1536, 256
SLICE = 32  # positions compared at once: float64 logits of a large vocabulary are heavy
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error (None where one window gives no spread)."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """Mean of per-window means; windows are the independent samples, positions are not."""
        error = stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else None
        return cls(fmean(samples), error)

    def exp(self) -> Estimate:
        """exp of the estimate, with its error carried over to first order."""
        value = math.exp(self.value) if self.value < 700 else math.inf
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
class Divergence:
    """The second part of each window, predicted from the cache that the first part left.

    Attributes:
        perplexity: Of the model under test.
        base_perplexity: Of the original, on the same tokens; None where there is no original.
        kl: Mean KL(original || compressed) per position in nats.
        perplexity_ratio: Paired: exp of the mean difference of log-likelihoods per window.
        cache_bytes: Of one sequence when all of it is fed, as allocated; the prompt has been
            compressed by then. base_cache_bytes: the same of the original.
        top1_agreement: Share of positions where both models' most likely token is the same.
    """

    windows: int
    prefill: int
    continuation: int
    cache_bytes: int
    perplexity: Estimate
    base_cache_bytes: int | None = None
    base_perplexity: Estimate | None = None
    kl: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    top1_agreement: Estimate | None = None


@dataclass(frozen=True)
class WindowScores:
    """Means over the C judged positions of one window, and the bytes its cache took."""

    nll: float
    cache_bytes: int
    base_cache_bytes: int | None = None
    base_nll: float | None = None
    kl: float | None = None
    top1: float | None = None


def cache_size(engine: Engine) -> CacheSize:
    """Measure the store: two allocations tell what grows with the length from what does not."""
    plan = engine.plan
    if plan is not None and plan.policy is not None:
        # An empty cache does not show what a token budget will keep of a prompt.
        item, context = engine.dtype.itemsize, engine.max_context
        kept = plan.cache_bytes(context, item)
        growth = kept - plan.cache_bytes(context - 1, item)
        per_token = plan.bytes_per_token(item)
        return CacheSize(per_token, per_token / item * BFLOAT16_BYTES, kept - growth * context)
    small, large = 1024, 2048
    small_bytes = engine.new_cache(1, small).allocated_bytes
    large_bytes = engine.new_cache(1, large).allocated_bytes
    slope = (large_bytes - small_bytes) / (large - small)
    return CacheSize(
        bytes_per_token=slope,
        bytes_per_token_bf16=slope / engine.dtype.itemsize * BFLOAT16_BYTES,
        constant_bytes=max(large_bytes - slope * large, 0.0),
    )


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


def compare_logits(
    base: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> tuple[float, float, float, float]:
    """Compare two models' logits [C, V] position by position, in float64.

    Returns:
        Mean negative log-likelihood of `targets` [C] under base and other, mean
        KL(base || other), and the share of positions whose argmax agrees.
    """
    positions = len(targets)
    base_nll = other_nll = kl = agree = 0.0
    for start in range(0, positions, SLICE):
        part = slice(start, start + SLICE)
        p = torch.log_softmax(base[part].double(), dim=-1)
        q = torch.log_softmax(other[part].double(), dim=-1)
        index = targets[part, None]
        base_nll -= p.gather(1, index).sum().item()
        other_nll -= q.gather(1, index).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        # p log p is 0 where a logit is -inf; without the mask it would be NaN.
        kl += torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum().item()
    return base_nll / positions, other_nll / positions, kl / positions, agree / positions


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over positions of -log p(target), for logits [C, V] and targets [C]."""
    total = 0.0
    for start in range(0, len(targets), SLICE):
        part = slice(start, start + SLICE)
        q = torch.log_softmax(logits[part].double(), dim=-1)
        total -= q.gather(1, targets[part, None]).sum().item()
    return total / len(targets)


def continuation_logits(
    engine: Engine, ids: torch.Tensor, prefill: int
) -> tuple[torch.Tensor, int]:
    """Prefill ids[:P], then feed the rest through the cache.

    Returns:
        Logits [C, V] of the rest, and the bytes allocated in the end.
    """
    cache = engine.new_cache(1, len(ids))
    engine.extend(cache, ids[:prefill])
    logits = engine.extend(cache, ids[prefill:], all_logits=True).float().cpu()
    return logits, cache.allocated_bytes


def score_windows(
    engine: Engine, base: Engine | None, windows: torch.Tensor, prefill: int
) -> Iterator[WindowScores]:
    """Score windows [N, P + C + 1] one by one; the last token of each is only a target."""
    for window in windows:
        fed, targets = window[:-1], window[prefill + 1 :]
        logits, size = continuation_logits(engine, fed, prefill)
        if base is None:
            yield WindowScores(negative_log_likelihood(logits, targets), size)
            continue
        base_logits, base_size = continuation_logits(base, fed, prefill)
        base_nll, nll, kl, top1 = compare_logits(base_logits, logits, targets)
        yield WindowScores(nll, size, base_size, base_nll, kl, top1)


def summarise(scores: Sequence[WindowScores], prefill: int, continuation: int) -> Divergence:
    """Means and standard errors over windows; the ratio's error is of the paired differences."""
    perplexity = Estimate.of([score.nll for score in scores]).exp()
    size = max(score.cache_bytes for score in scores)
    paired = [
        (score.nll, score.base_nll, score.kl, score.top1)
        for score in scores
        if score.base_nll is not None and score.kl is not None and score.top1 is not None
    ]
    if not paired:
        return Divergence(len(scores), prefill, continuation, size, perplexity)
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
    )

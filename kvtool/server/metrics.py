"""Numbers for Prometheus, under the names that vLLM gave them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

if TYPE_CHECKING:
    from kvtool.runtime.requests import Request
    from kvtool.server.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_INTERVALS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a request.", _INTERVALS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _SECONDS),
    "request_queue_time_seconds": ("Spent waiting for memory.", _SECONDS),
    "request_prefill_time_seconds": ("From admission to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _SECONDS),
    "request_prompt_tokens": ("Prompt tokens per request.", _TOKENS),
    "request_generation_tokens": ("New tokens per request.", _TOKENS),
}


class Metrics:
    """What `/metrics` shows.

    Args:
        prefixes: Of the names; a second one shows every number twice.
    """

    def __init__(self, worker: Worker, model: str, prefixes: Sequence[str] = ("kvtool",)) -> None:
        self._worker, self._model, self._prefixes = worker, model, prefixes
        self.registry = CollectorRegistry()
        self._histograms = {
            name: [
                Histogram(
                    f"{prefix}:{name}",
                    text,
                    ["model_name"],
                    buckets=buckets,
                    registry=self.registry,
                )
                for prefix in prefixes
            ]
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._endings = [
            Counter(
                f"{prefix}:request_success", "Requests by how they ended.",
                ["model_name", "finished_reason"], registry=self.registry,
            )
            for prefix in prefixes
        ]  # fmt: skip
        self.registry.register(self)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def token(self, request: Request, now: float, last: float | None) -> None:
        """A token came, and the one before at `last`, by `perf_counter`; None for the first."""
        if last is None:
            self._observe("time_to_first_token_seconds", now - request.added)
        else:
            self._observe("inter_token_latency_seconds", now - last)

    def ended(self, request: Request, reason: str) -> None:
        """A request came to its end: `stop`, `length`, `abort` or `error`, as vLLM counts them."""
        for counter in self._endings:
            counter.labels(self._model, reason).inc()
        now = perf_counter()
        self._observe("e2e_request_latency_seconds", now - request.added)
        self._observe("request_prompt_tokens", len(request.prompt))
        self._observe("request_generation_tokens", len(request.tokens))
        if request.admitted is not None:
            self._observe("request_queue_time_seconds", request.admitted - request.added)
        if request.admitted is not None and request.answered is not None:
            self._observe("request_prefill_time_seconds", request.answered - request.admitted)
            self._observe("request_decode_time_seconds", now - request.answered)

    def collect(self) -> Iterator[Any]:
        """What the scheduler knows at this moment."""
        state = self._worker.state()
        gauges = {
            "num_requests_running": ("Requests with memory.", state.running),
            "num_requests_waiting": ("Requests without.", state.waiting),
            "kv_cache_usage_perc": ("Share of the memory that is in use.", state.share),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", state.counters.prompt_tokens),
            "generation_tokens": ("Tokens drawn.", state.counters.new_tokens),
            "num_preemptions": ("Requests put back for memory.", state.counters.preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up.", state.counters.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens not read again.", state.counters.prefix_hits),
        }
        own = {
            "kv_bytes_allocated": ("Bytes of all caches.", state.used),
            "kv_bytes_used": ("Those of running requests.", state.used - state.shared),
            "kv_bytes_budget": ("Bytes that they may take.", state.budget),
            "kv_bytes_per_token": ("Bytes that a further token costs.", state.bytes_per_token),
            "kv_compression_ratio": (
                "Uncompressed bytes of the running requests over theirs.",
                state.compression,
            ),
            "decode_bandwidth_bytes_per_second": (
                "Weights and caches read by decode steps of the last seconds.",
                state.bandwidth,
            ),
        }
        for prefix in self._prefixes:
            for name, (text, value) in gauges.items():
                yield self._gauge(f"{prefix}:{name}", text, value)
            for name, (text, value) in counters.items():
                yield self._counter(f"{prefix}:{name}", text, value)
            info = InfoMetricFamily(f"{prefix}:cache_config", "How the cache is set.")
            config = {"kv_memory": str(state.budget), "prefill_chunk": str(state.piece)}
            info.add_metric([], {"model_name": self._model, **config})
            yield info
        for name, (text, value) in own.items():
            yield self._gauge(f"kvtool:{name}", text, value)
        dropped = "Tokens that the plan has dropped, mean over heads, of ended requests."
        yield self._counter("kvtool:kv_evicted_tokens", dropped, state.counters.dropped_tokens)

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _observe(self, name: str, value: float) -> None:
        for histogram in self._histograms[name]:
            histogram.labels(self._model).observe(value)

"""Metrics for Prometheus, in a registry of this server's own: `GET /metrics`.

Names and meanings follow vLLM's (https://docs.vllm.ai/en/latest/usage/metrics.html) with `sightline_` in front, so that
dashboards are a matter of one prefix. What the engine counts itself is read when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eval.engine import EngineStats
from tools.serve.gate import Visit

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ENDPOINTS = ("/v1/chat/completions", "/v1/models", "/caption", "/question", "/chat", "/health", "/metrics")

Values = dict[str, tuple[str, float]]
"""Name -> (what it is, value)."""


class Metrics:
    """What the server counts.

    Args:
        gauges: called at each scrape for values of this moment.
        counters: called at each scrape for sums since the start, without `_total` in their names.
    """

    def __init__(self, gauges: Callable[[], Values], counters: Callable[[], Values]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Read(gauges, counters))
        self._requests = self._counter("requests", "Requests, by address and status", ("endpoint", "status"))
        self._rejected = self._counter("rejected", "Requests refused because of the load", ("reason",))
        self._finished = self._counter("request_success", "Answers, by why they ended", ("finished_reason",))
        self._cancelled = self._counter("cancelled", "Requests whose client left before the end")
        self._again = self._counter("answers_given_again", "Answers that were there already, for the same question")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, those of pictures included")
        self._tokens = self._counter("generation_tokens", "Tokens that were written")
        self._prepare_s = self._histogram("prepare_seconds", "Decoding pictures and encoding the prompt", _SECONDS)
        self._first_s = self._histogram("time_to_first_token_seconds", "From the request to its first token", _SECONDS)
        self._between_s = self._histogram("inter_token_latency_seconds", "Mean between tokens", _TOKEN_SECONDS)
        self._whole_s = self._histogram("e2e_request_latency_seconds", "From the request to its answer's end", _SECONDS)
        self._queue_s = self._histogram("request_queue_time_seconds", "Waiting for the engine", _SECONDS)
        self._prefill_s = self._histogram("request_prefill_time_seconds", "Reading the prompt", _SECONDS)
        self._decode_s = self._histogram("request_decode_time_seconds", "Writing the answer", _SECONDS)

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"sightline_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sightline_{name}", help_text, buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return generate_latest(self.registry)

    def rejected(self, reason: str) -> None:
        """Count a request that the load has refused."""
        self._rejected.labels(reason).inc()

    def answered_again(self) -> None:
        """Count an answer that did not have to be written."""
        self._again.inc()

    def prepared(self, seconds: float) -> None:
        """Note how long pictures and prompt took."""
        self._prepare_s.observe(seconds)

    def began(self, seconds: float) -> None:
        """Note when an answer's first token had come."""
        self._first_s.observe(seconds)

    def ended(self, *, reason: str, prompt_tokens: int, tokens: int, seconds: tuple[float, float, float]) -> None:
        """Note an answer's end, with its seconds of waiting, prefill and decoding."""
        queue_s, prefill_s, decode_s = seconds
        if reason == "cancelled":
            self._cancelled.inc()
        else:
            self._finished.labels(reason).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.inc(tokens)
        self._queue_s.observe(queue_s)
        self._prefill_s.observe(prefill_s)
        self._decode_s.observe(decode_s)
        if tokens > 1:
            self._between_s.observe(decode_s / (tokens - 1))

    def visited(self, visit: Visit) -> None:
        """Count a request that is over."""
        endpoint = next(
            (path for path in ENDPOINTS if visit.path == path or visit.path.startswith(path + "/")), "other"
        )
        self._requests.labels(endpoint, str(visit.status or 499)).inc()
        if "tokens" in visit.facts:
            self._whole_s.observe(time.monotonic() - visit.started_s)


def engine_gauges(stats: EngineStats) -> Values:
    """What the engine is doing."""
    total = max(stats.cache_bytes_total, 1)
    return {
        "num_requests_running": ("Answers that are being written", float(stats.running)),
        "num_requests_waiting": ("Requests that wait for a row", float(stats.waiting)),
        "kv_cache_usage_perc": ("Share of the cache that is promised", stats.cache_bytes_promised / total),
        "rows_per_step": ("Rows that a step gave a token to, on average", stats.rows_per_step),
        "padding_share": ("Of the positions that steps computed with", stats.padding_share),
        "kept_bytes": ("Pixels, features of images, and chats that are kept", float(stats.kept_bytes)),
    }


def engine_counters(stats: EngineStats) -> Values:
    """What the engine has done since its start."""
    return {
        "steps": ("Steps of the model that gave rows a token", float(stats.steps)),
        "prefix_cache_queries": ("Chats that were looked up", float(stats.chats.num_queries)),
        "prefix_cache_hits": ("Chats whose beginning was there", float(stats.chats.num_hits)),
        "pixel_cache_queries": ("Chats whose pictures were looked up by their files", float(stats.pixels.num_queries)),
        "pixel_cache_hits": ("Chats whose pictures were not decoded again", float(stats.pixels.num_hits)),
        "mm_cache_queries": ("Images that were looked up", float(stats.features.num_queries)),
        "mm_cache_hits": ("Images whose features were there", float(stats.features.num_hits)),
    }


class _Read(Collector):
    def __init__(self, gauges: Callable[[], Values], counters: Callable[[], Values]) -> None:
        self._gauges, self._counters = gauges, counters

    def collect(self) -> Iterable[Metric]:
        for name, (text, value) in self._gauges().items():
            yield GaugeMetricFamily(f"sightline_{name}", text, value=value)
        for name, (text, value) in self._counters().items():
            yield CounterMetricFamily(f"sightline_{name}", text, value=value)

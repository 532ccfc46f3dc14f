"""What a gateway counts, by vLLM's names under the prefix `outrider:`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from outrider_client.results import GenerationResult

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = self._gauge("num_requests_running", "Texts that are being written")
        self.waiting = self._gauge("num_requests_waiting", "Texts without a token yet")
        self.first_token = self._seconds("time_to_first_token", "From a text's start to its first token")
        self.inter_token = self._seconds("inter_token_latency", "Between tokens, those of a round alike")
        self.latency = self._seconds("e2e_request_latency", "From a text's start to its end")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.tokens = self._counter("generation_tokens", "Tokens written")
        self.passes = self._counter("spec_decode_num_drafts", "Target passes")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Proposals that were verified")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Proposals that were accepted")
        self.success = self._counter("request_success", "Texts, by how they ended", "finished_reason")
        self.refused = self._counter("request_refusals", "Requests refused or failed, by reason", "reason")
        self.disconnected = self._counter("request_disconnects", "Requests whose caller went away")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"outrider:{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"outrider:{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"outrider:{name}_seconds", text, buckets=_SECONDS, registry=self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    @contextmanager
    def text(self) -> Iterator[TextClock]:
        """Count a text as waiting, or running, for as long as it is."""
        clock = TextClock(self)
        try:
            yield clock
        finally:
            clock.close()


class TextClock:
    """Measures one text."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._began_at = metrics, time.monotonic()
        self._last_at: float | None = None  # of a token
        metrics.waiting.inc()

    def on_tokens(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self._last_at is None:
            self._metrics.first_token.observe(now - self._began_at)
            self._metrics.waiting.dec()
            self._metrics.running.inc()
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - self._last_at) / num_tokens)
        self._last_at = now
        self._metrics.tokens.inc(num_tokens)

    def on_end(self, result: GenerationResult) -> None:
        metrics, stats = self._metrics, result.stats
        metrics.latency.observe(time.monotonic() - self._began_at)
        metrics.prompt_tokens.inc(len(result.prompt_token_ids))
        metrics.passes.inc(stats.num_rounds)
        metrics.drafted.inc(stats.num_draft_tokens)
        metrics.accepted.inc(stats.num_accepted_tokens)
        metrics.success.labels(result.finish_reason).inc()

    def close(self) -> None:
        (self._metrics.waiting if self._last_at is None else self._metrics.running).dec()

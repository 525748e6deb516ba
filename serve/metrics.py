"""What an endpoint says of itself, in Prometheus form. Names end as vLLM's do, so that its dashboards fit."""

from __future__ import annotations

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kforcing.engine import Engine, EngineStats

PREFIX = "kforcing"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """All metrics of a replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "replica")

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, (*labels, *more), registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, labels, registry=self.registry, buckets=SECONDS)

        self.running = gauge("num_requests_running", "Requests that have a slot.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a slot.")
        self.cache = gauge("kv_cache_usage_perc", "Share of the cache's columns that running requests fill, 0 to 1.")
        self.per_forward = gauge("tokens_per_forward", "Tokens returned a step and running request, since the start.")
        self.ttft = histogram("time_to_first_token_seconds", "From the request to its first tokens.")
        self.per_token = histogram("request_time_per_output_token_seconds", "Of a request, after its first tokens.")
        self.end_to_end = histogram("e2e_request_latency_seconds", "From the request to its last token.")
        self.queue_time = histogram("request_queue_time_seconds", "From the request to its slot.")
        self.delivery = histogram("step_to_chunk_seconds", "From the end of a step to the chunk handed to the server.")
        self.prompt = counter("prompt_tokens_total", "Prompt tokens of finished requests.")
        self.generated = counter("generation_tokens_total", "Tokens returned.")
        self.discarded = counter("discarded_tokens_total", "Tokens made behind a stop or a limit, never returned.")
        self.steps = counter("engine_steps_total", "Decoding steps.")
        self.engine_time = counter("engine_time_seconds_total", "Time the engine computed.")
        self.framework_time = counter("framework_time_seconds_total", "Time between steps while there was work.")
        self.success = counter("request_success_total", "Finished requests.", "finished_reason")
        self.rejected = counter("requests_rejected_total", "Requests refused because too many waited.")

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self.registry).decode()


class EngineMetrics:
    """The metrics of one model of a replica. Called from the engine's thread and from handlers: prometheus_client locks."""

    def __init__(self, metrics: Metrics, model: str, replica: str):
        self._all, self._labels = metrics, {"model": model, "replica": replica}
        self._counted, self._returned, self._probes = EngineStats(), 0, 0
        for gauge in (metrics.running, metrics.waiting, metrics.cache):
            gauge.labels(**self._labels).set(0)
        metrics.per_forward.labels(**self._labels).set_function(self._tokens_per_forward)
        counters = (metrics.prompt, metrics.generated, metrics.discarded, metrics.steps, metrics.rejected)
        for counter in (*counters, metrics.engine_time, metrics.framework_time):
            counter.labels(**self._labels).inc(0)
        for reason in ("stop", "length", "abort"):
            metrics.success.labels(**self._labels, finished_reason=reason).inc(0)

    def _tokens_per_forward(self) -> float:
        steps = self._counted.slot_steps - self._probes
        return self._returned / steps if steps > 0 else 0.0

    def after_step(self, engine: Engine, seconds: float, between: float) -> None:
        """A step took `seconds`, and `between` passed since the one before while there was work."""
        m, own, now, before = self._all, self._labels, engine.stats, self._counted
        m.engine_time.labels(**own).inc(seconds)
        m.framework_time.labels(**own).inc(between)
        m.discarded.labels(**own).inc(now.discarded - before.discarded)
        m.steps.labels(**own).inc(now.steps - before.steps)
        self._counted = dataclasses.replace(now)
        m.running.labels(**own).set(len(engine.running))
        m.waiting.labels(**own).set(len(engine.waiting) + len(engine.prefilling))
        columns = engine.config.max_num_seqs * (engine.max_model_len + engine.k)
        m.cache.labels(**own).set(sum(r.length for r in engine.running) / columns)

    def probed(self) -> None:
        """A probe of readiness made one step of its own, which is nobody's."""
        self._probes += 1

    def stopped(self) -> None:
        """The engine has died: nothing runs or waits any more."""
        for gauge in (self._all.running, self._all.waiting, self._all.cache):
            gauge.labels(**self._labels).set(0)

    def rejected(self, requests: int) -> None:
        """Requests were refused because too many wait."""
        self._all.rejected.labels(**self._labels).inc(requests)

    def queued(self, seconds: float) -> None:
        """A request got its slot."""
        self._all.queue_time.labels(**self._labels).observe(seconds)

    def returned(self, tokens: int, dropped: int) -> None:
        """Tokens that a client was given, and tokens behind a stop string that it was not."""
        self._returned += tokens
        self._all.generated.labels(**self._labels).inc(tokens)
        self._all.discarded.labels(**self._labels).inc(dropped)

    def delivered(self, seconds: float) -> None:
        """A chunk was handed to the server so long after its step ended."""
        self._all.delivery.labels(**self._labels).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A request got its first tokens."""
        self._all.ttft.labels(**self._labels).observe(seconds)

    def finished(self, reason: str, seconds: float, after_first: float, prompt: int, tokens: int) -> None:
        """A request has ended: `stop`, `length` or `abort`; `after_first` seconds passed since its first tokens."""
        m, own = self._all, self._labels
        m.success.labels(**own, finished_reason=reason).inc()
        m.prompt.labels(**own).inc(prompt)
        m.end_to_end.labels(**own).observe(seconds)
        if tokens > 1:
            m.per_token.labels(**own).observe(after_first / (tokens - 1))

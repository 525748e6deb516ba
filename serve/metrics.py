"""The metrics of a replica in Prometheus' format. Their names end like vLLM's, so that dashboards are easy to adapt."""

from __future__ import annotations

import copy

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
        self.cache = gauge("kv_cache_usage_perc", "Share of the cache's columns in use, 0 to 1.")
        self.per_forward = gauge("tokens_per_forward", "Tokens returned per step of a request, since the start.")
        self.ttft = histogram("time_to_first_token_seconds", "Seconds from arrival to the first tokens.")
        self.per_token = histogram("request_time_per_output_token_seconds", "Seconds per token after the first tokens.")
        self.end_to_end = histogram("e2e_request_latency_seconds", "Seconds from arrival to the last token.")
        self.queue_time = histogram("request_queue_time_seconds", "Seconds for which a request waited for a slot.")
        self.delivery = histogram("step_to_chunk_seconds", "Seconds from a step's end to the delivery of its chunk.")
        self.prompt = counter("prompt_tokens_total", "Prompt tokens of finished requests.")
        self.generated = counter("generation_tokens_total", "Tokens returned.")
        self.discarded = counter(
            "discarded_tokens_total", "Tokens generated after a stop or a limit, and never returned."
        )
        self.steps = counter("engine_steps_total", "Decoding steps.")
        self.drafts = counter("spec_decode_num_draft_tokens_total", "Exact mode: drafted tokens that were verified.")
        self.accepted = counter(
            "spec_decode_num_accepted_tokens_total", "Exact mode: drafts that are equal to the AR model's own tokens."
        )
        self.cached = counter("prefix_cache_hits_total", "Prompt tokens that were taken over from earlier prompts.")
        self.engine_time = counter("engine_time_seconds_total", "Seconds for which the engine computed.")
        self.framework_time = counter("framework_time_seconds_total", "Seconds between steps while there was work.")
        self.success = counter("request_success_total", "Finished requests.", "finished_reason")
        self.failed = Gauge(
            f"{PREFIX}_deployment_failed",
            "1 while the newest deployment could not be loaded and the one before is served.",
            ("replica",),
            registry=self.registry,
        )
        self.rejected = counter("requests_rejected_total", "Requests refused because the waiting queue was full.")

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class EngineMetrics:
    """The metrics of one model. The engine thread and the handlers may call it at once, because prometheus_client locks."""

    def __init__(self, metrics: Metrics, model: str, replica: str):
        self._all, self._labels = metrics, {"model": model, "replica": replica}
        self._counted, self._returned, self._probes = EngineStats(), 0, 0
        for gauge in (metrics.running, metrics.waiting, metrics.cache):
            gauge.labels(**self._labels).set(0)
        metrics.failed.labels(replica).set(0)
        metrics.per_forward.labels(**self._labels).set_function(self._tokens_per_forward)
        counters = (metrics.prompt, metrics.generated, metrics.discarded, metrics.steps, metrics.rejected)
        times = (metrics.engine_time, metrics.framework_time)
        for counter in (*counters, *times, metrics.drafts, metrics.accepted, metrics.cached):
            counter.labels(**self._labels).inc(0)
        for reason in ("stop", "length", "abort"):
            metrics.success.labels(**self._labels, finished_reason=reason).inc(0)

    def _tokens_per_forward(self) -> float:
        steps = self._counted.slot_steps - self._probes
        return self._returned / steps if steps > 0 else 0.0

    def after_step(self, engine: Engine, seconds: float, between: float, waiting: int) -> None:
        """Record a step of an engine.

        Args:
            seconds: that it took.
            between: seconds since the previous step, if there was work in them.
            waiting: requests that the engine does not have yet.
        """
        m, own, now, before = self._all, self._labels, engine.stats, self._counted
        m.engine_time.labels(**own).inc(seconds)
        m.framework_time.labels(**own).inc(between)
        m.discarded.labels(**own).inc(now.discarded - before.discarded)
        m.steps.labels(**own).inc(now.steps - before.steps)
        m.cached.labels(**own).inc(now.cached_tokens - before.cached_tokens)
        m.drafts.labels(**own).inc(sum(now.drafted) - sum(before.drafted))
        m.accepted.labels(**own).inc(sum(now.accepted) - sum(before.accepted))
        self._counted = copy.deepcopy(now)
        m.running.labels(**own).set(len(engine.scheduler.running))
        m.waiting.labels(**own).set(waiting + len(engine.scheduler.waiting) + len(engine.scheduler.prefilling))
        columns = engine.config.max_num_seqs * (engine.max_model_len + engine.k)
        m.cache.labels(**own).set(sum(r.length for r in engine.scheduler.running) / columns)

    def probed(self) -> None:
        """Exclude the step of a readiness probe from the tokens per forward pass."""
        self._probes += 1

    def stopped(self) -> None:
        """Set the gauges to 0 after the engine has died."""
        for gauge in (self._all.running, self._all.waiting, self._all.cache):
            gauge.labels(**self._labels).set(0)

    def rejected(self, requests: int) -> None:
        """Count requests that were refused because the waiting queue is full."""
        self._all.rejected.labels(**self._labels).inc(requests)

    def queued(self, seconds: float) -> None:
        """Record the seconds for which a request waited for its slot."""
        self._all.queue_time.labels(**self._labels).observe(seconds)

    def returned(self, tokens: int, dropped: int) -> None:
        """Count the tokens that a client received, and those after a stop string that were dropped."""
        self._returned += tokens
        self._all.generated.labels(**self._labels).inc(tokens)
        self._all.discarded.labels(**self._labels).inc(dropped)

    def delivered(self, seconds: float) -> None:
        """Record the seconds from the end of a step to the delivery of its chunk."""
        self._all.delivery.labels(**self._labels).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the seconds from the arrival of a request to its first tokens."""
        self._all.ttft.labels(**self._labels).observe(seconds)

    def finished(self, reason: str, seconds: float, after_first: float, prompt: int, tokens: int) -> None:
        """Record the end of a request.

        Args:
            reason: `stop`, `length` or `abort`.
            seconds: since its arrival.
            after_first: seconds since its first tokens.
            prompt: number of prompt tokens.
            tokens: number of tokens returned.
        """
        m, own = self._all, self._labels
        m.success.labels(**own, finished_reason=reason).inc()
        m.prompt.labels(**own).inc(prompt)
        m.end_to_end.labels(**own).observe(seconds)
        if tokens > 1:
            m.per_token.labels(**own).observe(after_first / (tokens - 1))

"""The endpoint under Ray Serve.

    serve run serve.app:build model=runs/quickstart/k4                one replica, on this machine
    serve deploy infra/serve.yaml                                     on a cluster

    client ──HTTP──► proxy ──► replica: api.py (HTTP, SSE) ► service.py (text, stops) ► engine_thread.py ► Engine

`GET /health` answers 200 if every model has run a forward pass lately, `GET /live` if the process answers, and `GET /metrics`
returns the metrics of all replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import zlib
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.types import ASGIApp

from serve import metrics_hub
from serve.api import create_app
from serve.metrics_hub import MetricsHub, merge
from serve.models import check_deployment, pinned
from serve.service import Service
from serve.settings import Settings, read_settings

PUSH_S = 2.0
"""Seconds between two messages to the metrics hub."""
HUB_LIFE_S = 60.0
"""Seconds after which the hub ends when no replica is left. A replica that replaces another one comes sooner."""
HUB_ANSWER_S = 10.0
"""Seconds for which a replica that starts waits for the settings that were served last."""
HUB_CODE = zlib.crc32(Path(metrics_hub.__file__).read_bytes())
"""A part of the hub's name, so that replicas of newer code make a hub of their own."""


@serve.ingress()
class Endpoint:
    """A replica. `user_config` holds its settings; when they change, the replica changes its models and drops no request."""

    def __init__(self, api_keys: list[str], max_body: int, origins: list[str]):
        self.api_keys, self.max_body, self.origins = api_keys, max_body, origins
        context = serve.get_replica_context()
        self.service = Service(context.replica_id.unique_id)
        self.hub = ray.remote(num_cpus=0)(MetricsHub).options(
            name=f"kforcing-metrics-{context.app_name}-{HUB_CODE:x}",
            namespace="serve",
            get_if_exists=True,
            lifetime="detached",
        )
        self._hub: Any = None
        self._pusher: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application that Serve calls for HTTP."""
        return create_app(self.service, self.api_keys, self.max_body, self._scrape, self.origins)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply settings, the first ones included. Where they cannot be loaded, what was served before is served on."""
        served = None
        # Without the hub there is nothing to fall back to.
        with contextlib.suppress(ray.exceptions.RayError, asyncio.TimeoutError):
            served = await asyncio.wait_for(self.hub.remote(HUB_LIFE_S).last_served.remote(), HUB_ANSWER_S)
        await self.service.configure(read_settings(user_config), before=served and read_settings(served))
        if self._pusher is None:
            self._pusher = asyncio.create_task(self._push())

    async def check_health(self) -> None:
        """Raise RuntimeError if an engine is dead, so that Serve replaces the replica."""
        self.service.check_alive()

    async def _scrape(self) -> str:
        own = self.service.metrics.text()
        try:
            self._hub = self._hub or self.hub.remote(HUB_LIFE_S)
            served = self.service.settings.model_dump(exclude={"api_key"}) if self.service.settings else None
            return merge(await self._hub.put.remote(self.service.replica, own, served))
        except ray.exceptions.RayError:
            self._hub = None
            return own

    async def _push(self) -> None:
        """Send this replica's metrics to the hub regularly, because a scrape reaches only one replica."""
        while True:
            with contextlib.suppress(Exception):
                await self._scrape()
            await asyncio.sleep(PUSH_S)


def build(given: dict[str, Any]) -> serve.Application:
    """The application of `serve run serve.app:build name=value …`; `Settings` lists the names.

    Whatever can be checked is checked here, so that a bad deployment does not end a good one: Serve then keeps what it has.

    Raises ValueError or FileNotFoundError that names a wrong or missing setting.
    """
    if (key := os.environ.get("KFORCING_API_KEY")) is not None:
        given = {"api_key": key, **given}
    settings = read_settings(given)
    check_deployment(settings)
    models = {"model": pinned(settings.model), "teacher": pinned(settings.teacher)}
    deployment: Any = serve.deployment(Endpoint, name="kforcing")
    return deployment.options(
        **_replicas(settings),
        max_ongoing_requests=_max_ongoing_requests(settings),
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        ray_actor_options={
            "num_cpus": settings.cpus,
            "num_gpus": settings.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, round(settings.cpus)))}},
        },
        user_config=settings.model_dump(exclude={"api_key"}) | models,
    ).bind(settings.api_keys, int(settings.max_body_mb * 2**20), settings.origins)


def _replicas(settings: Settings) -> dict[str, Any]:
    """Serve's options for the number of replicas: fixed, or autoscaled between two numbers."""
    low, high = settings.min_replicas, settings.max_replicas
    if low > 0 and high <= low:
        return {"num_replicas": low}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=low,
            max_replicas=high,
            target_ongoing_requests=settings.target_ongoing_requests or settings.max_num_seqs,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
        )
    }


def _max_ongoing_requests(settings: Settings) -> int:
    """Serve's own limit per replica, above that of the waiting queue, so that the replica answers 429 in OpenAI's shape.

    A student and its teacher may each run and queue requests; 64 more are left for probes and scrapes.
    """
    running = settings.max_num_seqs * (1 if settings.teacher == "none" else 2)
    return running + 2 * settings.max_waiting + 64

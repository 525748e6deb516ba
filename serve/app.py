"""The endpoint under Ray Serve.

    serve run serve.app:build model=runs/quickstart/k4                one replica, on this machine
    serve deploy infra/serve.yaml                                     on a cluster

    client ──HTTP──► proxy ──► replica: api.py (HTTP, SSE) ► service.py (text, stops) ► loop.py (one thread) ► Engine

`GET /health` answers 200 when every model has proved a forward pass lately, `GET /live` when the process answers, and
`GET /metrics` with the figures of all replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.types import ASGIApp

from serve.api import create_app
from serve.metrics_hub import MetricsHub, merge
from serve.models import pinned
from serve.service import Service
from serve.settings import Settings, read_settings

PUSH_S = 2.0


@serve.ingress()
class Endpoint:
    """A replica. `user_config` says what it serves; a new one is taken over without dropping a request."""

    def __init__(self, api_key: str | None, max_body: int):
        self.api_key, self.max_body = api_key, max_body
        context = serve.get_replica_context()
        self.service = Service(context.replica_id.unique_id)
        self.hub = ray.remote(num_cpus=0)(MetricsHub).options(
            name=f"kforcing-metrics-{context.app_name}", namespace="serve", get_if_exists=True, lifetime="detached"
        )
        self._hub: Any = None
        self._pusher: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve calls for HTTP."""
        return create_app(self.service, self.api_key, self.max_body, self._scrape)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve what the configuration says."""
        await self.service.configure(Settings(**user_config))
        if self._pusher is None:
            self._pusher = asyncio.create_task(self._push())

    async def check_health(self) -> None:
        """Raise when an engine is dead, so that Serve replaces the replica."""
        self.service.check_alive()

    async def _scrape(self) -> str:
        own = self.service.metrics.text()
        try:
            self._hub = self._hub or self.hub.remote()
            return merge(await self._hub.put.remote(self.service.replica, own))
        except ray.exceptions.RayError:
            self._hub = None
            return own

    async def _push(self) -> None:
        """Let the hub know this replica's figures, whichever replica is scraped."""
        while True:
            with contextlib.suppress(Exception):
                await self._scrape()
            await asyncio.sleep(PUSH_S)


def build(given: dict[str, Any]) -> serve.Application:
    """The application of `serve run serve.app:build name=value …`; `Settings` has the names.

    Raises ValueError that names a wrong or missing value.
    """
    args = read_settings(given)
    slots = args.max_num_seqs * (1 if args.teacher == "none" else 2)
    replicas: dict[str, Any] = {"num_replicas": args.min_replicas or 1}
    if args.max_replicas > max(args.min_replicas, 1) or args.min_replicas == 0:
        replicas = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=args.min_replicas,
                max_replicas=args.max_replicas,
                target_ongoing_requests=args.target_ongoing_requests or args.max_num_seqs,
                upscale_delay_s=args.upscale_delay_s,
                downscale_delay_s=args.downscale_delay_s,
            )
        }
    # The line is bounded here, where it can be answered in OpenAI's shape; Serve's own bounds lie behind it.
    most = slots + 2 * args.max_waiting + 64
    pins = {"model": pinned(args.model), "teacher": pinned(args.teacher)}
    user_config = args.model_dump(exclude={"api_key"}) | pins
    deployment: Any = serve.deployment(Endpoint, name="kforcing")
    return deployment.options(
        **replicas,
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        ray_actor_options={
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, round(args.cpus)))}},
        },
        user_config=user_config,
    ).bind(args.api_key or os.environ.get("KFORCING_API_KEY") or None, int(args.max_body_mb * 2**20))

"""The engine: requests join and leave one lockstep batch, every step gives every slot exactly k tokens.

    submit ─► waiting ─► prefilling, a chunk a step ─► running: slots 0 … n−1 ─► finished, its slot filled by the last
                          slots p … p+r−1                │
                                                  step: one forward, k tokens each

The host keeps lengths by counting and looks at tokens once every `check_every` steps; nothing else waits for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kforcing.attention.reader import check_backbone
from kforcing.coupling import COUPLINGS
from kforcing.engine.graphs import Graphs, cuda_capture
from kforcing.engine.layers import STATIC_ROPE
from kforcing.engine.packing import can_pack, packed_copy
from kforcing.engine.request import Completion, Output, Request, SamplingParams
from kforcing.engine.runner import ModelRunner
from kforcing.readout.base import as_student


@dataclass(frozen=True)
class EngineConfig:
    """Shape and habits of an engine."""

    max_num_seqs: int = 16
    """Requests that run at once."""
    max_model_len: int | None = None
    """Longest prompt and continuation together; none for what the model's positions allow, at most 2,048."""
    k: int | None = None
    """Tokens a step; none for the student's k, 1 for an AR model."""
    max_num_batched_tokens: int = 256
    """Prompt tokens read between two steps: bounds how long a new prompt holds up the others."""
    check_every: int | None = None
    """Steps between two looks at the tokens; none for 1 on a CPU and 8 on a GPU. A request that has ended runs on until
    the next look, and what it makes is dropped."""
    batch_invariant: bool = False
    """Run every step and every prompt chunk in one shape, whatever is in the slots, so that rounding cannot depend on
    the batch: matters in half precision. Empty slots then cost what full ones do."""
    coupling: str = "inverse_cdf"
    """How noise picks a token from an AR model's distribution; a student brings its own."""
    compiled: bool = False
    """Run the layers through torch.compile (on a CPU it needs a C++ compiler, and excludes `packed`, which gains more)."""
    packed: bool | None = None
    """Hold the matrices a second time, in the order the CPU's kernels want: 2 to 4 times as fast (`packing.py`). None for
    yes on a CPU."""
    graphs: bool | None = None
    """Replay steps as CUDA graphs, one for each bucket of slots and columns; none for yes on a GPU."""


@dataclass
class EngineStats:
    """What an engine has done since it was made."""

    steps: int = 0
    prefill_tokens: int = 0
    """Prompt tokens read before the first step of their request."""
    tokens: int = 0
    """Tokens returned."""
    slot_steps: int = 0
    """Steps summed over the requests that ran in them."""
    discarded: int = 0
    """Tokens made by running requests and not returned: behind a stop id, a limit or a cancellation."""


@dataclass
class _Running:
    id: int
    request: Request
    k: int
    limit: int
    slot: int = -1
    filled: int = 0
    new: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.new)


class Engine:
    """Decodes any number of requests with one model. Not thread-safe: one owner calls `submit`, `step` and `cancel`.

    Args:
        model: a `PushForwardLM`, or a causal LM of transformers for AR decoding; stays where it is (device, dtype).
            Later changes of its weights may go unnoticed.
    Raises:
        ValueError: for a config that the model cannot serve.
    """

    def __init__(self, model: nn.Module, config: EngineConfig | None = None):
        config = config or EngineConfig()
        model.eval()
        student = as_student(model)
        backbone: Any = student.backbone if student else model
        if not student:
            check_backbone(backbone)
        self.k = _checked_k(config.k, student.k if student else 1)
        self.max_model_len = _checked_len(config.max_model_len, context_limit(backbone.config), self.k)
        cuda = backbone.device.type == "cuda"
        self.check_every = (8 if cuda else 1) if config.check_every is None else config.check_every
        sizes = {
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "check_every": self.check_every,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if config.coupling not in COUPLINGS:
            raise ValueError(f"coupling={config.coupling}: choose one of {', '.join(COUPLINGS)}")
        if config.packed and (config.compiled or not can_pack(model)):
            raise ValueError("packed=True needs a model in fp32 or bf16 on a CPU and compiled=False; leave packed out")
        packed = can_pack(model) and not config.compiled if config.packed is None else config.packed
        model = packed_copy(model) if packed else model
        self.model, self.config, self.student = model, config, as_student(model)
        graphs = cuda if config.graphs is None else config.graphs
        if graphs and not cuda:
            raise ValueError("graphs=True needs a model on a GPU; leave graphs out")
        self._device: AbstractContextManager[Any] = torch.cuda.device(backbone.device) if cuda else nullcontext()
        self.runner = ModelRunner(
            model, config.max_num_seqs, self.max_model_len, self.k, COUPLINGS[config.coupling], config.compiled
        )
        self.vocabulary = self.runner.sampler.vocabulary
        with self._device:
            self._step: Any = Graphs(self.runner, cuda_capture()) if graphs else self.runner.step
        self._buckets = cuda
        self.stats = EngineStats()
        self.waiting: deque[_Running] = deque()
        self.prefilling: list[_Running] = []
        self.running: list[_Running] = []
        self._cancelled: set[int] = set()
        self._live: set[int] = set()
        self._boxes: dict[int, deque[Output]] = {}
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self.waiting or self.prefilling or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. Raises ValueError for what the model or the engine cannot do."""
        k, limit = self.check(request)
        self.waiting.append(_Running(self._next_id, request, k, limit))
        self._live.add(self._next_id)
        self._next_id += 1
        return self.waiting[-1].id

    def check(self, request: Request) -> tuple[int, int]:
        """The k and the number of new tokens a request will get. Raises ValueError when it cannot be served."""
        N, new = len(request.prompt), request.max_new_tokens
        if not N:
            raise ValueError("the prompt has no tokens; give at least one")
        wrong = next((i for i in request.prompt if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"prompt token {wrong} is outside the vocabulary of {self.vocabulary}")
        if new is not None and new < 1:
            raise ValueError(f"max_new_tokens={new} must be at least 1")
        if N + (new or 1) > self.max_model_len:
            raise ValueError(
                f"{N} prompt tokens + {new or 1} new ones exceed the context of {self.max_model_len} tokens; shorten "
                "the prompt, ask for fewer, or give the engine a larger max_model_len"
            )
        k = _checked_k(request.k, self.k)
        request.sampling.check()
        self._check_sampling(request.sampling)
        return k, new or self.max_model_len - N

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if self.student is None or self.student.design.conditional:
            return
        if sampling.filters:
            raise ValueError(
                f"top_k={sampling.top_k}, top_p={sampling.top_p}: this student's noise picks tokens inside the network, so "
                "there is no distribution to cut; leave them at their defaults or use a sequential student or the AR model"
            )
        noise = self.student.design.noise
        if not noise.temperature_min <= sampling.temperature <= noise.temperature_max:
            raise ValueError(
                f"temperature={sampling.temperature} asked of a student trained for {noise.temperature_min} to "
                f"{noise.temperature_max}"
            )

    def cancel(self, id: int) -> None:
        """Forget a request; its slot is free at the next step. Unknown and finished ids are ignored."""
        if id in self._live:
            self._live.discard(id)
            self._cancelled.add(id)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Let requests in, read a chunk of their prompts, and advance those that run; what they made is returned."""
        with self._device:
            self._drop_cancelled()
            self._admit()
            for _ in range(self.check_every):
                self._prefill()
            outputs = self._decode() if self.running else []
        for output in outputs:
            if output.finish_reason:
                self._live.discard(output.id)
            if output.id in self._boxes:
                self._boxes[output.id].append(output)
        return outputs

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their end; the completions come in their order. Other requests of the engine run along."""
        for request in requests:
            self.check(request)
        ids = [self._open(request) for request in requests]
        try:
            return [_completion(list(self._follow(id))) for id in ids]
        except BaseException:
            for id in ids:
                self.cancel(id)
            raise

    def stream(self, request: Request) -> Iterator[Output]:
        """The outputs of one request as they are made. Closing the iterator cancels it, cancelling it ends the iterator.

        Several streams may be open at once: each step advances them all.
        """
        return self._follow(self._open(request))

    def _open(self, request: Request) -> int:
        id = self.submit(request)
        self._boxes[id] = deque()
        return id

    def _follow(self, id: int) -> Iterator[Output]:
        box = self._boxes[id]
        try:
            while id in self._live or box:
                if box:
                    yield box.popleft()
                else:
                    self.step()
        finally:
            del self._boxes[id]
            self.cancel(id)

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        self.waiting = deque(r for r in self.waiting if r.id not in self._cancelled)
        # A prefilling request keeps its place until its group has been read.
        leaving = [r for r in self.running if r.id in self._cancelled]
        self._leave(leaving)
        self._cancelled -= {r.id for r in leaving}
        self._cancelled &= {r.id for r in self.prefilling}

    def _admit(self) -> None:
        """Give free slots to those who wait, short prompts first: they start while longer ones are read."""
        free = self.config.max_num_seqs - len(self.running)
        if self.prefilling or not self.waiting or not free:
            return
        size = 1 if self.config.batch_invariant else free
        group = [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))]
        self.prefilling = sorted(group, key=lambda r: len(r.request.prompt))
        for slot, r in enumerate(self.prefilling, start=len(self.running)):
            r.slot = slot
            self.runner.load(slot, r.request.prompt)

    def _prefill(self) -> None:
        """Read a chunk of the prompts, but for the last k tokens, which the first step reads."""
        self._promote()
        group, budget = self.prefilling, self.config.max_num_batched_tokens
        if group:
            start = group[0].filled
            left = self._to_fill(group[-1]) - start
            length = budget if self.config.batch_invariant else min(left, max(1, budget // len(group)))
            self.runner.prefill(slice(group[0].slot, group[0].slot + len(group)), start, length)
            for r in group:
                self.stats.prefill_tokens += min(length, self._to_fill(r) - start)
                r.filled += length
            self._promote()

    def _to_fill(self, r: _Running) -> int:
        return len(r.request.prompt) - self.k

    def _promote(self) -> None:
        """Those whose prompts have been read begin to run, in the first free slot."""
        while self.prefilling and self.prefilling[0].filled >= self._to_fill(self.prefilling[0]):
            r = self.prefilling.pop(0)
            target = len(self.running)
            if r.slot != target:
                self._move(r, target)
            self.runner.start(target, len(r.request.prompt), r.request.seed, r.k, r.request.sampling)
            self.running.append(r)
            if r.id in self._cancelled:
                self._cancelled.discard(r.id)
                self._leave([r])

    def _decode(self) -> list[Output]:
        lengths = [r.length for r in self.running]
        plain = all(r.request.sampling.plain for r in self.running)
        steps = [self._one_step(lengths, plain, i) for i in range(self.check_every)]
        self.stats.steps += len(steps)
        self.stats.slot_steps += len(steps) * len(self.running)
        made = torch.stack(steps).tolist()  # steps, slots, k
        outputs = []
        for i, r in enumerate(self.running):
            outputs.append(self._finish(r, [token for step in made for token in step[i][: r.k]]))
        self._leave([r for r, output in zip(self.running, outputs, strict=True) if output.finish_reason])
        return outputs

    def _one_step(self, lengths: list[int], plain: bool, ahead: int) -> Tensor:
        """One more step of the running slots, `ahead` steps after their known lengths."""
        n, used = len(lengths), min(max(lengths) + ahead * self.k, self.max_model_len - 1)
        columns = used + self.runner.hints
        if self.config.batch_invariant:
            return self._step(self.config.max_num_seqs, self.runner.cache.columns, plain)[:n]
        if self._buckets:
            n_bucket = min(_power_of_two(n), self.config.max_num_seqs)
            return self._step(n_bucket, min(_power_of_two(columns, 256), self.runner.cache.columns), plain)[:n]
        alike = self.k == 1 and not self.runner.hints and min(lengths) == max(lengths)
        return self._step(n, columns, plain, not alike)

    def _finish(self, r: _Running, made: list[int]) -> Output:
        """Cut what a request made at its first stop id or its limit."""
        room = r.limit - len(r.new)
        at, stop = next(((i, t) for i, t in enumerate(made[:room]) if t in r.request.stop_ids), (None, None))
        kept = made[: room if at is None else at]
        r.new += kept
        self.stats.tokens += len(kept)
        self.stats.discarded += len(made) - len(kept)
        reason = "stop" if at is not None else "length" if len(r.new) >= r.limit else None
        return Output(r.id, kept, reason, stop)

    def _leave(self, leaving: list[_Running]) -> None:
        """Free slots; the last running requests move into the holes."""
        for r in sorted(leaving, key=lambda r: r.slot, reverse=True):
            last = self.running.pop()
            if last is not r:
                self._move(last, r.slot)
                self.running[last.slot] = last

    def _move(self, r: _Running, slot: int) -> None:
        self.runner.move(r.slot, slot, r.length + 1)
        r.slot = slot


def context_limit(config: Any) -> int | None:
    """Positions up to which a model computes what one that reads whole sequences does.

    Its number of positions; its window where attention slides, since a slot's columns are all looked at; and what it was
    first trained on where rotary angles change with the length of the longest sequence of a batch (dynamic, longrope).
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)


def _completion(outputs: list[Output]) -> Completion:
    tokens = [token for output in outputs for token in output.tokens]
    if not outputs or not outputs[-1].finish_reason:
        return Completion(tokens, "cancelled")
    return Completion(tokens, outputs[-1].finish_reason, outputs[-1].stop_id)


def _checked_k(k: int | None, most: int) -> int:
    k = most if k is None else k
    if not 1 <= k <= most:
        raise ValueError(f"k={k} tokens a step asked where 1 to {most} can be made")
    return k


def _checked_len(max_model_len: int | None, limit: int | None, k: int) -> int:
    most = None if limit is None else limit - k + 1
    max_model_len = min(2048, most or 2048) if max_model_len is None else max_model_len
    if max_model_len < 2 or (most is not None and max_model_len > most):
        raise ValueError(
            f"max_model_len={max_model_len} (prompt and new tokens together): choose 2 to {most or 'any number'}; the model "
            f"reads {limit or 'any number of'} positions, and a block of {k} may begin at the last of them"
        )
    return max_model_len


def _power_of_two(n: int, least: int = 1) -> int:
    while least < n:
        least *= 2
    return least

"""The engine: requests join and leave one lockstep batch, and every step gives every running request one or more tokens.

    submit ─► Scheduler: waiting ─► prefilling ─► running: slots 0 … n−1 ─► finished
                                                     │
                                       ModelRunner.step: one forward pass for all slots

The host keeps lengths by counting and looks at tokens once every `check_every` steps; nothing else waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kforcing.attention.reader import check_backbone
from kforcing.coupling import COUPLINGS
from kforcing.cpu.products import MOST_ROWS
from kforcing.engine.config import (
    EngineConfig,
    EngineStats,
    check_acceptance,
    check_config,
    checked_ar_k,
    checked_k,
    checked_length,
    context_limit,
)
from kforcing.engine.graphs import Graphs, cuda_capture
from kforcing.engine.linear import can_use_kernel, row_copy
from kforcing.engine.prefix_cache import BLOCK, PrefixCache
from kforcing.engine.request import Completion, DraftCounts, Output, Request, SamplingParams, TokenLogprobs
from kforcing.engine.runner import ModelRunner, StepShape
from kforcing.engine.scheduler import Move, Scheduler, Sequence
from kforcing.engine.width import WidthChooser
from kforcing.readout.base import as_student


class Engine:
    """Decodes any number of requests with one model. It is not thread-safe: one owner calls `submit`, `step` and `cancel`.

    Args:
        model: a push-forward student, or a causal LM of transformers for AR decoding. It stays on its device and in its
            dtype. Later changes of its weights may go unnoticed.
    Raises:
        ValueError: for a config that the model cannot serve.
    """

    def __init__(self, model: nn.Module, config: EngineConfig | None = None):
        config = config or EngineConfig()
        self.k, self.max_model_len = checked_sizes(model.eval(), config)
        student = as_student(model)
        backbone: Any = student.backbone if student else model
        cuda = backbone.device.type == "cuda"
        self.check_every = (8 if cuda else 1) if config.check_every is None else config.check_every
        model, drafter = _prepared(model, config)
        self.model, self.config, self.student = model, config, as_student(model)
        self.runner = ModelRunner(
            model,
            config.max_num_seqs,
            self.max_model_len,
            self.k,
            COUPLINGS[config.coupling],
            config.compiled,
            config.context_ngram,
            drafter,
        )
        self.vocabulary = self.runner.sampler.vocabulary
        graphs = cuda if config.graphs is None else config.graphs
        if graphs and not cuda:
            raise ValueError("graphs=True needs a model on a GPU; leave graphs out")
        self._device: AbstractContextManager[Any] = torch.cuda.device(backbone.device) if cuda else nullcontext()
        with self._device:
            self._step: Any = Graphs(self.runner, cuda_capture()) if graphs else self.runner.step
        self._buckets = cuda
        self.stats = EngineStats()
        self.widths = WidthChooser(self.k, 1 + config.context_ngram)
        self.scheduler = Scheduler(
            config.max_num_seqs, config.max_num_batched_tokens, one_by_one=config.batch_invariant
        )
        self.prefixes = PrefixCache(
            self.runner.cache,
            config.prefix_cache_mb << 20,
            config.max_num_batched_tokens if config.batch_invariant else BLOCK,  # whole chunks keep their shapes
            config.prefix_cache_device,
        )
        self._outputs: dict[int, deque[Output]] = {}
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.scheduler.idle

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises ValueError for what the model or the engine cannot do."""
        k, limit = self.check(request)
        exact = (request.acceptance or self.config.acceptance) == "exact"
        sequence = Sequence(self._next_id, request, k, limit, exact, tail=self.k)
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence.id

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
        if request.grammar and not request.grammar.eos_ids <= request.stop_ids:
            raise ValueError("ignore_eos=True: a structured output ends with EOS; leave ignore_eos out")
        acceptance = request.acceptance or self.config.acceptance
        check_acceptance(acceptance, self.student)
        k = checked_k(request.k, self.k if self.student or acceptance == "exact" else 1)
        request.sampling.check()
        self._check_sampling(request.sampling)
        wrong = next((id for id in request.sampling.logit_bias if not 0 <= id < self.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"logit_bias of token {wrong}, which is outside the vocabulary of {self.vocabulary}")
        return k, new or self.max_model_len - N

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if self.student is None or self.student.design.conditional:
            return
        for name, n in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
            if n is not None:
                raise ValueError(
                    f"{name}={n}: this student's noise picks tokens inside the network, so tokens have no "
                    "probabilities; leave it out or use a sequential student or the AR model"
                )
        if sampling.filters:
            raise ValueError(
                f"top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p}: this student's noise picks tokens "
                "inside the network, so there is no distribution to cut; leave them at their defaults or use a sequential "
                "student or the AR model"
            )
        noise = self.student.design.noise
        if not noise.temperature_min <= sampling.temperature <= noise.temperature_max:
            raise ValueError(
                f"temperature={sampling.temperature} asked of a student trained for {noise.temperature_min} to "
                f"{noise.temperature_max}"
            )

    def cancel(self, id: int) -> None:
        """Cancel a request. Its slot is free at the next step, and it gets no further output. Unknown ids are ignored."""
        self.scheduler.cancel(id)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Admit requests, read a chunk of their prompts, advance those that run, and return what became final."""
        with self._device:
            self._apply(self.scheduler.drop_cancelled())
            for sequence in self.scheduler.admit(self._cached):
                self.runner.load(sequence.slot, sequence.request.prompt)
                if sequence.cached:
                    self.prefixes.restore(sequence.slot, sequence.request.prompt, sequence.cached)
                    self.stats.cached_tokens += sequence.cached
            for _ in range(self.check_every):
                self._prefill()
            outputs = self._decode() if self.scheduler.running else []
        for output in outputs:
            if output.finish_reason:
                self.scheduler.live.discard(output.id)
            if output.id in self._outputs:
                self._outputs[output.id].append(output)
        return outputs

    def generate(self, requests: Several[Request]) -> list[Completion]:
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

        Several streams may be open at the same time: each step advances them all.
        """
        return self._follow(self._open(request))

    def _open(self, request: Request) -> int:
        id = self.submit(request)
        self._outputs[id] = deque()
        return id

    def _follow(self, id: int) -> Iterator[Output]:
        outputs = self._outputs[id]
        try:
            while id in self.scheduler.live or outputs:
                if outputs:
                    yield outputs.popleft()
                else:
                    self.step()
        finally:
            del self._outputs[id]
            self.cancel(id)

    def _apply(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self.runner.move(*move)

    def _cached(self, sequence: Sequence) -> int:
        """Tokens of a prompt that need not be read; log-probabilities of a prompt need all of them."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return 0
        return self.prefixes.match(sequence.request.prompt, sequence.to_fill)

    def _prefill(self) -> None:
        """Read a chunk of the prompts, and start the sequences whose prompt was read."""
        self._start_ready()
        chunk = self.scheduler.next_chunk()
        if chunk:
            states_RLD = self.runner.prefill(*chunk)
            for sequence in self.scheduler.prefilling:
                self._score_prompt(sequence, states_RLD[sequence.slot - chunk.slots.start])
            self.stats.prefill_tokens += self.scheduler.was_read(chunk)
            self._start_ready()

    def _score_prompt(self, sequence: Sequence, states_LD: Tensor) -> None:
        """Take the log-probabilities of prompt tokens, if asked for, from the states of those behind `sequence.filled`."""
        n, left = sequence.request.sampling.prompt_logprobs, len(sequence.request.prompt) - 1 - sequence.filled
        if n is not None and left > 0:
            records = self.runner.score_prompt(sequence.slot, sequence.filled, states_LD[:left], n)
            sequence.prompt_logprobs += [_token_logprobs(record, n) for record in records.tolist()]

    def _score_tail(self, sequence: Sequence) -> None:
        """The same for the last tokens of the prompt, which the first step would read; it reads them once more."""
        left = len(sequence.request.prompt) - 1 - sequence.filled
        if sequence.request.sampling.prompt_logprobs is not None and left > 0:
            slots = slice(sequence.slot, sequence.slot + 1)
            self._score_prompt(sequence, self.runner.prefill(slots, sequence.filled, left)[0])

    def _start_ready(self) -> None:
        while ready := self.scheduler.next_ready():
            sequence, move = ready
            if move:
                self.runner.move(*move)
            self.prefixes.keep(sequence.slot, sequence.request.prompt, sequence.to_fill)
            self._score_tail(sequence)
            self.runner.start(sequence.slot, sequence.request, sequence.k, sequence.exact)
            self._apply(self.scheduler.drop_cancelled())

    def _decode(self) -> list[Output]:
        """`check_every` steps of the running sequences."""
        running = list(self.scheduler.running)
        self.runner.constraints.keep(len(running))
        step = self.runner.step if any(s.request.grammar for s in running) else self._step  # a grammar runs on the host
        width, read = self._width(running)
        began, slow = time.perf_counter(), self._slow_steps
        lengths = [s.length for s in running]
        steps, shapes = [], []
        for ahead in range(self.check_every):
            shapes.append(self._shape(running, lengths, width, read, ahead))
            steps.append(step(shapes[-1])[: len(running)])
            for sequence in running:
                sequence.made_block(min(sequence.k, width))
        made_RSX = torch.stack(steps, dim=1)
        made, bits_RSX = made_RSX[:, :, : 4 + self.k].tolist(), made_RSX[:, :, 4 + self.k :].contiguous()
        record = bits_RSX.shape[2] // self.k  # numbers for each token, 0 where no sequence asks for log-probabilities
        records = bits_RSX.view(torch.float64).unflatten(2, (self.k, record)).tolist()
        size = width if self.student else shapes[0].read
        typical = step == self._step and slow == self._slow_steps
        if typical and all(shape.read == size and (shape.verify or size == 1) for shape in shapes):
            self.widths.step(len(running), size, (time.perf_counter() - began) / len(steps))
        self.stats.steps += len(steps)
        self.stats.slot_steps += len(steps) * len(running)
        self.stats.widths[size] = self.stats.widths.get(size, 0) + len(steps)
        outputs = [self._finish(*each) for each in zip(running, made, records, strict=True)]
        self._apply(self.scheduler.leave([s for s, o in zip(running, outputs, strict=True) if o.finish_reason]))
        return outputs

    @property
    def _slow_steps(self) -> int:
        """How many steps took longer than a replay of their graph does."""
        return self._step.uses.total() if isinstance(self._step, Graphs) else 0

    def _width(self, running: list[Sequence]) -> tuple[int, int]:
        """How many tokens the next block has, and how many tokens the next step reads at most.

        A block has what fixed sequences ask for, and what brings most to exact ones. A student's drafts cost most where they
        are made and an AR model's, which come from the context, where they are read.
        """
        most = max(s.k for s in running)
        if self.config.batch_invariant:
            return self.k, self.k
        if not self.config.adapt_width or not any(s.exact for s in running):
            return most, self.k
        if self.student:
            least = max((s.k for s in running if not s.exact), default=1)
            return self.widths.choose([(s.source, s.k - 1) for s in running], least, most), self.k
        least = max(s.unread - s.drafts for s in running)
        return most, self.widths.choose([(s.source, s.drafts) for s in running], least, max(s.unread for s in running))

    def _shape(self, running: list[Sequence], lengths: list[int], width: int, read: int, ahead: int) -> StepShape:
        """The shape of the step that comes `ahead` steps after the known lengths."""
        n, most = len(running), self.runner.cache.columns
        plain = all(s.request.plain for s in running)
        asked = [s.request.sampling.logprobs for s in running]
        logprobs = max((n for n in asked if n is not None), default=None)
        context = self.config.context_ngram > 0 and any(s.exact and s.k > 1 for s in running)
        if self.config.batch_invariant:
            verify = self.k > 1 and (self.student is None or self.student.design.exact_trunk)
            return StepShape(self.config.max_num_seqs, most, self.k, self.k, plain, verify, context, logprobs=logprobs)
        read = min(read, max(s.unread for s in running))
        verify = read > 1 and any(s.drafts for s in running)
        # A step brings as many tokens as the block before was long, which may be more than `width`.
        used = min(max(lengths) + ahead * self.k, self.max_model_len - 1)
        hints = width if self.student and (width > 1 or self.runner.has_hints) else 0
        columns = min(used + hints + (self.k if verify else 0), most)
        if self._buckets:
            n = min(_power_of_two(n), self.config.max_num_seqs)
            return StepShape(
                n, min(_power_of_two(columns, 256), most), read, width, plain, verify, context, logprobs=logprobs
            )
        rows = n * max(1, width - 1)
        light = self.runner.drafter is not None and all(s.exact for s in running) and rows <= MOST_ROWS
        unfiltered = light and logprobs is None and all(s.request.unfiltered for s in running)
        known = ahead == 0 or self.k == 1  # the lengths at this step
        alike = read == 1 and not hints and not verify and known and min(lengths) == max(lengths)
        return StepShape(n, columns, read, width, plain, verify, context, not alike, logprobs, light, unfiltered)

    def _count_drafts(self, sequence: Sequence, verified: int, accepted: int) -> None:
        """Note that a step verified so many drafts of a sequence, and how many of them it accepted."""
        self.stats.count_block(verified, accepted)
        sequence.counts.count_block(verified, accepted)
        self.widths.block(verified, accepted, sequence.source)
        if verified and sequence.source:
            self.stats.context_drafted += verified
            self.stats.context_accepted += accepted

    def _finish(self, sequence: Sequence, made: list[list[int]], records: list[list[list[float]]]) -> Output:
        """Take over the tokens that became final in some steps, cut at the first stop id or the limit."""
        tokens, logprobs = [], []
        most = sequence.request.sampling.logprobs
        for (new, verified, source, drafts, *final), step_records in zip(made, records, strict=True):
            self._count_drafts(sequence, verified, accepted=new - 1)
            sequence.saw_block(source, drafts)
            tokens += final[:new]
            if most is not None:
                logprobs += [_token_logprobs(record, most) for record in step_records[:new]]
        sequence.steps += len(made)
        room = sequence.limit - len(sequence.new)
        stops = sequence.request.stop_ids
        at, stop = next(((i, t) for i, t in enumerate(tokens[:room]) if t in stops), (None, None))
        kept = tokens[: room if at is None else at]
        sequence.new += kept
        self.stats.tokens += len(kept)
        self.stats.discarded += len(tokens) - len(kept)
        reason = "stop" if at is not None else "length" if len(sequence.new) >= sequence.limit else None
        entries = None if most is None else logprobs[: len(kept)]
        scored, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        first = sequence.steps == len(made) and sequence.request.sampling.prompt_logprobs is not None
        # A copy: the reader may be another thread, and the next step changes the counts.
        counts = DraftCounts(list(sequence.counts.drafted), list(sequence.counts.accepted))
        prompt = scored if first else None
        return Output(sequence.id, kept, reason, stop, sequence.steps, entries, counts, sequence.cached, prompt)


def checked_sizes(model: nn.Module, config: EngineConfig) -> tuple[int, int]:
    """The k and the longest sequence of an engine; raises ValueError for a config that the model cannot serve.

    The model may be on torch's meta device. What only a forward pass shows about an AR model is then not checked;
    `kforcing.families.find_obstacle` tries a tiny copy.
    """
    student = as_student(model)
    backbone: Any = student.backbone if student else model
    if not student and backbone.device.type != "meta":
        check_backbone(backbone)
    k = checked_k(config.k, student.k) if student else checked_ar_k(config)
    max_model_len = checked_length(config.max_model_len, context_limit(backbone.config), k)
    check_config(config, student)
    return k, max_model_len


def _prepared(model: nn.Module, config: EngineConfig) -> tuple[nn.Module, nn.Module | None]:
    """The model with the linear maps that the settings ask for, and a light read-out for drafts that are verified, if any.

    Raises ValueError where the model cannot have them.
    """
    possible = can_use_kernel(model) and not config.compiled
    kernel = possible if config.row_kernel is None else config.row_kernel
    student = as_student(model)
    drafts = student is not None and student.design.exact_trunk and config.k != 1 and not config.batch_invariant
    if config.int8_drafts and not (possible and kernel and drafts):
        raise ValueError(
            "int8_drafts=True needs a sequential student with a frozen trunk and k above 1, the kernel of CPUs, and "
            "batch_invariant=False; leave it out"
        )
    wanted = "row_kernel=True" if config.row_kernel else f"quantization={config.quantization}"
    if (config.row_kernel or config.quantization) and not possible:
        raise ValueError(
            f"{wanted} needs a model in fp32 or bf16 on a CPU under Linux, compiled=False, and the package llvmlite "
            "(pip install 'kforcing[cpu]'); leave it out or provide these"
        )
    if not kernel:
        return model, None
    light = config.acceptance == "exact" if config.int8_drafts is None else config.int8_drafts
    light = light and drafts and config.quantization is None  # else the whole model has such weights already
    drafter = row_copy(student.readout, int8=True) if light and student else None
    return row_copy(model, int8=config.quantization == "int8"), drafter


def _completion(outputs: list[Output]) -> Completion:
    tokens = [token for output in outputs for token in output.tokens]
    if not outputs:
        return Completion(tokens, "cancelled")
    last = outputs[-1]
    logprobs = None if last.logprobs is None else [entry for output in outputs for entry in output.logprobs or ()]
    reason, prompt_logprobs = last.finish_reason or "cancelled", outputs[0].prompt_logprobs
    return Completion(tokens, reason, last.stop_id, last.steps, logprobs, last.drafts, last.cached, prompt_logprobs)


def _token_logprobs(record: list[float], n: int) -> TokenLogprobs:
    """A row of `log_probabilities` with the n likeliest tokens of those that it has."""
    own, *rest = record
    half = len(rest) // 2
    return TokenLogprobs(own, {int(id): logprob for id, logprob in zip(rest[half:][:n], rest, strict=False)})


def _power_of_two(n: int, least: int = 1) -> int:
    while least < n:
        least *= 2
    return least

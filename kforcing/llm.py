"""`LLM`: prompts in, texts out, over the decode engine; the interface of vLLM's class of the same name.

from kforcing import LLM, SamplingParams
answers = LLM("runs/quickstart/k4").generate(["Fellow citizens"], SamplingParams(max_tokens=64, seed=0))
print(answers[0].outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kforcing import engine
from kforcing.detokenizer import Detokenizer, TextStream
from kforcing.engine import DraftCounts, Engine, EngineConfig, Request, TokenLogprobs
from kforcing.loading import eos_token_ids, load_model, load_tokenizer, saved_generation_config
from kforcing.noise import choice_seed
from kforcing.prompts import prompt_ids
from kforcing.remote import fetch
from kforcing.structured import Grammars, StructuredOutputs

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class SamplingParams(engine.SamplingParams):
    """How each prompt is continued. The fields beyond the engine's own say how long, how often and from which noise."""

    max_tokens: int | None = 16
    """Tokens returned at most for each choice; None for as many as the context holds."""
    n: int = 1
    """Choices for each prompt."""
    seed: int | None = None
    """Makes the text repeatable; None draws a seed from torch's global generator."""
    stop: str | Sequence[str] = ()
    """Stop strings. The text ends before the first of them."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the text, beside the model's own EOS ids."""
    ignore_eos: bool = False
    """Go on after the model's EOS ids."""
    k: int | None = None
    """Tokens a step at most; None for the engine's k."""
    acceptance: str | None = None
    """`exact` or `fixed` (see `kforcing.engine.Request`); None for the engine's mode."""
    structured_outputs: StructuredOutputs | None = None
    """The form of the text, for example `StructuredOutputs(json=schema)`."""

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        super().check()
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        if any(not stop for stop in self.stop_strings):
            raise ValueError("stop contains an empty string, which would end every text at once; leave it out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """The tokens up to the stop, without it."""
    finish_reason: str | None = None
    """`stop` for EOS, a stop id or a stop string, `length` for the token limit."""
    stop_reason: str | int | None = None
    """The stop string or the token id that ended the text."""
    steps: int = 0
    """Forward passes that the continuation took."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of `token_ids`, if `SamplingParams.logprobs` asked for them."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One entry for each token of the prompt from the second on, if `SamplingParams.prompt_logprobs` asked for them."""
    drafts: DraftCounts = field(default_factory=DraftCounts)
    """Exact mode: the drafts that were verified and accepted, by their offset in a block."""

    @property
    def tokens_a_step(self) -> float:
        """Tokens for each forward pass; 0 before the first."""
        return len(self.token_ids) / self.steps if self.steps else 0.0


@dataclass
class RequestOutput:
    """A prompt and its continuations."""

    prompt: str | None
    """None for a prompt that was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """A model and its tokenizer, ready to continue prompts.

    Args:
        model: the directory of a student or of a causal LM of transformers, its URI in object storage (see
            `kforcing.remote`), or such a model itself.
        tokenizer: a tokenizer of transformers; None takes the one in the model's directory.
        device: torch's name of a device; None takes a GPU where there is one. For a directory only.
        dtype: `fp32` or `bf16`; None takes the saved one. For a directory only.
        options: fields of `EngineConfig`, for example `max_num_seqs=32` or `acceptance="exact"`.
    Raises:
        ValueError: for an unknown option, or a model without a tokenizer.
        FileNotFoundError: when the directory holds no model or no tokenizer.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ):
        unknown = [name for name in options if name not in EngineConfig.__dataclass_fields__]
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; there are {', '.join(EngineConfig.__dataclass_fields__)}")
        if tokenizer is None and isinstance(model, nn.Module):
            raise ValueError("a model that is given as an object needs tokenizer=…")
        model = model if isinstance(model, nn.Module) else fetch(model)
        self.tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer  # type: ignore[arg-type]
        self.detokenizer = Detokenizer(self.tokenizer)
        loaded: Any = model if isinstance(model, nn.Module) else load_model(model, device, dtype)
        self.engine = Engine(loaded, EngineConfig(**options))
        config = loaded.generation_config if isinstance(model, nn.Module) else saved_generation_config(model)
        self.eos_ids = eos_token_ids(config, self.tokenizer, self.engine.vocabulary)
        self.grammars = Grammars(self.tokenizer, self.engine.vocabulary, self.eos_ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts: texts, lists of token ids, or several of either. The answers come in their order.

        Args:
            sampling_params: one for all prompts or one for each.
        Raises:
            ValueError: names the prompt that cannot be served, before any is begun.
        """
        several = _as_list(prompts)
        params = sampling_params or SamplingParams()
        each = [params] * len(several) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise ValueError(f"{len(each)} sampling params for {len(several)} prompts; give one, or one for each")
        answers, requests = [], []
        for number, (prompt, chosen) in enumerate(zip(several, each, strict=True), start=1):
            ids = prompt_ids(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
            answer = RequestOutput(prompt if isinstance(prompt, str) else None, ids, [])
            answers.append(answer)
            stops, special = self.detokenizer.split_stops(chosen.stop_strings)
            try:
                continuations = self._requests(ids, chosen, special)
                self.engine.check(continuations[0])
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            for request in continuations:
                answer.outputs.append(CompletionOutput(len(answer.outputs)))
                requests.append(
                    (request, answer.outputs[-1], TextStream(self.detokenizer, stops, ids, chosen.min_tokens))
                )
        self._run(requests)
        return answers

    def chat(
        self, messages: Sequence[dict[str, str]], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer a conversation of `{"role": …, "content": …}` turns. Raises ValueError without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; use generate")
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.generate([ids], sampling_params)

    def _requests(self, ids: list[int], params: SamplingParams, special_stops: Iterable[int]) -> list[Request]:
        seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        stop_ids = frozenset([*params.stop_token_ids, *special_stops])
        stop_ids |= frozenset() if params.ignore_eos else self.eos_ids
        grammar = self.grammars.compile(params.structured_outputs) if params.structured_outputs else None
        return [
            Request(
                ids, params.max_tokens, choice_seed(seed, i), stop_ids, params.k, params, params.acceptance, grammar
            )
            for i in range(max(params.n, 1))
        ]

    def _run(self, requests: list[tuple[Request, CompletionOutput, TextStream]]) -> None:
        """Run requests of the engine to their end, each into its output."""
        live = {self.engine.submit(request): (output, stream) for request, output, stream in requests}
        try:
            while live:
                for made in self.engine.step():
                    if made.id not in live:
                        continue
                    output, stream = live[made.id]
                    piece = stream.push(made.tokens)
                    output.text += piece.text
                    output.token_ids += made.tokens[: piece.tokens]
                    output.steps, output.drafts = made.steps, made.drafts
                    output.prompt_logprobs = output.prompt_logprobs or made.prompt_logprobs
                    if made.logprobs is not None:
                        output.logprobs = (output.logprobs or []) + made.logprobs[: piece.tokens]
                    if made.finish_reason and not piece.stopped:
                        piece = stream.flush()
                        output.text += piece.text
                    if piece.stopped:
                        output.finish_reason, output.stop_reason = "stop", stream.stop
                        self.engine.cancel(made.id)
                        del live[made.id]
                    elif made.finish_reason:
                        output.finish_reason, output.stop_reason = made.finish_reason, made.stop_id
                        del live[made.id]
        finally:
            for id in live:
                self.engine.cancel(id)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]

"""One choice of a request: what its steps add to the answer, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass

from kforcing.detokenizer import Piece, TextStream
from kforcing.engine import Output, Request
from serve.engine_requests import Choices
from serve.protocol.logprobs import Scored
from serve.protocol.responses import Progress
from serve.tool_calls import CallDelta, Delta


@dataclass(frozen=True)
class ChoiceDelta:
    """What one step added to one choice of a request."""

    index: int
    """Of the choice."""
    parts: list[Delta]
    """Text and pieces of calls in their order; none while the detokenizer holds text back. The first has the prompt before
    it, if that is echoed."""
    progress: Progress
    """Of the choice so far."""
    finish: str | None
    """`stop`, `length` or `tool_calls` for the last one."""
    stop: str | int | None
    """The stop string or stop token id that ended it."""
    stamp: float
    """`time.perf_counter` at the end of the step."""
    scored: list[Scored] | None
    """The tokens with their log-probabilities, if they were asked for; first those of a prompt that is echoed."""

    @property
    def text(self) -> str:
        """What was added to the text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallDelta]:
        """What was added to calls of tools, which are no part of the text."""
        return [part for part in self.parts if not isinstance(part, str)]


class ChoiceReader:
    """Reads the engine's outputs of one choice as deltas.

    Args:
        index: of the choice among those of `asked`.
        eos: ids whose occurrence needs no mention as what stopped the text.
    """

    def __init__(self, index: int, asked: Choices, eos: frozenset[int]):
        self.index, self.asked, self.eos = index, asked, eos
        self.request: Request = asked.requests[index]
        self.text = TextStream(
            asked.detokenizer, asked.stops, self.request.prompt, asked.min_tokens, asked.include_stop
        )
        self.tools = asked.tools.stream() if asked.tools else None
        self.tokens = 0
        self.begun: float | None = None
        """When the first tokens were read (`time.perf_counter`)."""
        self._echo = asked.echo[index] if asked.echo else ""

    def read(self, output: Output, stamp: float) -> ChoiceDelta:
        """The next delta."""
        piece = Piece("", 0, False) if self.asked.silent else self.text.push(output.tokens)
        if output.finish_reason and not piece.stopped:  # what was held back may contain a stop string too
            last = self.text.flush()
            piece = piece._replace(text=piece.text + last.text, stopped=last.stopped)
        self.tokens += piece.tokens
        finish, stop = self._end(output, piece.stopped)
        special = str(stop) if self.asked.include_stop and isinstance(stop, str) and not piece.stopped else ""
        text, self._echo = self._echo + piece.text + special, ""
        parts: list[Delta] = [text] if text else []
        if self.tools:
            parts = self.tools.push(text, last=finish is not None)
            if self.tools.calls and finish == "stop" and self.asked.tools and not self.asked.tools.named:
                finish = "tool_calls"
        drafts = output.drafts
        progress = Progress(self.tokens, output.steps, sum(drafts.drafted), sum(drafts.accepted), output.cached)
        return ChoiceDelta(self.index, parts, progress, finish, stop, stamp, self._scored(output, piece.tokens))

    def _end(self, output: Output, stopped: bool) -> tuple[str | None, str | int | None]:
        """The finish reason, and what stopped the text: a stop string or the id of a stop token that is not EOS."""
        if self.asked.silent:
            return "length", None
        if stopped:
            return "stop", self.text.stop
        if output.stop_id in self.asked.special_stops:
            return "stop", self.asked.special_stops[output.stop_id]
        return output.finish_reason, None if output.stop_id in self.eos else output.stop_id

    def _scored(self, output: Output, tokens: int) -> list[Scored] | None:
        """The tokens of an output that count, with their log-probabilities; before them those of a prompt."""
        if output.logprobs is None:
            return None
        scored: list[Scored] = []
        if output.prompt_logprobs is not None:
            scored += zip(self.request.prompt, [None, *output.prompt_logprobs], strict=True)
        return scored + list(zip(output.tokens, output.logprobs, strict=True))[:tokens]

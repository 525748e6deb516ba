"""The width of a step in exact mode: how many tokens a block should have, given what steps cost and what drafts bring.

A step of width w brings 1 + Σ a_j tokens a request, where a_j is the share of blocks in which drafts 1 … j were accepted, and
takes the time that the last steps of this width took with about as many requests. The width with the most tokens a second is
taken, unless the narrowest one is nearly as fast. Under load a step is bound by arithmetic and drafts cost more than they
bring, so the width falls to 1, which is AR decoding. The text does not depend on the widths, so they may change with every
step. Drafts of different sources are accepted more or less often, and a request whose context has no drafts has none, so
each request counts with the drafts that it has.
"""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

FIRST_LOOK = 2
"""Steps of each width that are timed before the first choice."""
LOOK_SOON = 32
"""Steps after which a width that was not chosen is timed again, for one step. They double with each time, up to `LOOK_AGAIN`:
one step may have been slow by chance, and several seldom are."""
LOOK_AGAIN = 128
"""The most steps after which a width that was not chosen is timed again, unless that costs more than `LOOK_COST`."""
LOOK_COST = 0.01
"""The share of the time that looks at a width may cost: in a large batch a wide step takes as long as several narrow ones."""
STALE = 16
"""Steps of other widths after which a width's former times are forgotten when it is timed again: other work on the machine
may have begun or ended since."""
GAIN = 1.03
"""A wider block is taken only if its tokens a second are more than this times those of the narrowest one, because the
acceptance of drafts is an estimate."""
STEP_MEMORY = 5
"""Steps of a width whose median is its time. A step that something else has held up does not move it."""
BLOCK_MEMORY = 0.01
"""Weight of the newest block in the running acceptance."""
ENOUGH_BLOCKS = 500
"""Verified blocks after which acceptance is judged."""


@dataclass
class _Timing:
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=STEP_MEMORY))
    steps: int = 0
    last: int = 0
    """The number of the newest observation, counted over all widths."""
    lost: float = 0.0
    """What that step lost against one of the best width, in steps of the best width."""

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return statistics.median(self.recent)


class WidthChooser:
    """Chooses among widths 1 … k.

    Args:
        k: the largest width.
        sources: sources of drafts, whose acceptances differ.
    """

    def __init__(self, k: int, sources: int = 1):
        self.k = k
        self.acceptance = [[0.5**j for j in range(1, k)] for _ in range(sources)]
        """For each source and draft of a block, the running share of blocks in which it and all before it were accepted."""
        self._blocks = [0] * sources
        self._observations = 0
        self._timings: dict[tuple[int, int], _Timing] = defaultdict(_Timing)

    def block(self, drafted: int, accepted: int, source: int = 0) -> None:
        """Note that of so many drafts of a block the first `accepted` were kept."""
        if not drafted:
            return
        self._blocks[source] += 1
        weight = max(BLOCK_MEMORY, 1 / (1 + self._blocks[source]))
        for j in range(drafted):
            self.acceptance[source][j] += weight * ((j < accepted) - self.acceptance[source][j])
        if not source and self._blocks[source] == ENOUGH_BLOCKS:
            self._judge()

    def step(self, requests: int, width: int, seconds: float) -> None:
        """Note the seconds of a step of this width."""
        timing = self._timings[_bucket(requests), width]
        self._observations += 1
        # The first step of a shape chooses kernels and is not typical.
        if timing.steps == 1 or self._observations - timing.last > STALE:
            timing.recent.clear()
        timing.recent.append(seconds)
        timing.steps += 1
        timing.last = self._observations

    def choose(self, drafts: Sequence[tuple[int, int]], least: int, most: int) -> int:
        """The width of the next step, from `least` to `most`.

        Args:
            drafts: for each request the source of its drafts, and how many it has at most.
        """
        if least >= most:
            return most
        bucket, widths = _bucket(len(drafts)), range(least, most + 1)
        timings = {width: self._timings[bucket, width] for width in widths}
        for width in reversed(widths):
            if timings[width].steps < FIRST_LOOK:
                return width
        speeds = {width: self.tokens(drafts, width) / timings[width].seconds for width in widths}
        best = max(widths, key=speeds.__getitem__)
        for width, timing in timings.items():
            again = min(LOOK_AGAIN, LOOK_SOON << min(timing.steps - FIRST_LOOK, 8))
            if timing.last == self._observations:  # later, the best width may have other times
                timing.lost = timing.seconds / timings[best].seconds * (1 - speeds[width] / speeds[best])
            if self._observations - timing.last > max(again, timing.lost / LOOK_COST):
                return width
        return best if speeds[best] > GAIN * speeds[least] else least

    def tokens(self, drafts: Sequence[tuple[int, int]], width: int) -> float:
        """The expected tokens of a step of this width, for all requests together."""
        return sum(1 + sum(self.acceptance[source][: min(most, width - 1)]) for source, most in drafts)

    def _judge(self) -> None:
        first = self.acceptance[0][0]
        if first < 0.2:
            logger.warning(
                "only %.0f%% of the first drafts equal the AR model's token: drafts hardly pay. Train the student longer, "
                "or on text like the one that is served; the text itself is not affected",
                100 * first,
            )
        elif first > 0.999:
            logger.warning(
                "every draft equals the AR model's token, which is suspicious unless the text repeats itself: check that the "
                "student was not compared with itself"
            )


def _bucket(requests: int) -> int:
    """Numbers of requests whose steps are taken to cost the same: powers of two."""
    return 1 << (requests - 1).bit_length()

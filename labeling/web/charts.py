"""Geometry of the small figures; the templates draw it as inline SVG.

Positions are percentages of a drawing's width or height, so that figures fit any screen while text
and dots keep their size.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from discovery.records import Comparison, Effect, Score
from labeling.summary import CONTROLS, METHODS

AUROC_LOW, AUROC_HIGH = 0.3, 1.0


class Scale(NamedTuple):
    """A linear axis from `low` (0 %) to `high` (100 %); values beyond are drawn at its end."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Position of a value, 0 to 1 (0 for nan)."""
        if math.isnan(value):
            return 0.0
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def at(self, value: float) -> str:
        """Distance from the left, or the length of a bar that starts there.

        >>> Scale(0.0, 2.0).at(0.5)
        '25.0%'
        """
        return f"{100 * self.share(value):.1f}%"

    def down(self, value: float) -> str:
        """Distance from the top of a value on an upright axis."""
        return f"{100 * (1 - self.share(value)):.1f}%"

    def width(self, low: float, high: float) -> str:
        """Length of the stretch between two values."""
        return f"{100 * max(0.0, self.share(high) - self.share(low)):.1f}%"

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on the axis, at most `most`.

        >>> Scale(0.3, 1.0).ticks()
        [0.4, 0.6, 0.8, 1.0]
        """
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(s * power for s in (1, 2, 5, 10, 20) if span / (s * power) <= most - 1)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


AUROC = Scale(AUROC_LOW, AUROC_HIGH)


def around(values: Iterable[float], *, margin: float = 0.06) -> Scale:
    """A scale that holds 0 and every finite value, with a margin."""
    finite = [0.0, *(v for v in values if math.isfinite(v))]
    low, high = min(finite), max(finite)
    room = margin * (high - low) or 1.0
    return Scale(low - room if low < 0 else low, high + room)


class MethodRow(NamedTuple):
    """The scores of one method, by set."""

    method: str
    scores: list[Score]


SETS = ("selection", "confirmation")  # a concept's few situations decide nothing alone


def method_rows(scores: Sequence[Score], *, crossfit: bool = False) -> list[MethodRow]:
    """Scores on the two sets by method: ours, baselines, controls; the selection set first.

    What is not defined (of a concept with too few texts) is left out.

    Args:
        crossfit: there is one corpus only, whose cross-fitted figures stand for both sets.
    """
    sets = SETS[:1] if crossfit else SETS
    shown = [s for s in scores if s.set in sets and math.isfinite(s.auroc)]
    order = (*METHODS, *CONTROLS)
    methods = sorted({s.method for s in shown}, key=lambda m: (_place(order, m), m))
    return [
        MethodRow(m, sorted((s for s in shown if s.method == m), key=lambda s: SETS.index(s.set)))
        for m in methods
    ]


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


class DosePlot(NamedTuple):
    """Effect against dose: the axes, and for each condition its points by dose."""

    dose: Scale
    effect: Scale
    series: list[tuple[str, list[Effect]]]


def dose_plot(effects: Sequence[Effect]) -> DosePlot | None:
    """The dose-response curves of one concept; None without effects."""
    if not effects:
        return None
    conditions = [
        c for c in ("random", "vector", "feature") if any(e.condition == c for e in effects)
    ]
    return DosePlot(
        around(e.dose for e in effects),
        around(v for e in effects for v in (e.low, e.delta_logprob, e.high)),
        [
            (c, sorted((e for e in effects if e.condition == c), key=lambda e: e.dose))
            for c in conditions
        ],
    )


def cosine_scale(c: Comparison) -> Scale:
    """A symmetric axis for everything that a comparison shows."""
    shown = (c.cosine, c.set_cosine, c.nearest_cosine, c.null_low, c.null_high, c.ceiling)
    most = max((abs(v) for v in shown if math.isfinite(v)), default=1.0)
    return Scale(-1.05 * (most or 1.0), 1.05 * (most or 1.0))


HEAT_LEVELS = 10


def heat(activation: float, scale: float) -> int:
    """Shade of a token: 0 where the feature is silent, up to `HEAT_LEVELS` at `scale`.

    >>> heat(0.0, 2.0), heat(0.01, 2.0), heat(2.0, 2.0)
    (0, 1, 10)
    """
    if not activation > 0 or not scale > 0:
        return 0
    return max(1, math.ceil(HEAT_LEVELS * min(1.0, activation / scale)))

"""The permutation distribution of rank sums within groups: exact where that is affordable.

numpy and scipy only.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special, stats

BUDGET = 2e7
"""Additions that an exact p-value may cost, less than a tenth of a second."""
STEPS = 64
"""Ranks are not rounded to a coarser grid than this, unless an approximation would be bad."""
FEW = 5
"""Expected positives that differ from the most frequent value: with fewer, sums are too discrete
for an approximation by a smooth distribution."""


class Group(NamedTuple):
    """The texts of one group, for a permutation test of the rank sum of its positives."""

    score: Int[np.ndarray, " texts"]
    """Twice the mid-rank, less that of the most frequent value."""
    chosen: Bool[np.ndarray, " texts"]


def p_value(groups: list[Group]) -> tuple[float, bool]:
    """One-sided p-value of the sum of the scores of the texts that were chosen.

    Returns:
        The p-value, and whether it is that of the permutation distribution itself.
    """
    grid = _grid(groups)
    if grid is None:
        return _approximate_p(groups), False
    return _exact_p(groups, grid), True


def _grid(groups: list[Group]) -> int | None:
    """The step to which scores must be rounded for an exact test that is affordable.

    Returns:
        1 where they need not be. None where the grid would have fewer than `STEPS` steps and enough
        texts are expected to differ from the most frequent value for an approximation.
    """
    if _few_sums(groups):
        return 1
    sampling, sums, widest = 0.0, 0.0, 1
    expected = np.zeros(2)
    for score, chosen in groups:
        n, m, others = len(score), int(chosen.sum()), int(np.count_nonzero(score))
        picks = min(m, n - m, others)
        width = int(score.max()) - int(score.min())
        sampling += others * picks * picks * width / 2
        sums += picks * width / 2
        widest = max(widest, width)
        expected += others / n * np.array([m, n - m])
    convolving = sums**2 if len(groups) > 1 else 0.0
    step = max(1, math.ceil(sampling / BUDGET), math.ceil(math.sqrt(convolving / BUDGET)))
    if step > 1 and widest < 2 * STEPS * step and expected.min() >= FEW:
        return None
    return min(step, widest)


def _few_sums(groups: list[Group]) -> bool:
    """Whether the sizes of the groups alone show that an exact test is affordable."""
    sampling = sums = 0
    for score, chosen in groups:
        n, m = len(score), int(np.count_nonzero(chosen))
        picks = min(m, n - m)  # of scores that are less than 2 n apart
        sampling += n * picks * picks * n
        sums += picks * n
    return sampling <= BUDGET and sums**2 <= BUDGET


def _exact_p(groups: list[Group], step: int) -> float:
    """P-value of the sum of the positives' scores, each in units of `step` and rounded."""
    observed, null = 0, list[np.ndarray]()
    for group in groups:
        score = group.score if step == 1 else np.rint(group.score / step).astype(np.int64)
        lowest, distribution = _sample_sum(score, int(np.count_nonzero(group.chosen)))
        observed += int(score[group.chosen].sum()) - lowest
        null.append(distribution)
    return _upper_tail(null, observed)


def _sample_sum(values: Int[np.ndarray, " n"], m: int) -> tuple[int, Float[np.ndarray, " sums"]]:
    """The sum of a random sample of m of the values, without replacement.

    A sample holds a hypergeometric number of the values that are not zero. Item i of the first i
    of these is in a random sample of j of them with probability j / i.

    Returns:
        The lowest sum, and the probabilities of that sum, one more, and so on.
    """
    n = len(values)
    if m == 1:
        lowest = values.min()
        return int(lowest), np.bincount(values - lowest) / n
    if m > n / 2:  # then the sum is all of them less a random sample of the others
        lowest, distribution = _sample_sum(values, n - m)
        return int(values.sum()) - lowest - len(distribution) + 1, distribution[::-1]
    base = min(0, int(values.min()))
    items = np.sort(values[values != 0]) - base
    most = min(m, len(items))
    if most == 0:
        return 0, np.ones(1)
    table = np.zeros((most + 1, most * int(items[-1]) + 1))
    table[0, 0] = 1
    j = np.arange(1, most + 1)[:, None]
    for i, value in enumerate(items, start=1):
        width = most * int(value) + 1  # no sum so far is larger
        taken = table[:-1, : width - value] * (np.minimum(j, i) / i)
        table[1:, :width] *= np.maximum(i - j, 0) / i
        table[1:, value:width] += taken
    counts = np.arange(most + 1)
    ways = [(len(items), counts), (n - len(items), m - counts), (n, m)]
    of_items, of_others, of_all = (_log_choose(total, some) for total, some in ways)
    share = np.exp(of_items + of_others - of_all)
    sums = np.zeros(table.shape[1] - most * base)
    for count in counts:
        start = (count - most) * base
        sums[start : start + table.shape[1]] += share[count] * table[count]
    return most * base, sums


def _log_choose(n: int, k: int | Int[np.ndarray, " k"]) -> Float[np.ndarray, "*k"]:
    """Logarithm of the number of ways to choose k of n; minus infinity where there is none."""
    possible = (np.asarray(k) >= 0) & (np.asarray(k) <= n)
    safe = np.where(possible, k, 0)
    ways = -special.betaln(safe + 1, n - safe + 1) - np.log(n + 1)
    return np.where(possible, ways, -np.inf)


def _upper_tail(distributions: list[np.ndarray], observed: int) -> float:
    """Probability that independent non-negative integers sum to at least `observed`."""
    half = len(distributions) // 2
    left = functools.reduce(np.convolve, distributions[:half], np.ones(1))
    right = functools.reduce(np.convolve, distributions[half:])
    tail = np.append(np.cumsum(right[::-1])[::-1], 0.0)
    needed = np.clip(observed - np.arange(len(left)), 0, len(right))
    return min(1.0, float(left @ tail[needed]))


def _approximate_p(groups: list[Group]) -> float:
    """Pearson type III p-value of the sum of the positives' scores, by its exact cumulants."""
    excess = variance = third = 0.0
    for score, chosen in groups:
        n, m = len(score), int(chosen.sum())
        centred: np.ndarray = score - score.mean()
        excess += float(centred[chosen].sum())
        variance += m * (n - m) / (n - 1) * float((centred**2).mean())
        skew = (n - 2 * m) / max(n - 2, 1)
        third += m * (n - m) / (n - 1) * skew * float((centred**3).mean())
    if variance == 0:
        return 1.0
    return float(stats.pearson3(third / variance**1.5).sf(excess / variance**0.5))

"""Exact p-values of rank statistics, intervals, false-discovery control and power.

numpy and scipy only.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special, stats

from discovery import permutation, resampling
from discovery.labels import Labels
from discovery.ranks import aurocs_by_group, members, midranks

FEW_UNITS = 5
"""With fewer units a bootstrap over units says nothing."""
FEW_TOPICS = 4
"""With fewer topics an interval is over texts."""


class RankTest(NamedTuple):
    """A within-group AUROC and the one-sided p-value that it is above one half."""

    auroc: float
    p: float
    exact: bool
    """Whether `p` is that of the permutation distribution itself, not of an approximation."""


def rank_test(
    values: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
) -> RankTest:
    """One-sided test that positives rank high within their groups.

    Under the null, the positives of each group are a random sample of its texts. The distribution
    of their rank sum, given the ties that are there, is convolved over groups (the stratified
    rank-sum test of van Elteren 1960, unweighted). Where groups have equal sizes and equal numbers
    of positives, the statistic is the mean within-group AUROC itself; elsewhere larger groups weigh
    more in `p` than in `auroc`.

    Where the convolution would cost more than `permutation.BUDGET`, ranks are first rounded to a
    grid of `permutation.STEPS` steps or more, which leaves the test exact, though of scores a
    little coarser than ranks. Beyond that, `p` is that of a Pearson type III distribution with the
    exact mean, variance and skewness of the permutation distribution (Mielke and Berry 2001): the
    normal approximation with van Elteren's tie correction, and its skewness, which few positives
    among many zeros need. Values that are all the same give an AUROC of 0.5 and p = 1.

    Raises:
        ValueError: no group holds both a positive and another text.
    """
    groups_used, aurocs = list[permutation.Group](), list[float]()
    twice = np.rint(2 * midranks(values, groups)).astype(np.int64) - 2
    for inside in members(groups):
        chosen = positive[inside]
        n, m = len(chosen), int(np.count_nonzero(chosen))
        if not 0 < m < n:
            continue
        doubled = twice[inside]
        aurocs.append((int(doubled[chosen].sum()) - m * (m - 1)) / (2 * m * (n - m)))
        most_frequent = np.bincount(doubled).argmax()
        groups_used.append(permutation.Group(doubled - most_frequent, chosen))
    if not groups_used:
        raise ValueError("no group holds both a positive and another text: nothing to test")
    p, exact = permutation.p_value(groups_used)
    return RankTest(float(np.mean(aurocs)), p, exact)


def benjamini_hochberg(
    p: Float[np.ndarray, " tests"], workers: int = 1
) -> Float[np.ndarray, " tests"]:
    """q-values: the false-discovery rate at which each test is first rejected.

    Benjamini and Hochberg 1995. A p-value of NaN is no test: its q-value is NaN. `workers` threads
    sort; the result is the same for any number of them.
    """
    missing = np.isnan(p)
    if missing.any():
        q = np.full(len(p), np.nan)
        q[~missing] = benjamini_hochberg(p[~missing], workers)
        return q
    order = _descending(p, workers)
    n = len(p)
    scaled = p[order]
    scaled *= n
    scaled /= np.arange(n, 0, -1)
    np.minimum.accumulate(scaled, out=scaled)
    q = np.empty(n)
    q[order] = np.minimum(scaled, 1.0, out=scaled)
    return q


def _descending(p: Float[np.ndarray, " n"], workers: int) -> Int[np.ndarray, " n"]:
    """The order of numbers from 0 to 1: millions sort faster in drawers that a cache holds."""
    drawers = min(max(1, len(p) >> 9), 1 << 16)
    drawer = np.minimum((1 - p) * drawers, drawers - 1).astype(np.uint16)
    order = np.argsort(drawer, kind="stable")  # a radix sort
    ends = [0, *np.cumsum(np.bincount(drawer, minlength=drawers)).tolist()]

    def tidy(some: range) -> None:
        for i in some:
            inside = order[ends[i] : ends[i + 1]]
            inside[:] = inside[np.argsort(p[inside])[::-1]]

    if workers == 1:
        tidy(range(drawers))
        return order
    cuts = np.searchsorted(ends, np.linspace(0, len(p), workers + 1)[1:-1]).tolist()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(tidy, map(range, [0, *cuts], [*cuts, drawers])))
    return order


class Interval(NamedTuple):
    """Means over groups, each with a 95 % confidence interval."""

    mean: Float[np.ndarray, " rows"]
    low: Float[np.ndarray, " rows"]
    high: Float[np.ndarray, " rows"]


def t_interval(
    values: Float[np.ndarray, "rows groups"], bounds: tuple[float, float] = (-1.0, 1.0)
) -> Interval:
    """Student's interval of the mean over groups, clipped to `bounds`; NaNs are left out.

    With fewer than two values nothing is known: the interval is `bounds`.
    """
    n = np.isfinite(values).sum(1)
    mean = np.where(n > 0, np.nansum(values, 1) / np.maximum(n, 1), np.nan)
    squares = np.nansum((values - mean[:, None]) ** 2, 1)
    df = np.maximum(n - 1, 1)
    error = np.sqrt(squares / df / np.maximum(n, 1))
    half = np.where(n > 1, stats.t.ppf(0.975, df) * error, np.inf)
    low, high = np.nan_to_num(mean) - half, np.nan_to_num(mean) + half
    return Interval(mean, np.maximum(low, bounds[0]), np.minimum(high, bounds[1]))


def auroc_interval(values: Float[np.ndarray, "rows groups"]) -> Interval:
    """Mean AUROC over groups, with a Student interval that holds near one as well.

    Percentiles near one are skewed, and the plain t interval over 12 of them covers 80 % at a true
    AUROC of .90 and 55 % at .98. One more group at chance, the device of Agresti and Coull (1998),
    brings coverage to about 95 % or more in simulations (`scripts/validate_discovery.py --only
    intervals`), at the price of width near one. The mean is that of the values alone.
    """
    mean = t_interval(values).mean
    chance = np.where(np.isfinite(values).any(1, keepdims=True), 0.5, np.nan)
    extended = t_interval(np.concatenate([values, chance], 1), bounds=(0.0, 1.0))
    return Interval(mean, extended.low, extended.high)


class Bounds(NamedTuple):
    """An AUROC with its 95 % confidence interval."""

    auroc: float
    low: float
    high: float


class Gap(NamedTuple):
    """The difference of two AUROCs with its 95 % confidence interval."""

    difference: float
    low: float
    high: float


class _Placements(NamedTuple):
    """Where each text stands among those of the other kind in its group (DeLong et al. 1988)."""

    auroc: float
    """Mean over groups that hold both kinds."""
    value: Float[np.ndarray, " texts"]
    """Of a positive: the share of its group's others below it, ties counting half. Of another text:
    the share of the positives above it. NaN in groups without both kinds."""
    weight: Float[np.ndarray, " texts"]
    """Of its placement in the mean: 1 / (groups, times texts of its kind in its group)."""
    centre: Float[np.ndarray, " texts"]
    """Of a positive the AUROC, of another text that of its group."""


def _placements(
    values: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
) -> _Placements:
    """Placements by mid-ranks in the group and within the kind (Sun and Xu 2014)."""
    value, weight, centre = (np.full(len(values), np.nan) for _ in range(3))
    aurocs: list[float] = []
    group = np.unique(groups, return_inverse=True)[1]
    beaten = midranks(values, group) - midranks(values, 2 * group + positive)
    for inside in members(group):
        own = positive[inside]
        above, below = inside[own], inside[~own]
        m, n = len(above), len(below)
        if not m or not n:
            continue
        value[above] = beaten[above] / n
        value[below] = 1 - beaten[below] / m
        weight[above], weight[below] = 1 / m, 1 / n
        aurocs.append(float(value[above].mean()))
        centre[below] = aurocs[-1]
    if not aurocs:
        raise ValueError("no group holds both a positive and another text: there is no AUROC")
    auroc = float(np.mean(aurocs))
    centre[positive] = auroc
    return _Placements(auroc, value, weight / len(aurocs), centre)


def _influence(
    at: _Placements, positive: Bool[np.ndarray, " texts"]
) -> Float[np.ndarray, " texts"]:
    """What each text adds to the error of the AUROC; the variance is the sum of the squares."""
    known = np.isfinite(at.value)
    result = np.where(known, at.weight * (at.value - at.centre), 0.0)
    for kind in (positive & known, ~positive & known):
        n = np.count_nonzero(kind)
        result[kind] *= (n / (n - 1)) ** 0.5 if n > 1 else 1.0
    return result


def influence(
    scores: Float[np.ndarray, "texts concepts"], labels: Labels
) -> Float[np.ndarray, "texts concepts"]:
    """What each text adds to the error of the AUROC of column c for concept c.

    DeLong et al. (1988), within topics, as in `delong_interval`: the variance is the sum of squares
    over texts. The influence on a difference of two methods, or on a mean over concepts, is the
    difference, or the mean, of theirs. Zero for a concept without an AUROC.
    """
    result = np.zeros(scores.shape)
    for c in np.flatnonzero(labels.compared() > 0):
        positive = labels.of(int(c))
        result[:, c] = _influence(_placements(scores[:, c], positive, labels.topics), positive)
    return result


def delong_interval(
    values: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
) -> Bounds:
    """Mean within-group AUROC with the interval of DeLong et al. (1988), stratified by group.

    In one group the variance is DeLong's. Over groups, positives vary about the mean over groups,
    so that one positive a group is enough; others vary about the AUROC of their group. One more
    positive and one more text of the other kind, both placed at chance, keep the interval honest
    near one (as in `auroc_interval`); quantiles are Student's, by the smaller kind.

    Raises:
        ValueError: no group holds both a positive and another text.
    """
    at = _placements(values, positive, groups)
    known = np.isfinite(at.value)
    m, n = np.count_nonzero(positive & known), np.count_nonzero(~positive & known)
    squares = _influence(at, positive) ** 2
    smaller = min(m, n)
    shrink = smaller / (smaller + 1)
    centre = shrink * at.auroc + (1 - shrink) * 0.5
    variance = shrink**2 * float(squares.sum())
    variance += shrink * (0.5 - at.auroc) ** 2 / (smaller + 1) / max(smaller, 1)
    half = float(stats.t.ppf(0.975, smaller)) * variance**0.5
    return Bounds(at.auroc, max(0.0, centre - half), min(1.0, centre + half))


def delong_difference(
    a: Float[np.ndarray, " texts"],
    b: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
) -> Gap:
    """AUROC of `a` less that of `b` for the same texts, with DeLong's interval for paired scores.

    Raises:
        ValueError: no group holds both a positive and another text.
    """
    first, second = _placements(a, positive, groups), _placements(b, positive, groups)
    known = np.isfinite(first.value)
    smaller = min(np.count_nonzero(positive & known), np.count_nonzero(~positive & known))
    error = float(np.sum((_influence(first, positive) - _influence(second, positive)) ** 2)) ** 0.5
    half = float(stats.t.ppf(0.975, max(smaller - 1, 1))) * error
    difference = first.auroc - second.auroc
    return Gap(difference, max(-1.0, difference - half), min(1.0, difference + half))


def bootstrap_interval(
    values: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
    units: Int[np.ndarray, " texts"],
    draws: int = 1000,
    seed: int = 0,
) -> Bounds:
    """Mean within-group AUROC with a percentile interval over resampled units.

    Units (texts that share no topic or writer with those outside) are drawn with replacement, since
    texts of one unit are not independent; a topic whose unit is drawn twice counts twice. One more
    unit at chance keeps the interval honest near one (as in `auroc_interval`), and percentiles are
    widened for few units, as Student's quantiles and n - 1 degrees of freedom widen a t interval
    (the expanded percentile interval of Hesterberg 2015); what counts is the number of units with
    positives, or of those with others where these are fewer. With fewer than `FEW_UNITS` even the
    whole range of what can be drawn covers too little: the interval is 0 to 1.

    Raises:
        ValueError: no group holds both a positive and another text.
    """
    auroc = _placements(values, positive, groups).auroc
    kinds = [len(np.unique(units[kind])) for kind in (positive, ~positive)]
    n_carriers = min(kinds)
    if n_carriers < FEW_UNITS:
        return Bounds(auroc, 0.0, 1.0)
    drawn = resampling.aurocs(values, positive, groups, units, draws, seed)
    quantile = float(stats.t.ppf(0.975, n_carriers)) * math.sqrt(1 + 1 / n_carriers)
    tail = float(special.ndtr(-quantile))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Bounds(auroc, float(low), float(high))


def auroc_intervals(scores: Float[np.ndarray, "texts concepts"], labels: Labels) -> Interval:
    """AUROC of column c for concept c within topics, each with a 95 % interval.

    Over topics (`auroc_interval`) where a concept has `FEW_TOPICS` or more, else over texts
    (`delong_interval`). A concept without an AUROC gives NaN, 0 and 1.
    """
    by_topic = aurocs_by_group(scores, labels)
    result = auroc_interval(by_topic)
    topics = np.isfinite(by_topic).sum(1)
    for c in np.flatnonzero((topics > 0) & (topics < FEW_TOPICS)):
        bounds = delong_interval(scores[:, c], labels.of(int(c)), labels.topics)
        result.low[c], result.high[c] = bounds.low, bounds.high
    return result


def mean_auroc_interval(scores: Float[np.ndarray, "texts concepts"], labels: Labels) -> Bounds:
    """Mean over concepts of the AUROCs of `auroc_intervals`, with a 95 % interval.

    Over topics where there are `FEW_TOPICS` or more and every concept is in all of them: Student's
    interval of the topics' means. These are means over many concepts, far from skewed, so it needs
    no topic at chance, which would make it wide and lopsided. Else from the texts' influence on the
    mean (DeLong et al. 1988), summed over concepts and within units, which are what is independent
    (Obuchowski 1997).

    Raises:
        ValueError: no concept has an AUROC.
    """
    by_topic = aurocs_by_group(scores, labels)
    known = np.isfinite(by_topic).any(1)
    if not known.any():
        raise ValueError("no topic holds both a text of a concept and another: there is no AUROC")
    mean = float(np.nanmean(by_topic[known], axis=1).mean())
    topics = np.isfinite(by_topic).any(0)
    if np.count_nonzero(topics) >= FEW_TOPICS and np.isfinite(by_topic[known][:, topics]).all():
        over_concepts = np.nanmean(by_topic[:, topics], axis=0)
        interval = t_interval(over_concepts[None], bounds=(0.0, 1.0))
        return Bounds(mean, float(interval.low[0]), float(interval.high[0]))
    _, unit = np.unique(labels.units, return_inverse=True)
    by_unit = np.bincount(unit, influence(scores, labels).sum(1)) / np.count_nonzero(known)
    if len(by_unit) < 2:
        return Bounds(mean, 0.0, 1.0)
    error = (np.sum(by_unit**2) * len(by_unit) / (len(by_unit) - 1)) ** 0.5
    half = float(stats.t.ppf(0.975, len(by_unit) - 1) * error)
    return Bounds(mean, max(0.0, mean - half), min(1.0, mean + half))


@functools.cache
def detectable_auroc(n_groups: int, group_size: int, alpha: float, power: float = 0.8) -> float:
    """The true AUROC at which `rank_test` with one positive a group rejects at level `alpha`.

    Normal-shift model: positives are N(delta, 1) and others N(0, 1), so that the true AUROC is
    Phi(delta / sqrt 2). The positive's rank is then one plus a binomial with probability Phi(z),
    mixed over z, and its sum over groups is convolved exactly.

    Returns:
        The AUROC detected with probability `power`; NaN where even a perfect score has p > alpha.
    """
    assert 0 < alpha < power < 1
    uniform = np.full(group_size, 1 / group_size)
    tail = np.cumsum(_self_convolve(uniform, n_groups)[::-1])[::-1]
    if tail[-1] > alpha:
        return float("nan")
    critical = int(np.argmax(tail <= alpha))
    below = np.arange(group_size)
    log_choose = -special.betaln(below + 1, group_size - below) - np.log(group_size)
    z = np.arange(-8, 8.005, 0.01)
    density = np.exp(-(z**2) / 2) * 0.01 / np.sqrt(2 * np.pi)

    def shortfall(delta: float) -> float:
        log_p, log_not = special.log_ndtr(z + delta), special.log_ndtr(-z - delta)
        others = group_size - 1 - below
        binomial = np.exp(log_choose + np.outer(log_p, below) + np.outer(log_not, others))
        return power - float(_self_convolve(density @ binomial, n_groups)[critical:].sum())

    delta = float(optimize.brentq(shortfall, 0.0, 12.0, xtol=1e-6))
    return float(special.ndtr(delta / math.sqrt(2)))


def _self_convolve(p: Float[np.ndarray, " n"], times: int) -> Float[np.ndarray, " sums"]:
    """Distribution of the sum of `times` independent draws of `p`, by repeated squaring."""
    result, power = np.ones(1), p
    while times:
        if times & 1:
            result = np.convolve(result, power)
        times >>= 1
        if times:
            power = np.convolve(power, power)
    return result


def needed_positives(auroc: float, negatives: int, alpha: float, power: float = 0.8) -> int:
    """The fewest positives whose rank test at level `alpha` detects a true AUROC with `power`.

    Normal approximation, with the variance of Hanley and McNeil (1982) under the alternative.

    Args:
        auroc: The true AUROC, above one half.
        negatives: Texts that the positives are compared with.
        alpha: One-sided level of the test.

    Raises:
        ValueError: no number of positives is enough among so few negatives.
    """
    assert 0.5 < auroc < 1
    assert 0 < alpha < power < 1
    z = float(stats.norm.isf(alpha))

    def reached(m: int) -> bool:
        null = math.sqrt((m + negatives + 1) / (12 * m * negatives))
        surplus = (auroc - 0.5 - z * null) / hanley_mcneil(auroc, m, negatives)
        return float(special.ndtr(surplus)) >= power

    most = 1
    while not reached(most):
        most *= 2
        if most > 1 << 30:
            raise ValueError(
                f"{negatives} other texts are too few to detect an AUROC of {auroc}, whatever the "
                "number of positives: add texts of other concepts"
            )
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if reached(middle) else (middle, most)
    return most


def hanley_mcneil(auroc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982)."""
    both_above, both_below = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc)
    variance += (positives - 1) * (both_above - auroc**2)
    variance += (negatives - 1) * (both_below - auroc**2)
    return math.sqrt(variance / (positives * negatives))


def needed_texts(others: int, alpha: float) -> str:
    """Say how many texts a concept needs for which effect, for messages and reports."""
    needed, effects = list[str](), list[str]()
    for auroc in (0.75, 0.85, 0.95):
        try:
            needed.append(str(needed_positives(auroc, others, alpha)))
        except ValueError:  # the others are too few for so small an effect
            continue
        effects.append(f"{auroc:.2f}".removeprefix("0"))
    if not needed:
        return f"{others} other texts are too few to detect anything at level {alpha:.2g}"
    return (
        f"{_listed(needed)} texts a concept detect an AUROC of {_listed(effects)} with 80 % power "
        f"at level {alpha:.2g}"
    )


def _listed(words: list[str]) -> str:
    return " and ".join(x for x in (", ".join(words[:-1]), words[-1]) if x)

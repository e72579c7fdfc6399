"""How often the intervals that are printed hold the truth, on latents of a known AUROC.

Every latent is sparse and non-negative and has a corpus of its own, so that its figures are
independent of the others'. In a corpus with topics the truth is the mean over all topics there
could be, not over those that were drawn.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import planted
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

from discovery import inference
from discovery.labels import Labels
from discovery.ranks import aurocs_by_group
from discovery.scores import score_pairs


class Coverage(NamedTuple):
    """How one kind of interval did."""

    covered: int
    n: int
    width: float
    """Mean width."""


Bound = tuple[float, float]


def topics_trial(
    seed: int, auroc: float, n: int, *, topics: int = 12, group: int = 171, draws: int = 1000
) -> dict[str, Coverage]:
    """Intervals of the AUROC with one positive text in each topic, as in the packaged corpus."""
    labels = repeated(planted.one_each(group, topics, topics), 1)
    rng = np.random.default_rng(seed)
    x = planted.replicates(rng, labels, auroc, n)
    by_topic = aurocs_by_group(x, repeated(labels, n))
    kinds = {
        "Student over topics, and one at chance": _rows(inference.auroc_interval(by_topic)),
        "Student over topics, plain": _rows(inference.t_interval(by_topic, (0.0, 1.0))),
        **_of_columns(x, labels, draws),
        "plain bootstrap": _plain_bootstrap(rng, by_topic, draws),
    }
    return {kind: cover(bounds, auroc) for kind, bounds in kinds.items()}


def flat_trial(
    seed: int, auroc: float, n: int, *, positives: int, texts: int = 600, draws: int = 1000
) -> dict[str, Coverage]:
    """Intervals of the AUROC in a corpus without topics and writers."""
    rng = np.random.default_rng(seed)
    labels = planted.flat(rng, texts, np.array([positives]))
    x = planted.replicates(rng, labels, auroc, n)
    return {kind: cover(bounds, auroc) for kind, bounds in _of_columns(x, labels, draws).items()}


def difference_trial(
    seed: int, auroc: float, n: int, *, topics: int = 12, group: int = 171, texts: int = 600
) -> dict[str, Coverage]:
    """Intervals of the difference of two latents' AUROCs, their noise correlated at 0.5.

    The second latent's AUROC is half way from that of the first to one half.
    """
    rng = np.random.default_rng(seed)
    other = (auroc + 0.5) / 2
    with_topics = repeated(planted.one_each(group, topics, topics), 1)
    by_topic = [
        aurocs_by_group(x, repeated(with_topics, n))
        for x in _pair(rng, with_topics, auroc, other, n)
    ]
    without = planted.flat(rng, texts, np.array([texts // 10]))
    a, b = _pair(rng, without, auroc, other, n)
    positive = without.of(0)
    delong = [
        inference.delong_difference(a[:, i], b[:, i], positive, without.topics) for i in range(n)
    ]
    kinds = {
        "Student over topics": _rows(inference.t_interval(by_topic[0] - by_topic[1])),
        "DeLong, no topics": [(float(d.low), float(d.high)) for d in delong],
    }
    return {kind: cover(bounds, auroc - other) for kind, bounds in kinds.items()}


def mean_trial(
    seed: int, auroc: float, n: int, *, topics: int = 12, group: int = 171, concepts: int = 40
) -> dict[str, Coverage]:
    """The interval of a mean over concepts: by topic, the mean of the concepts' percentiles."""
    rng = np.random.default_rng(seed)
    labels = repeated(planted.one_each(group, topics, topics), 1)
    means = []
    for _ in range(n):
        x = planted.replicates(rng, labels, auroc, concepts)
        means.append(aurocs_by_group(x, repeated(labels, concepts)).mean(0))
    by_topic = np.stack(means)
    kinds = {
        "Student over topics": inference.t_interval(by_topic, (0.0, 1.0)),
        "Student over topics, and one at chance": inference.auroc_interval(by_topic),
    }
    return {kind: cover(_rows(interval), auroc) for kind, interval in kinds.items()}


def repeated(labels: Labels, n: int) -> Labels:
    """The first concept of the labels, n times over."""
    return labels._replace(concepts=csr_array(labels.concepts[:, [0] * n]))


def cover(bounds: list[Bound], truth: float) -> Coverage:
    """Count the intervals that hold the truth."""
    low, high = np.array(bounds).T
    held: Bool[np.ndarray, " n"] = (low <= truth) & (truth <= high)
    return Coverage(int(held.sum()), len(held), float((high - low).mean()))


def _of_columns(
    x: Float[np.ndarray, "texts n"], labels: Labels, draws: int
) -> dict[str, list[Bound]]:
    """What is printed for one latent and one concept."""
    positive = labels.of(0)
    delong = [inference.delong_interval(column, positive, labels.topics) for column in x.T]
    scores = score_pairs(csr_array(x), labels)
    auroc, half = scores.auroc[:, 0], 1.96 * scores.se[:, 0]
    return {
        "DeLong": [(b.low, b.high) for b in delong],
        "Hanley-McNeil": list(zip((auroc - half).tolist(), (auroc + half).tolist(), strict=True)),
        "bootstrap over units": _bootstrap(x, labels, labels.units, draws),
    }


def _plain_bootstrap(
    rng: np.random.Generator, by_topic: Float[np.ndarray, "n topics"], draws: int
) -> list[Bound]:
    """Percentiles of means over positives drawn with replacement, as is common."""
    topics: int = by_topic.shape[1]
    drawn = rng.integers(0, topics, (draws, topics))
    means = np.stack([row[drawn].mean(1) for row in by_topic])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _bootstrap(
    x: Float[np.ndarray, "texts n"], labels: Labels, units: np.ndarray, draws: int
) -> list[Bound]:
    positive = labels.of(0)
    intervals = (
        inference.bootstrap_interval(column, positive, labels.topics, units, draws=draws)
        for column in x.T
    )
    return [(b.low, b.high) for b in intervals]


def _pair(
    rng: np.random.Generator, labels: Labels, a: float, b: float, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two latents in each of n corpora, one with AUROC a and one with b."""
    common, *own = rng.standard_normal((3, len(labels.topics), n))
    first, second = (
        planted.replicates(rng, labels, auroc, n, noise=(common + noise) / 2**0.5)
        for auroc, noise in zip((a, b), own, strict=True)
    )
    return first, second


def _rows(interval: inference.Interval) -> list[Bound]:
    return list(zip(interval.low.tolist(), interval.high.tolist(), strict=True))


TRIALS: dict[str, Callable[..., dict[str, Coverage]]] = {
    "topics": topics_trial,
    "flat": flat_trial,
    "difference": difference_trial,
    "mean": mean_trial,
}

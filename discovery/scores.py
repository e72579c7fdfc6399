"""Scores of all features for all concepts at once, from sparse activations.

Features are taken a block at a time, and each is scored by itself, in one order of its texts: the
same bytes come out for any size of block and any number of workers, and memory beyond the input and
the result does not grow with features times texts. numpy and scipy only.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special
from scipy.sparse import csr_array

from discovery.inference import benjamini_hochberg
from discovery.labels import Labels
from discovery.ranks import (
    BLOCK,
    Block,
    Shares,
    blocks,
    by_feature,
    group_codes,
    rank_block,
    shares_of,
)

NOTHING = 1e-12
"""A variance below this share of what it is a difference of is a rounding error: none."""


class PairScores(NamedTuple):
    """How each feature tells the texts of each concept from all others.

    "Others" are all texts without the concept, those without any concept too. NaN for a concept
    that no text, or every text, has; `auroc`, `se`, `p` and `q` also where no topic holds both
    kinds. A feature that is the same in every text has AUROC 0.5, d 0 and p 1.
    """

    auroc: Float[np.ndarray, "features concepts"]
    """Exact, tie-aware, within topics and averaged over them."""
    auroc_pooled: Float[np.ndarray, "features concepts"]
    """Exact and tie-aware, over all texts, topics ignored."""
    se: Float[np.ndarray, "features concepts"]
    """Standard error of `auroc`: Hanley and McNeil's (1982) in each topic, at the mean AUROC,
    combined over topics. For normal scores with few positives it is 10 to 30 % too wide."""
    mean_difference: Float[np.ndarray, "features concepts"]
    """Mean activation over positives less that over others, in units of activation."""
    cohens_d: Float[np.ndarray, "features concepts"]
    """`mean_difference` over the pooled standard deviation."""
    firing_ratio: Float[np.ndarray, "features concepts"]
    """Share of positives in which it fires (is not zero), over that of others. To both is added
    half of one text's share in all texts, so that none is zero."""
    mutual_information: Float[np.ndarray, "features concepts"]
    """Bits, between firing and having the concept."""
    p: Float[np.ndarray, "features concepts"]
    """One-sided Mann-Whitney p-value that `auroc` is above one half: the normal approximation with
    the variance given ties, combined over topics as the AUROC is (van Elteren 1960). It ranks
    features; `inference.rank_test` is the exact test of one that is reported."""
    q: Float[np.ndarray, "features concepts"]
    """Benjamini-Hochberg over all pairs."""


def score_pairs(
    x: Float[csr_array, "texts features"],
    labels: Labels,
    *,
    block: int = BLOCK,
    workers: int | None = None,
) -> PairScores:
    """Score every feature for every concept.

    Args:
        x: Pooled activations.
        labels: Concepts and topics of the texts; a text may have several concepts or none.
        block: Non-zeros that a worker takes at a time.
        workers: Threads; by default one for each processor this process may use.
    """
    assert x.shape[0] == len(labels.topics), "activations and labels are of different texts"
    columns = by_feature(x)
    shape = (columns.shape[1], labels.n_concepts)
    scores = PairScores(*(np.empty(shape) for _ in PairScores._fields))
    setting = _setting(labels)

    def work(part: Block) -> None:
        _score_block(part, setting, scores)

    workers = workers or _processors()
    _each(work, blocks(columns, block, labels.n_concepts), workers)
    scores.q[:] = benjamini_hochberg(scores.p.ravel(), workers).reshape(shape)
    return scores


def rank_only(
    x: Float[csr_array, "texts features"],
    labels: Labels,
    *,
    block: int = BLOCK,
    workers: int | None = None,
) -> None:
    """Rank all that `score_pairs` ranks, in the same way, and do nothing with it: its floor."""
    columns = by_feature(x)
    setting = _setting(labels)

    def work(part: Block) -> None:
        rank_block(part, setting.one_group, setting.all_texts)
        if len(setting.size) > 1:
            rank_block(part, setting.group, setting.size)

    _each(work, blocks(columns, block, labels.n_concepts), workers or _processors())


def _each(work: Callable[[Block], None], parts: Iterable[Block], workers: int) -> None:
    if workers == 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, parts):
            pass


def _processors() -> int:
    """Those that this process may use; all of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Setting(NamedTuple):
    """What all features share."""

    labels: Labels
    m: Float[np.ndarray, " concepts"]
    """Positives; NaN where they are none or all."""
    n: Float[np.ndarray, " concepts"]
    """Others; NaN where they are none or all."""
    group: Int[np.ndarray, " texts"]
    size: Int[np.ndarray, " groups"]
    one_group: Int[np.ndarray, " texts"]
    all_texts: Int[np.ndarray, " 1"]
    shares: Shares
    variance: Float[np.ndarray, " concepts"]
    """Of the within-topic AUROC without ties, if the labels meant nothing."""
    tie_variance: Float[csr_array, "concepts groups"]
    """What each t^3 - t of a set of t ties takes from it."""
    hanley_mcneil: Float[np.ndarray, "3 concepts"]
    """Sums over topics of share^2 / (m n) times 1, m - 1 and n - 1."""
    logs: Float[np.ndarray, " texts_and_one"]
    """k log2 k for k texts."""
    one_each: bool
    """Whether every text has one concept, so that labels are stored as texts are."""


def _setting(labels: Labels) -> _Setting:
    size, group = group_codes(labels.topics)
    n_texts, n_concepts = labels.concepts.shape
    shares = shares_of(group, size, labels)
    positives = shares.positives
    concept = np.repeat(np.arange(n_concepts), np.diff(positives.indptr))
    m = positives.data.astype(np.float64)
    total = size[positives.indices].astype(np.float64)
    n = total - m
    used = n > 0
    # The share of a topic in the mean over topics, squared, over its pairs.
    weight = np.where(used, (shares.by_group.data * n) ** 2 / np.where(used, m * n, 1), 0.0)
    per_tie = weight / 12 / np.where(used, total * (total - 1), 1)
    k = np.arange(n_texts + 1, dtype=np.float64)

    def over_topics(values: Float[np.ndarray, " stored"]) -> Float[np.ndarray, " concepts"]:
        total = np.bincount(concept, weight * values, minlength=n_concepts)
        return total.astype(np.float64, copy=False)  # it counts in integers where there are none

    counts = np.where((labels.counts > 0) & (labels.counts < n_texts), labels.counts, np.nan)
    return _Setting(
        labels,
        counts,
        n_texts - counts,
        group,
        size,
        np.zeros(n_texts, np.int64),
        np.array([n_texts]),
        shares,
        over_topics((total + 1) / 12),
        csr_array((per_tie, positives.indices, positives.indptr), shape=positives.shape),
        np.stack([over_topics(np.ones_like(m)), over_topics(m - 1), over_topics(n - 1)]),
        special.xlogy(k, k) / np.log(2),
        bool((np.diff(labels.concepts.indptr) == 1).all()),
    )


class _Sums(NamedTuple):
    """Sums over the positives of each pair of a feature and a concept."""

    fires: Int[np.ndarray, "features concepts"]
    value: Float[np.ndarray, "features concepts"]
    pooled: Float[np.ndarray, "features concepts"]
    """Of the ranks' deviations over all texts."""
    within: Float[np.ndarray, "features concepts"]
    """Of the ranks' deviations within topics, weighted by the topics' shares."""
    all_values: Float[np.ndarray, "features 1"]
    """Over all texts."""
    all_squares: Float[np.ndarray, "features 1"]


def _score_block(part: Block, setting: _Setting, scores: PairScores) -> None:
    """Write the scores of some features, all but `q`."""
    at, m, n, shares = part.features, setting.m, setting.n, setting.shares
    pooled = rank_block(part, setting.one_group, setting.all_texts)
    several = len(setting.size) > 1
    within = rank_block(part, setting.group, setting.size) if several else pooled
    sums = _sums(part, setting, pooled.deviation, within.deviation)
    auroc_pooled = (sums.pooled + pooled.zero * m - m * (m + 1) / 2) / (m * n)
    auroc = auroc_pooled
    if several:
        auroc = sums.within + (shares.by_group @ within.zero.T).T - shares.least
        auroc[:, ~shares.known] = np.nan
    variance = setting.variance - (setting.tie_variance @ within.ties.T).T
    varies = variance > NOTHING * setting.variance
    z = (auroc - 0.5) / np.sqrt(np.where(varies, variance, 1))
    fires, others = sums.fires, part.counts[:, None] - sums.fires
    least = 0.5 / len(setting.group)

    scores.auroc[at] = auroc
    scores.auroc_pooled[at] = auroc_pooled
    scores.se[at] = _standard_error(auroc, setting.hanley_mcneil)
    scores.mean_difference[at], scores.cohens_d[at] = _effects(sums, setting)
    scores.firing_ratio[at] = (fires / m + least) / (others / n + least)
    information = _mutual_information(fires, part.counts, setting)
    scores.mutual_information[at] = np.where(np.isnan(m), np.nan, information)
    scores.p[at] = np.where(varies | np.isnan(auroc), special.ndtr(-z), 1.0)


def _sums(
    part: Block,
    setting: _Setting,
    pooled: Float[np.ndarray, " nonzeros"],
    within: Float[np.ndarray, " nonzeros"],
) -> _Sums:
    """Add up over the positives, text by text."""
    concepts = setting.labels.concepts
    n_features, n_concepts = len(part.counts), setting.labels.n_concepts
    value = part.values.astype(np.float64)
    totals = _by_feature(value, part.counts), _by_feature(value * value, part.counts)
    feature, label = part.feature, part.text
    if not setting.one_each:
        label, source = _expand(concepts, part.text)
        feature, value, pooled, within = (a[source] for a in (feature, value, pooled, within))
    pair = feature * n_concepts + concepts.indices[label]

    def over(weights: Float[np.ndarray, " entries"]) -> Float[np.ndarray, "features concepts"]:
        total = np.bincount(pair, weights, n_features * n_concepts).astype(np.float64, copy=False)
        return total.reshape(n_features, n_concepts)

    fires = np.bincount(pair, minlength=n_features * n_concepts).reshape(n_features, n_concepts)
    of_pooled = over(pooled)
    several = len(setting.size) > 1
    weighted = over(within * setting.shares.by_text.data[label]) if several else of_pooled
    return _Sums(fires, over(value), of_pooled, weighted, *totals)


def _expand(
    concepts: csr_array, text: Int[np.ndarray, " nonzeros"]
) -> tuple[Int[np.ndarray, " entries"], Int[np.ndarray, " entries"]]:
    """Each label of the text of each non-zero: where it is stored, and which non-zero it is of."""
    start = concepts.indptr[text].astype(np.int64)
    labels = concepts.indptr[text + 1] - start
    source = np.repeat(np.arange(len(text)), labels)
    first = np.cumsum(labels) - labels
    return np.arange(len(source)) + np.repeat(start - first, labels), source


def _by_feature(
    values: Float[np.ndarray, " nonzeros"], counts: Int[np.ndarray, " features"]
) -> Float[np.ndarray, "features 1"]:
    """Sum over the non-zeros of each feature."""
    result = np.zeros((len(counts), 1))
    fires = counts > 0
    if fires.any():
        result[fires, 0] = np.add.reduceat(values, (np.cumsum(counts) - counts)[fires])
    return result


def _standard_error(
    auroc: Float[np.ndarray, "features concepts"], sums: Float[np.ndarray, "3 concepts"]
) -> Float[np.ndarray, "features concepts"]:
    square = auroc**2
    variance = auroc * (1 - auroc) * sums[0]
    variance += (auroc / (2 - auroc) - square) * sums[1]
    variance += (2 * square / (1 + auroc) - square) * sums[2]
    return np.sqrt(np.maximum(variance, 0))


def _effects(
    sums: _Sums, setting: _Setting
) -> tuple[Float[np.ndarray, "features concepts"], Float[np.ndarray, "features concepts"]]:
    """The mean difference, and Cohen's d."""
    m, n, others = setting.m, setting.n, sums.all_values - sums.value
    difference = sums.value / m - others / n
    left = sums.all_squares - sums.value**2 / m - others**2 / n
    deviation = np.sqrt(np.maximum(left, 0) / max(len(setting.group) - 2, 1))
    varies = left > NOTHING * sums.all_squares
    return difference, np.where(varies, difference / np.where(varies, deviation, 1), 0 * difference)


def _mutual_information(
    fires: Int[np.ndarray, "features concepts"],
    counts: Int[np.ndarray, " features"],
    setting: _Setting,
) -> Float[np.ndarray, "features concepts"]:
    """Bits, from the four counts of firing and having the concept."""
    n_texts, logs, m = len(setting.group), setting.logs, setting.labels.counts
    silent = n_texts - m + fires
    silent -= counts[:, None]  # texts without the concept in which it does not fire
    information = logs[fires] + logs[m - fires] + logs[counts[:, None] - fires] + logs[silent]
    information -= logs[m] + logs[n_texts - m]
    information += (logs[n_texts] - logs[counts] - logs[n_texts - counts])[:, None]
    return np.maximum(information, 0) / n_texts

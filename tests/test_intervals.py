"""Intervals of AUROCs over texts and units: DeLong, bootstrap, their means and differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from discovery import inference
from discovery.inference import bootstrap_interval, delong_difference, delong_interval
from discovery.labels import Labels
from discovery.ranks import aurocs_by_group


def scored(seed: int, m: int, n: int, auroc: float, groups: int = 1):
    """Normal scores of m positives and n others in each group, some of them tied."""
    rng = np.random.default_rng(seed)
    positive = np.tile(np.arange(m + n) < m, groups)
    shift = np.sqrt(2) * stats.norm.ppf(auroc)
    values = np.round(rng.normal(0, 1, len(positive)) + shift * positive, 1)
    return values, positive, np.repeat(np.arange(groups), m + n)


def brute_delong(columns, positive):
    """AUROCs and their covariance, by all pairs of a positive and another text."""
    kernels = []
    for values in columns:
        difference = values[positive][:, None] - values[~positive][None]
        kernels.append((difference > 0) + 0.5 * (difference == 0))
    m, n = kernels[0].shape
    above = np.cov([k.mean(1) for k in kernels])
    below = np.cov([k.mean(0) for k in kernels])
    return np.array([k.mean() for k in kernels]), above / m + below / n


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), m=st.integers(2, 9), n=st.integers(2, 12))
def test_the_variance_is_delongs(seed, m, n):
    values, positive, groups = scored(seed, m, n, 0.7)
    other = np.random.default_rng(seed + 1).integers(0, 4, m + n).astype(float)
    aurocs, covariance = brute_delong([values, other], positive)
    first, second = (inference._placements(v, positive, groups) for v in (values, other))
    influence = [inference._influence(at, positive) for at in (first, second)]
    np.testing.assert_allclose([first.auroc, second.auroc], aurocs, atol=1e-12)
    np.testing.assert_allclose(
        np.array(influence) @ np.transpose(influence), covariance, atol=1e-12
    )
    gap = delong_difference(values, other, positive, groups)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    half = stats.t.ppf(0.975, min(m, n) - 1) * np.sqrt(variance)
    assert gap.difference == pytest.approx(aurocs[0] - aurocs[1], abs=1e-12)
    assert gap.high == pytest.approx(min(1, gap.difference + half), abs=1e-9)
    assert gap.low == pytest.approx(max(-1, gap.difference - half), abs=1e-9)


def test_the_interval_is_delongs_where_there_are_many_texts():
    values, positive, groups = scored(0, 400, 900, 0.7)
    (auroc, _), covariance = brute_delong([values, -values], positive)
    got = delong_interval(values, positive, groups)
    assert got.auroc == pytest.approx(auroc, abs=1e-12)
    half = 1.96 * np.sqrt(covariance[0, 0])
    assert (got.low, got.high) == pytest.approx((auroc - half, auroc + half), abs=0.002)
    drawn = bootstrap_interval(values, positive, groups, np.arange(1300))
    assert (drawn.low, drawn.high) == pytest.approx((auroc - half, auroc + half), abs=0.006)


def test_a_mean_over_groups_has_the_interval_over_them():
    """One positive a group: DeLong's interval is a little wider than that over groups."""
    values, positive, groups = scored(1, 1, 400, 0.75, groups=12)
    got = delong_interval(values, positive, groups)
    placements = [roc_auc_score(positive[groups == g], values[groups == g]) for g in range(12)]
    over = inference.auroc_interval(np.array([placements]))
    assert got.auroc == pytest.approx(over.mean[0], abs=1e-12)
    assert (got.low, got.high) == pytest.approx((over.low[0], over.high[0]), abs=0.01)
    assert got.high - got.low >= over.high[0] - over.low[0] - 1e-9


@pytest.mark.parametrize(("m", "n", "groups"), [(12, 100, 1), (60, 12, 1), (1, 60, 12), (4, 40, 3)])
@pytest.mark.parametrize("auroc", [0.5, 0.8, 0.95])
def test_intervals_cover(m, n, groups, auroc):
    """Both keep their 95 % at the sizes where the plain DeLong interval sinks to 82 %."""
    hits = np.zeros(2)
    for seed in range(200):
        data = scored(seed, m, n, auroc, groups)
        units = np.arange(len(data[0])) if groups == 1 else data[2]
        intervals = [delong_interval(*data), bootstrap_interval(*data, units, draws=200)]
        hits += [low <= auroc <= high for _, low, high in intervals]
    assert hits.min() / 200 > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 200)


def test_a_perfect_score_is_no_certainty():
    positive = np.arange(30) < 6
    values, one = positive.astype(float), np.zeros(30, int)
    for got in (
        delong_interval(values, positive, one),
        bootstrap_interval(values, positive, one, np.arange(30)),
    ):
        assert (got.auroc, got.high) == pytest.approx((1.0, 1.0), abs=0.01)
        assert got.low < 0.9


def test_a_latent_that_never_fires_has_an_interval_about_one_half():
    positive, one = np.arange(30) < 6, np.zeros(30, int)
    for got in (
        delong_interval(np.zeros(30), positive, one),
        bootstrap_interval(np.zeros(30), positive, one, np.arange(30)),
    ):
        assert got == pytest.approx((0.5, 0.5, 0.5))


def brute_bootstrap(values, positive, groups, units, draws, seed):
    """Resampled AUROCs by copying the texts of the units drawn; no unit at chance is added."""
    rng = np.random.default_rng(seed)
    names, drawn = np.unique(units), []
    while len(drawn) < draws:
        rows, copies = [], []
        for copy, unit in enumerate(rng.choice(names, len(names))):
            inside = np.flatnonzero(units == unit)
            rows.append(inside)
            # A topic within a unit stays apart from its copies; one that units share does not.
            shared = len(np.unique(units[groups == groups[inside[0]]])) > 1
            copies.append(np.full(len(inside), 0 if shared else copy))
        rows, copies = np.concatenate(rows), np.concatenate(copies)
        aurocs = []
        for key in set(zip(groups[rows].tolist(), copies.tolist(), strict=True)):
            own = rows[(groups[rows] == key[0]) & (copies == key[1])]
            if 0 < positive[own].sum() < len(own):
                aurocs.append(roc_auc_score(positive[own], values[own]))
        if aurocs:
            drawn.append(np.mean(aurocs))
    return np.array(drawn)


@pytest.mark.parametrize("shape", ["units of texts", "units of topics", "texts"])
def test_the_bootstrap_resamples_units(shape):
    rng = np.random.default_rng(0)
    values, positive, groups = scored(3, 10, 10, 0.7, 12)
    if shape == "units of topics":
        units = groups // 2  # six units of two topics
    elif shape == "units of texts":
        groups, units = np.zeros(240, int), rng.integers(0, 40, 240)
    else:
        groups, units = np.zeros(240, int), rng.permutation(240)
    expected = brute_bootstrap(values, positive, groups, units, 150, 1)
    got = bootstrap_interval(values, positive, groups, units, draws=3000)
    n = len(np.unique(units[positive]))
    tail = stats.norm.cdf(-stats.t.ppf(0.975, n) * np.sqrt(1 + 1 / n))
    low, high = np.quantile(expected, [tail, 1 - tail])
    slack = {"units of topics": 0.12, "units of texts": 0.05, "texts": 0.05}[shape]
    assert (got.low, got.high) == pytest.approx((low, high), abs=slack)
    assert got == bootstrap_interval(values, positive, groups, units, draws=3000)


@pytest.mark.parametrize("n_units", [1, 4])
def test_few_units_say_nothing(n_units):
    values, positive, groups = scored(0, 20, 20, 0.8)
    got = bootstrap_interval(values, positive, groups, np.arange(40) % n_units)
    assert (got.low, got.high) == (0.0, 1.0)
    more = bootstrap_interval(values, positive, groups, np.arange(40) % 5)
    assert 0 < more.low < more.high < 1


@pytest.mark.parametrize("interval", [delong_interval, delong_difference, bootstrap_interval])
def test_intervals_need_a_group_with_both_kinds(interval):
    more = {delong_difference: [np.ones(4)], bootstrap_interval: []}.get(interval, [])
    after = [np.arange(4)] if interval is bootstrap_interval else []
    positive, groups = np.array([1, 1, 0, 0], bool), np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="there is no AUROC"):
        interval(np.ones(4), *more, positive, groups, *after)


def many(seed: int, n_topics: int, n_concepts: int = 6, n: int = 240):
    rng = np.random.default_rng(seed)
    concepts = rng.random((n, n_concepts)) < 0.15
    scores = rng.normal(0, 1, (n, n_concepts)) + 1.2 * concepts
    return scores, Labels(csr_array(concepts), np.arange(n) % n_topics, np.arange(n))


def test_intervals_of_concepts_are_over_topics_where_there_are_enough():
    scores, labels = many(0, 8)
    expected = inference.auroc_interval(inference.aurocs_by_group(scores, labels))
    for ours, theirs in zip(inference.auroc_intervals(scores, labels), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_intervals_of_concepts_are_over_texts_in_one_topic():
    scores, labels = many(1, 1)
    dense = labels.dense()
    dense[:, 2] = False
    labels = labels._replace(concepts=csr_array(dense))
    got = inference.auroc_intervals(scores, labels)
    for c in (0, 1, 3, 4, 5):
        expected = delong_interval(scores[:, c], labels.of(c), labels.topics)
        assert (got.mean[c], got.low[c], got.high[c]) == pytest.approx(tuple(expected))
    assert np.isnan(got.mean[2])
    assert (got.low[2], got.high[2]) == (0.0, 1.0)


@pytest.mark.parametrize("n_topics", [1, 8])
def test_the_mean_over_concepts_has_an_interval_that_covers(n_topics):
    truth = stats.norm.cdf(1.2 / np.sqrt(2))
    got = [inference.mean_auroc_interval(*many(seed, n_topics)) for seed in range(200)]
    hits = np.mean([low <= truth <= high for _, low, high in got])
    assert hits > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 200)
    if n_topics == 1:
        width = np.mean([high - low for _, low, high in got])
        assert width == pytest.approx(2 * 1.96 * np.std([g.auroc for g in got]), rel=0.2)


def test_the_mean_over_topics_has_a_plain_t_interval():
    """Means over concepts are not skewed: no topic at chance pulls the interval down."""
    scores, labels = many(0, 8)
    aurocs = aurocs_by_group(scores, labels)
    assert np.isfinite(aurocs).all()  # every concept is in every topic
    by_topic = aurocs.mean(0)
    error = by_topic.std(ddof=1) / 8**0.5
    half = stats.t.ppf(0.975, 7) * error
    got = inference.mean_auroc_interval(scores, labels)
    assert (got.low, got.high) == pytest.approx((by_topic.mean() - half, by_topic.mean() + half))


@pytest.mark.parametrize("n_topics", [1, 3])
def test_influences_of_all_concepts_give_delongs_intervals(n_topics):
    scores, labels = many(5, n_topics)
    dense = labels.dense()
    dense[:, 2] = False
    labels = labels._replace(concepts=csr_array(dense))
    got = inference.influence(scores, labels)
    assert got.shape == scores.shape
    np.testing.assert_allclose(got.sum(0), 0, atol=1e-12)
    assert not got[:, 2].any()
    shuffled = np.random.default_rng(0).permutation(scores)
    other = inference.influence(shuffled, labels)
    for c in (0, 1, 3):
        gap = delong_difference(scores[:, c], shuffled[:, c], labels.of(c), labels.topics)
        m = int(labels.of(c).sum())
        error = np.sum((got[:, c] - other[:, c]) ** 2) ** 0.5
        half = stats.t.ppf(0.975, min(m, len(scores) - m) - 1) * error
        assert gap.high - gap.difference == pytest.approx(half)


def test_a_mean_over_concepts_counts_units_not_texts():
    """Every text four times, as texts of one writer: the interval is as wide as before."""
    scores, labels = many(2, 1)
    once = inference.mean_auroc_interval(scores, labels)
    again = Labels(
        csr_array(np.repeat(labels.dense(), 4, axis=0)),
        np.repeat(labels.topics, 4),
        np.repeat(labels.units, 4),
    )
    copied = inference.mean_auroc_interval(np.repeat(scores, 4, axis=0), again)
    assert copied == pytest.approx(once, abs=0.003)


def test_no_concept_has_no_mean():
    scores, labels = many(3, 1)
    none = labels._replace(concepts=csr_array(np.zeros((240, 6), bool)))
    with pytest.raises(ValueError, match="no AUROC"):
        inference.mean_auroc_interval(scores, none)


def test_the_mean_lies_in_its_interval_where_concepts_miss_topics():
    """Means over topics and over concepts differ there, so an interval of the former won't do."""
    rng = np.random.default_rng(5)
    topics = np.concatenate([np.repeat(np.arange(6), 20), 6 + np.repeat(np.arange(34), 10)])
    concepts = np.zeros((len(topics), 2), bool)
    concepts[np.flatnonzero(topics < 6)[::4], 0] = True  # the first concept in six topics only
    concepts[np.arange(1, len(topics), 5), 1] = True
    concepts[:, 1] &= ~concepts[:, 0]
    scores = rng.normal(size=concepts.shape)
    scores[:, 1] += 3 * concepts[:, 1]
    labels = Labels(csr_array(concepts), topics, topics)
    mean, low, high = inference.mean_auroc_interval(scores, labels)
    assert mean == pytest.approx(np.nanmean(np.nanmean(aurocs_by_group(scores, labels), 1)))
    assert low < mean < high

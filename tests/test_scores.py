"""Rank statistics against scikit-learn, scipy, enumeration and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from discovery import scores


def texts(seed: int, n_groups: int = 4, group: int = 9, n_features: int = 7, n_concepts: int = 3):
    """Sparse features with many ties and some negative values, in shuffled rows."""
    rng = np.random.default_rng(seed)
    n = n_groups * group
    x = rng.integers(-1, 4, (n, n_features)) * (rng.random((n, n_features)) < 0.4)
    groups = rng.permutation(np.repeat(np.arange(n_groups) * 10, group))
    labels = rng.integers(-1, n_concepts, n)
    return x.astype(np.float32), labels, groups


def by_sklearn(x, labels, groups, n_concepts):
    """Within-group AUROC as scikit-learn gives it, averaged over the groups that have one."""
    result = np.full((x.shape[1], n_concepts), np.nan)
    for f, c in itertools.product(range(x.shape[1]), range(n_concepts)):
        aurocs = [
            roc_auc_score(labels[groups == g] == c, x[groups == g, f])
            for g in np.unique(groups)
            if 0 < (labels[groups == g] == c).sum() < (groups == g).sum()
        ]
        result[f, c] = np.mean(aurocs) if aurocs else np.nan
    return result


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n_groups=st.integers(1, 4), group=st.integers(2, 12))
def test_auroc_of_all_pairs_is_that_of_sklearn(seed, n_groups, group):
    x, labels, groups = texts(seed, n_groups, group)
    expected = by_sklearn(x, labels, groups, 3)
    for form in (x, csr_array(x)):
        got = scores.within_group_auroc(form, labels, groups, 3)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_auroc_does_not_depend_on_the_blocks_of_features():
    x, labels, groups = texts(0, n_groups=300, group=3, n_features=500)
    assert (1 << 16) // 300 < 500  # so that there are several blocks
    got = scores.within_group_auroc(csr_array(x), labels, groups, 3)
    one_by_one = np.vstack(
        [scores.within_group_auroc(x[:, f : f + 1], labels, groups, 3) for f in range(0, 500, 50)]
    )
    np.testing.assert_allclose(got[::50], one_by_one, rtol=0, atol=1e-12)


def test_explicit_zeros_are_zeros_and_the_input_is_left_alone():
    x, labels, groups = texts(1)
    stored = csr_array(np.where(x == 0, 5.0, x))
    stored.data[stored.data == 5.0] = 0.0
    before = stored.copy()
    got = scores.within_group_auroc(stored, labels, groups, 3)
    np.testing.assert_array_equal(got, scores.within_group_auroc(x, labels, groups, 3))
    np.testing.assert_array_equal(stored.data, before.data)
    assert stored.nnz == before.nnz


def test_ranks_of_whole_groups_are_those_of_the_groups_alone():
    x, labels, groups = texts(2)
    keep = groups != 10
    ranks = scores.within_group_ranks(csr_array(x), groups).rows(keep)
    got = scores.auroc_from_ranks(ranks, labels[keep], 3)
    expected = scores.within_group_auroc(x[keep], labels[keep], groups[keep], 3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(AssertionError, match="NaN"):
        scores.within_group_ranks(np.array([[1.0], [np.nan]]), np.zeros(2, int))


@given(seed=st.integers(0, 10**6))
def test_swapping_the_labels_of_a_pair_flips_the_score(seed):
    x, _, groups = texts(seed, group=2)
    labels = np.zeros(len(groups), int)
    for g in np.unique(groups):
        labels[np.flatnonzero(groups == g)[0]] = 1
    auroc = scores.within_group_auroc(x, labels, groups, 2)
    swapped = scores.within_group_auroc(x, 1 - labels, groups, 2)
    np.testing.assert_allclose(swapped, 1 - auroc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(swapped, auroc[:, ::-1], rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10**6))
def test_percentile_of_a_lone_positive_is_its_auroc(seed):
    x, _, groups = texts(seed)
    labels = np.full(len(groups), -1)
    for g in np.unique(groups):
        labels[np.flatnonzero(groups == g)[0]] = 0
    percentiles = []
    for g, own in zip(groups[labels == 0], x[labels == 0], strict=True):
        others = x[(groups == g) & (labels < 0)]
        percentiles.append(((others < own).mean(0) + (others <= own).mean(0)) / 2)
    percentiles = np.mean(percentiles, axis=0)
    auroc = scores.within_group_auroc(x, labels, groups, 1)[:, 0]
    np.testing.assert_allclose(percentiles, auroc, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_aurocs_by_group_average_to_the_auroc(seed):
    x, labels, groups = texts(seed, n_features=3)
    by_group = scores.aurocs_by_group(x, labels, groups)
    assert by_group.shape == (3, 4)
    expected = np.diag(by_sklearn(x, labels, groups, 3))
    known = np.isfinite(expected)
    np.testing.assert_allclose(np.nanmean(by_group[known], 1), expected[known], atol=1e-12)
    assert np.isnan(by_group[~known]).all()


def test_centred_values_have_group_means_of_zero_and_keep_differences():
    x, _, groups = texts(3)
    got = scores.centred(x.astype(float), groups)
    for g in np.unique(groups):
        inside = groups == g
        np.testing.assert_allclose(got[inside], x[inside] - x[inside].mean(0), atol=1e-12)


def enumerated(values, positive, groups):
    """Rank sums of all equally likely choices of positives, and the observed one."""
    ranks = np.zeros(len(values))
    choices = []
    for g in np.unique(groups):
        inside = np.flatnonzero(groups == g)
        ranks[inside] = stats.rankdata(values[inside])
        choices.append(list(itertools.combinations(inside, int(positive[inside].sum()))))
    sums = [sum(ranks[list(c)].sum() for c in chosen) for chosen in itertools.product(*choices)]
    return np.array(sums), ranks[positive].sum()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 6), per_group=st.integers(1, 3))
def test_exact_p_is_that_of_enumeration(seed, levels, per_group):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, 15).astype(float)
    groups = np.repeat([0, 1, 2], 5)
    positive = np.concatenate([rng.permutation(5) < per_group for _ in range(3)])
    sums, observed = enumerated(values, positive, groups)
    test = scores.exact_p(values, positive, groups)
    assert test.p == pytest.approx(np.mean(sums >= observed - 1e-9), abs=1e-12)
    auroc = by_sklearn(values[:, None], positive.astype(int), groups, 2)[0, 1]
    assert test.auroc == pytest.approx(auroc, abs=1e-12)


def test_exact_p_takes_groups_of_different_sizes_and_skips_those_without_a_pair():
    values = np.array([3.0, 1, 2, 2, 5, 5, 4, 0, 9, 9])
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 3])
    positive = np.array([1, 0, 0, 1, 0, 1, 0, 0, 1, 0], bool)
    kept = groups < 2
    sums, observed = enumerated(values[kept], positive[kept], groups[kept])
    test = scores.exact_p(values, positive, groups)
    assert test.p == pytest.approx(np.mean(sums >= observed), abs=1e-12)


def test_exact_p_agrees_with_permutation():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 30)
    positive = np.tile(np.arange(30) == 0, 12)
    values = np.maximum(rng.normal(0, 1, 360) + 0.5 * positive, 0)  # half of them tie at zero
    test = scores.exact_p(values, positive, groups)
    ranks = np.stack([stats.rankdata(values[groups == g]) for g in range(12)])
    drawn = ranks[np.arange(12), rng.integers(0, 30, (200_000, 12))].sum(1)
    expected = np.mean(drawn >= ranks[:, 0].sum())
    assert test.p == pytest.approx(expected, abs=4 * np.sqrt(expected / 200_000))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_exact_p_is_blind_to_monotone_transforms(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-5, 6, 24).astype(float)
    groups = np.repeat(np.arange(4), 6)
    positive = np.tile(np.arange(6) < 2, 4)
    test = scores.exact_p(values, positive, groups)
    assert scores.exact_p(np.exp(values), positive, groups) == test
    assert scores.exact_p(values + 100.0 * groups, positive, groups) == test


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_exact_p_is_valid_under_the_null(levels):
    """P(p <= alpha) <= alpha at every alpha, over all choices of positives; sharp without ties."""
    values = np.random.default_rng(levels).integers(0, levels, 18).astype(float)
    groups = np.repeat([0, 1, 2], 6)
    p = []
    for chosen in itertools.product(range(6), repeat=3):
        positive = np.zeros(18, bool)
        positive[np.arange(3) * 6 + np.array(chosen)] = True
        p.append(scores.exact_p(values, positive, groups).p)
    share = np.array([np.mean(np.array(p) <= alpha + 1e-12) for alpha in p])
    np.testing.assert_allclose(share, p, atol=1e-12)  # each attained level is exact
    assert min(p) >= 1 / 6**3 - 1e-12


def test_exact_p_needs_a_group_with_both_kinds():
    with pytest.raises(ValueError, match="nothing to test"):
        scores.exact_p(np.ones(4), np.array([1, 1, 0, 0], bool), np.array([0, 0, 1, 1]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_values_are_those_of_scipy(p):
    np.testing.assert_allclose(
        scores.benjamini_hochberg(np.array(p)), stats.false_discovery_control(p), atol=1e-14
    )


def test_no_p_values_give_no_q_values():
    assert scores.benjamini_hochberg(np.array([])).shape == (0,)


def test_t_interval_is_that_of_scipy_and_leaves_out_what_is_missing():
    values = np.random.default_rng(0).normal(0.1, 0.2, (5, 12))
    values[0, 3:7] = np.nan
    got = scores.t_interval(values)
    for row, mean, low, high in zip(values, *got, strict=True):
        known = row[np.isfinite(row)]
        expected = stats.ttest_1samp(known, 0).confidence_interval()
        assert mean == pytest.approx(known.mean())
        assert (low, high) == pytest.approx((expected.low, expected.high))


def test_intervals_know_nothing_from_one_value_and_stay_in_bounds():
    values = np.array([[0.3, np.nan], [np.nan, np.nan], [-0.9, 0.9]])
    mean, low, high = scores.t_interval(values)
    np.testing.assert_allclose(mean, [0.3, np.nan, 0.0])
    np.testing.assert_array_equal(low, [-1.0, -1.0, -1.0])
    np.testing.assert_array_equal(high, [1.0, 1.0, 1.0])
    none = scores.auroc_interval(values[1:2])
    assert np.isnan(none.mean[0])
    assert (none.low[0], none.high[0]) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_auroc_interval_holds_the_mean_and_stays_between_0_and_1(values):
    mean, low, high = (float(x[0]) for x in scores.auroc_interval(np.array([values])))
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1


@pytest.mark.parametrize("auroc", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("shape", ["normal shift", "beta"])
def test_auroc_interval_covers_over_12_topics(auroc, shape):
    """Coverage at n = 12; the plain t interval sinks to .86 at .90 and below .75 at .98."""
    rng = np.random.default_rng(0)
    if shape == "beta":
        values = rng.beta(2 * auroc, 2 * (1 - auroc), (8000, 12))
    else:
        shift = np.sqrt(2) * stats.norm.ppf(auroc)
        values = rng.binomial(170, special.ndtr(rng.normal(shift, 1, (8000, 12)))) / 170
    _, low, high = scores.auroc_interval(values)
    assert np.mean((low <= auroc) & (auroc <= high)) > 0.94


def test_detectable_auroc_is_detected_with_the_stated_power():
    alpha = 0.01
    auroc = scores.detectable_auroc(8, 20, alpha)
    shift = np.sqrt(2) * stats.norm.ppf(auroc)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 20)
    positive = np.tile(np.arange(20) == 0, 8)
    p = [
        scores.exact_p(rng.normal(0, 1, 160) + shift * positive, positive, groups).p
        for _ in range(600)
    ]
    assert np.mean(np.array(p) <= alpha) == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / 600))


def test_detectable_auroc_of_the_packaged_corpus():
    first_rejection = scores.detectable_auroc(12, 171, 0.05 / 342)
    assert first_rejection == pytest.approx(0.84, abs=0.005)
    assert first_rejection > scores.detectable_auroc(12, 171, 0.05 * 50 / 342) > 0.7
    assert first_rejection > scores.detectable_auroc(24, 171, 0.05 / 342)


def test_nothing_is_detectable_where_a_perfect_score_is_not_significant():
    assert np.isnan(scores.detectable_auroc(2, 6, 0.05 / 342))

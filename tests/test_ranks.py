"""Ranks within groups and the AUROCs of them, against scikit-learn and scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from discovery import ranks
from discovery.labels import Labels


def texts(seed: int, n_groups: int = 4, group: int = 9, n_features: int = 7, n_concepts: int = 3):
    """Sparse features with many ties and some negative values, in shuffled rows; texts of none, one
    or several concepts."""
    rng = np.random.default_rng(seed)
    n = n_groups * group
    x = rng.integers(-1, 4, (n, n_features)) * (rng.random((n, n_features)) < 0.4)
    groups = rng.permutation(np.repeat(np.arange(n_groups) * 10, group))
    concepts = csr_array(rng.random((n, n_concepts)) < 0.3)
    return x.astype(np.float32), Labels(concepts, groups, np.arange(n))


def by_sklearn(x, labels: Labels):
    """Within-group AUROC as scikit-learn gives it, averaged over the groups that have one."""
    result = np.full((x.shape[1], labels.n_concepts), np.nan)
    groups = labels.topics
    for f, c in itertools.product(range(x.shape[1]), range(labels.n_concepts)):
        own = labels.of(c)
        aurocs = [
            roc_auc_score(own[groups == g], x[groups == g, f])
            for g in np.unique(groups)
            if 0 < own[groups == g].sum() < (groups == g).sum()
        ]
        result[f, c] = np.mean(aurocs) if aurocs else np.nan
    return result


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n_groups=st.integers(1, 4), group=st.integers(2, 12))
def test_auroc_of_all_pairs_is_that_of_sklearn(seed, n_groups, group):
    x, labels = texts(seed, n_groups, group)
    expected = by_sklearn(x, labels)
    for form in (x, csr_array(x)):
        got = ranks.within_group_auroc(form, labels)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_a_concept_of_no_text_or_of_all_has_no_auroc():
    x, labels = texts(0)
    concepts = labels.dense()
    concepts[:, 0], concepts[:, 1] = False, True
    labels = labels._replace(concepts=csr_array(concepts))
    auroc = ranks.within_group_auroc(x, labels)
    assert np.isnan(auroc[:, :2]).all()
    assert np.isfinite(auroc[:, 2]).all()
    by_group = ranks.aurocs_by_group(x[:, :3], labels)
    assert np.isnan(by_group[:2]).all()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([np.float32, np.float64]),
    n_groups=st.integers(1, 5),
)
def test_ranks_are_those_of_scipy_in_any_type(seed, dtype, n_groups):
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(0, 3, (40, 3)), 1) * (rng.random((40, 3)) < 0.5)
    x, groups = x.astype(dtype), rng.integers(0, n_groups, 40)
    got = ranks.within_group_ranks(csr_array(x), groups)
    whole = got.zero[got.group] + got.deviation.toarray()
    for g in np.unique(groups):
        expected = stats.rankdata(x[groups == g], axis=0)
        np.testing.assert_array_equal(whole[groups == g], expected)


def test_values_that_single_precision_confounds_are_told_apart():
    x = np.array([[1.0], [1.0 + 1e-12], [1.0 - 1e-12], [0.0]])
    got = ranks.within_group_ranks(x, np.zeros(4, int))
    whole = got.zero[got.group] + got.deviation.toarray()
    np.testing.assert_array_equal(whole[:, 0], [3, 4, 2, 1])


def test_ranks_do_not_depend_on_the_blocks_of_features():
    x, labels = texts(0, n_groups=30, group=30, n_features=300)
    x[:, 100:200] = 0  # features that never fire
    columns = ranks.by_feature(csr_array(x))
    size, group = ranks.group_codes(labels.topics)
    results = []
    for most in (1, 1000, 10**7):
        parts = list(ranks.blocks(columns, most, 1))
        assert [part.features.start for part in parts[1:]] == [
            part.features.stop for part in parts[:-1]
        ]
        assert (parts[0].features.start, parts[-1].features.stop) == (0, 300)
        ranked = [ranks.rank_block(part, group, size) for part in parts]
        results.append([np.concatenate(field) for field in zip(*ranked, strict=True)])
    for field in range(3):
        np.testing.assert_array_equal(results[1][field], results[0][field])
        np.testing.assert_array_equal(results[2][field], results[0][field])


def test_blocks_are_bounded_in_features_too():
    columns = ranks.by_feature(csr_array((5, 1000)))
    assert max(len(part.counts) for part in ranks.blocks(columns, 100, 10)) == 10


@given(seed=st.integers(0, 10**6))
def test_ties_are_those_of_scipy(seed):
    x, labels = texts(seed)
    size, group = ranks.group_codes(labels.topics)
    (part,) = ranks.blocks(ranks.by_feature(x), 10**6, 1)
    ties = ranks.rank_block(part, group, size).ties
    for g, f in itertools.product(range(len(size)), range(x.shape[1])):
        n = size[g]
        factor = stats.tiecorrect(stats.rankdata(x[group == g, f]))
        assert ties[f, g] == pytest.approx((1 - factor) * (n**3 - n), abs=1e-9)


def test_explicit_zeros_are_zeros_and_the_input_is_left_alone():
    x, labels = texts(1)
    stored = csr_array(np.where(x == 0, 5.0, x))
    stored.data[stored.data == 5.0] = 0.0
    before = stored.copy()
    got = ranks.within_group_auroc(stored, labels)
    np.testing.assert_array_equal(got, ranks.within_group_auroc(x, labels))
    np.testing.assert_array_equal(stored.data, before.data)
    assert stored.nnz == before.nnz


def test_ranks_of_whole_groups_are_those_of_the_groups_alone():
    x, labels = texts(2)
    keep = labels.topics != 10
    some = ranks.within_group_ranks(csr_array(x), labels.topics).rows(keep)
    got = ranks.auroc_from_ranks(some, labels.rows(keep))
    expected = ranks.within_group_auroc(x[keep], labels.rows(keep))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(AssertionError, match="NaN"):
        ranks.within_group_ranks(np.array([[1.0], [np.nan]]), np.zeros(2, int))


@given(seed=st.integers(0, 10**6))
def test_swapping_the_labels_of_a_pair_flips_the_score(seed):
    x, labels = texts(seed, group=2)
    first = np.zeros(len(x), bool)
    for g in np.unique(labels.topics):
        first[np.flatnonzero(labels.topics == g)[0]] = True
    labels = labels._replace(concepts=csr_array(np.stack([first, ~first], axis=1)))
    swapped = labels._replace(concepts=csr_array(np.stack([~first, first], axis=1)))
    auroc = ranks.within_group_auroc(x, labels)
    flipped = ranks.within_group_auroc(x, swapped)
    np.testing.assert_allclose(flipped, 1 - auroc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(flipped, auroc[:, ::-1], rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10**6))
def test_percentile_of_a_lone_positive_is_its_auroc(seed):
    x, labels = texts(seed)
    groups, lone = labels.topics, np.zeros(len(x), bool)
    for g in np.unique(groups):
        lone[np.flatnonzero(groups == g)[0]] = True
    percentiles = []
    for g, own in zip(groups[lone], x[lone], strict=True):
        others = x[(groups == g) & ~lone]
        percentiles.append(((others < own).mean(0) + (others <= own).mean(0)) / 2)
    percentiles = np.mean(percentiles, axis=0)
    auroc = ranks.within_group_auroc(x, labels._replace(concepts=csr_array(lone[:, None])))[:, 0]
    np.testing.assert_allclose(percentiles, auroc, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_aurocs_by_group_average_to_the_auroc(seed):
    x, labels = texts(seed, n_features=3)
    by_group = ranks.aurocs_by_group(x, labels)
    assert by_group.shape == (3, 4)
    expected = np.diag(by_sklearn(x, labels))
    known = np.isfinite(expected)
    np.testing.assert_allclose(np.nanmean(by_group[known], 1), expected[known], atol=1e-12)
    assert np.isnan(by_group[~known]).all()


def test_centred_values_have_group_means_of_zero_and_keep_differences():
    x, labels = texts(3)
    groups = labels.topics
    got = ranks.centred(x.astype(float), groups)
    for g in np.unique(groups):
        inside = groups == g
        np.testing.assert_allclose(got[inside], x[inside] - x[inside].mean(0), atol=1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 40), n_groups=st.integers(1, 5))
def test_midranks_are_those_of_scipy_in_each_group(seed, n, n_groups):
    rng = np.random.default_rng(seed)
    values, groups = rng.integers(-2, 3, n) / 2, rng.integers(-3, n_groups, n)
    got = ranks.midranks(values, groups)
    for g in np.unique(groups):
        np.testing.assert_array_equal(got[groups == g], stats.rankdata(values[groups == g]))

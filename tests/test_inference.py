"""Rank tests, intervals and power against scipy, scikit-learn, enumeration and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import roc_auc_score

from discovery import inference, permutation


def by_sklearn(values, positive, groups):
    """Within-group AUROC as scikit-learn gives it, averaged over the groups that have one."""
    return np.mean(
        [
            roc_auc_score(positive[groups == g], values[groups == g])
            for g in np.unique(groups)
            if 0 < positive[groups == g].sum() < (groups == g).sum()
        ]
    )


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
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 6), per_group=st.integers(1, 4))
def test_the_p_value_is_that_of_enumeration(seed, levels, per_group):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, 15).astype(float)
    groups = np.repeat([0, 1, 2], 5)
    positive = np.concatenate([rng.permutation(5) < per_group for _ in range(3)])
    sums, observed = enumerated(values, positive, groups)
    test = inference.rank_test(values, positive, groups)
    assert test.p == pytest.approx(np.mean(sums >= observed - 1e-9), abs=1e-12)
    assert test.auroc == pytest.approx(by_sklearn(values, positive, groups), abs=1e-12)
    assert test.exact


def test_rank_test_takes_groups_of_different_sizes_and_skips_those_without_a_pair():
    values = np.array([3.0, 1, 2, 2, 5, 5, 4, 0, 9, 9])
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 3])
    positive = np.array([1, 0, 0, 1, 0, 1, 0, 0, 1, 0], bool)
    kept = groups < 2
    sums, observed = enumerated(values[kept], positive[kept], groups[kept])
    test = inference.rank_test(values, positive, groups)
    assert test.p == pytest.approx(np.mean(sums >= observed), abs=1e-12)


def test_rank_test_agrees_with_permutation():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 30)
    positive = np.tile(np.arange(30) == 0, 12)
    values = np.maximum(rng.normal(0, 1, 360) + 0.5 * positive, 0)  # half of them tie at zero
    test = inference.rank_test(values, positive, groups)
    ranks = np.stack([stats.rankdata(values[groups == g]) for g in range(12)])
    drawn = ranks[np.arange(12), rng.integers(0, 30, (200_000, 12))].sum(1)
    expected = np.mean(drawn >= ranks[:, 0].sum())
    assert test.p == pytest.approx(expected, abs=4 * np.sqrt(expected / 200_000))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_rank_test_is_blind_to_monotone_transforms(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-5, 6, 24).astype(float)
    groups = np.repeat(np.arange(4), 6)
    positive = np.tile(np.arange(6) < 2, 4)
    test = inference.rank_test(values, positive, groups)
    assert inference.rank_test(np.exp(values), positive, groups) == test
    assert inference.rank_test(values + 100.0 * groups, positive, groups) == test


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_rank_test_is_valid_under_the_null(levels):
    """P(p <= alpha) <= alpha at every alpha, over all choices of positives; sharp without ties."""
    values = np.random.default_rng(levels).integers(0, levels, 18).astype(float)
    groups = np.repeat([0, 1, 2], 6)
    p = []
    for chosen in itertools.product(range(6), repeat=3):
        positive = np.zeros(18, bool)
        positive[np.arange(3) * 6 + np.array(chosen)] = True
        p.append(inference.rank_test(values, positive, groups).p)
    share = np.array([np.mean(np.array(p) <= alpha + 1e-12) for alpha in p])
    np.testing.assert_allclose(share, p, atol=1e-12)  # each attained level is exact
    assert min(p) >= 1 / 6**3 - 1e-12


def test_rank_test_needs_a_group_with_both_kinds():
    with pytest.raises(ValueError, match="nothing to test"):
        inference.rank_test(np.ones(4), np.array([1, 1, 0, 0], bool), np.array([0, 0, 1, 1]))


def sparse(seed: int, n: int, m: int, density: float, n_groups: int = 1):
    """Values of which most are zero, with m positives a group that fire twice as often."""
    rng = np.random.default_rng(seed)
    positive = np.tile(np.arange(n) < m, n_groups)
    fires = rng.random(n * n_groups) < np.where(positive, 2 * density, density)
    return rng.exponential(1, n * n_groups) * fires, positive, np.repeat(np.arange(n_groups), n)


def p_values(monkeypatch: pytest.MonkeyPatch, data, budgets):
    """The p-value of the same test with several budgets, and whether it was exact."""
    tests = []
    for budget in budgets:
        monkeypatch.setattr(permutation, "BUDGET", budget)
        tests.append(inference.rank_test(*data))
    return tests


@pytest.mark.parametrize("density", [0.02, 0.2, 1.0])
@pytest.mark.parametrize(("n", "m", "n_groups"), [(400, 8, 1), (300, 20, 1), (150, 3, 4)])
def test_rounded_ranks_and_the_approximation_agree_with_the_exact_test(
    monkeypatch, density, n, m, n_groups
):
    for seed in range(6):
        data = sparse(seed, n, m, density, n_groups)
        full, rounded = p_values(monkeypatch, data, [1e12, 1e6])
        assert full.exact
        assert rounded.exact or density == 1.0  # then the grid would be too coarse
        assert rounded.p == pytest.approx(full.p, rel=0.1, abs=0.005)
        monkeypatch.setattr(permutation, "_grid", lambda *_: None)
        approximate = inference.rank_test(*data)
        monkeypatch.undo()
        assert not approximate.exact
        assert approximate.auroc == full.auroc
        if density * m * n_groups >= permutation.FEW:  # else only exact tests are made
            assert approximate.p == pytest.approx(full.p, rel=0.25, abs=2e-3)


def test_the_approximation_is_near_in_the_tail():
    """At p of about 1e-4 with skewed ranks, where the normal approximation is 3 times too low."""
    positive, groups = np.arange(4000) < 120, np.zeros(4000, int)
    rng = np.random.default_rng(0)
    values = np.zeros(4000)
    values[:18] = rng.exponential(1, 18)  # 18 of 120 positives fire, and 182 of 3,880 others
    values[200:382] = rng.exponential(1, 182)
    (group,) = [np.rint(2 * stats.rankdata(values)).astype(np.int64)]
    data = [permutation.Group(group - np.bincount(group).argmax(), positive)]
    exact = permutation._exact_p(data, 10)
    assert permutation._approximate_p(data) == pytest.approx(exact, rel=0.6)
    z = stats.norm.isf(permutation._approximate_p(data))
    normal = stats.mannwhitneyu(
        values[positive], values[~positive], alternative="greater", method="asymptotic"
    ).pvalue
    assert normal < exact / 2
    assert z > 3
    assert inference.rank_test(values, positive, groups).p == pytest.approx(exact, rel=0.6)


def test_p_is_uniform_for_few_positives_of_a_sparse_latent():
    """The share of p <= alpha never exceeds alpha, where a normal approximation triples it."""
    values, positive, groups = sparse(0, 3000, 12, 0.01)
    rng = np.random.default_rng(0)
    p = np.array(
        [inference.rank_test(values, rng.permutation(positive), groups).p for _ in range(400)]
    )
    for alpha in (0.01, 0.05, 0.12, 0.5):
        assert np.mean(p <= alpha) <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 400)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_latent_that_never_varies_is_no_discovery(value):
    positive = np.arange(20) < 5
    test = inference.rank_test(np.full(20, value), positive, np.zeros(20, int))
    assert test == (0.5, 1.0, True)
    many = np.zeros(5000)
    test = inference.rank_test(many, np.arange(5000) < 2000, np.zeros(5000, int))
    assert (test.auroc, test.p) == (0.5, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_values_are_those_of_scipy(p):
    np.testing.assert_allclose(
        inference.benjamini_hochberg(np.array(p)), stats.false_discovery_control(p), atol=1e-14
    )


def test_many_q_values_are_those_of_scipy():
    """They are sorted by drawers; half of them are near zero, and some are equal."""
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(30_000), rng.random(30_000) ** 20, np.full(5000, 1.0), [0.0]])
    p[::3] = np.round(p[::3], 3)
    rng.shuffle(p)
    q = inference.benjamini_hochberg(p)
    np.testing.assert_allclose(q, stats.false_discovery_control(p), rtol=1e-12)


def test_a_missing_p_value_is_no_test():
    p = np.array([0.01, np.nan, 0.2, np.nan, 0.03])
    q = inference.benjamini_hochberg(p)
    assert np.isnan(q[[1, 3]]).all()
    np.testing.assert_allclose(q[[0, 2, 4]], stats.false_discovery_control(p[[0, 2, 4]]))


def test_no_p_values_give_no_q_values():
    assert inference.benjamini_hochberg(np.array([])).shape == (0,)
    p = np.random.default_rng(0).random(5000).round(3)
    for workers in (2, 7):
        np.testing.assert_array_equal(
            inference.benjamini_hochberg(p, workers), inference.benjamini_hochberg(p)
        )


def test_t_interval_is_that_of_scipy_and_leaves_out_what_is_missing():
    values = np.random.default_rng(0).normal(0.1, 0.2, (5, 12))
    values[0, 3:7] = np.nan
    got = inference.t_interval(values)
    for row, mean, low, high in zip(values, *got, strict=True):
        known = row[np.isfinite(row)]
        expected = stats.ttest_1samp(known, 0).confidence_interval()
        assert mean == pytest.approx(known.mean())
        assert (low, high) == pytest.approx((expected.low, expected.high))


def test_intervals_know_nothing_from_one_value_and_stay_in_bounds():
    values = np.array([[0.3, np.nan], [np.nan, np.nan], [-0.9, 0.9]])
    mean, low, high = inference.t_interval(values)
    np.testing.assert_allclose(mean, [0.3, np.nan, 0.0])
    np.testing.assert_array_equal(low, [-1.0, -1.0, -1.0])
    np.testing.assert_array_equal(high, [1.0, 1.0, 1.0])
    none = inference.auroc_interval(values[1:2])
    assert np.isnan(none.mean[0])
    assert (none.low[0], none.high[0]) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_auroc_interval_holds_the_mean_and_stays_between_0_and_1(values):
    mean, low, high = (float(x[0]) for x in inference.auroc_interval(np.array([values])))
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
    _, low, high = inference.auroc_interval(values)
    assert np.mean((low <= auroc) & (auroc <= high)) > 0.94


def test_detectable_auroc_is_detected_with_the_stated_power():
    alpha = 0.01
    auroc = inference.detectable_auroc(8, 20, alpha)
    shift = np.sqrt(2) * stats.norm.ppf(auroc)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 20)
    positive = np.tile(np.arange(20) == 0, 8)
    p = [
        inference.rank_test(rng.normal(0, 1, 160) + shift * positive, positive, groups).p
        for _ in range(600)
    ]
    assert np.mean(np.array(p) <= alpha) == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / 600))


def test_detectable_auroc_of_the_packaged_corpus():
    first_rejection = inference.detectable_auroc(12, 171, 0.05 / 342)
    assert first_rejection == pytest.approx(0.84, abs=0.005)
    assert first_rejection > inference.detectable_auroc(12, 171, 0.05 * 50 / 342) > 0.7
    assert first_rejection > inference.detectable_auroc(24, 171, 0.05 / 342)


def test_nothing_is_detectable_where_a_perfect_score_is_not_significant():
    assert np.isnan(inference.detectable_auroc(2, 6, 0.05 / 342))


@pytest.mark.parametrize(("auroc", "others"), [(0.75, 100), (0.85, 200), (0.95, 40)])
def test_needed_positives_detect_it_with_the_stated_power(auroc, others):
    m = inference.needed_positives(auroc, others, 0.01)
    rng = np.random.default_rng(0)
    positive = np.arange(m + others) < m
    values = rng.normal(0, 1, (200, m + others)) + np.sqrt(2) * stats.norm.ppf(auroc) * positive
    one = np.zeros(m + others, int)
    p = np.array([inference.rank_test(row, positive, one).p for row in values])
    assert 0.7 < np.mean(p <= 0.01) < 0.97  # the formula errs on the side of more texts


def test_more_is_needed_for_less():
    needed = [inference.needed_positives(a, 2000, 1e-3) for a in (0.95, 0.85, 0.75, 0.6)]
    assert needed == sorted(needed)
    assert inference.needed_positives(0.75, 2000, 1e-5) > needed[2]
    assert inference.needed_positives(0.75, 2000, 1e-3, power=0.95) > needed[2]


def test_too_few_others_are_said_to_be_too_few():
    with pytest.raises(ValueError, match=r"3 other texts are too few to detect an AUROC of 0\.6"):
        inference.needed_positives(0.6, 3, 1e-3)


def test_needed_texts_are_said_in_a_sentence():
    counts = [inference.needed_positives(a, 500, 0.01) for a in (0.75, 0.85, 0.95)]
    assert inference.needed_texts(500, 0.01) == (
        f"{counts[0]}, {counts[1]} and {counts[2]} texts a concept detect an AUROC of .75, .85 and "
        ".95 with 80 % power at level 0.01"
    )


def test_effects_that_no_number_of_texts_detects_are_left_out():
    assert "texts a concept detect an AUROC of .95 with" in inference.needed_texts(8, 1e-3)
    assert inference.needed_texts(2, 1e-6).startswith("2 other texts are too few")

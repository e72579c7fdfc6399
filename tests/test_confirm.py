"""Step 5 of the verdict protocol: two tests a concept, with errors counted by concept."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array

from discovery.align import level_of, rejections
from discovery.confirm import Confirmation, adjusted, within_concepts
from discovery.inference import Interval
from discovery.labels import Labels


def procedure(p: np.ndarray, q: float) -> np.ndarray:
    """Which tests are rejected at q, step by step as Benjamini and Bogomolov (2014) have it."""
    n = p.shape[1]
    simes = np.array([min(2 * min(pair), max(pair)) for pair in p.T])
    counts = [k for k in range(1, n + 1) if np.sum(simes <= q * k / n) >= k]
    level = q * max(counts, default=0) / n
    rejected = np.zeros(p.shape, bool)
    for c in range(n):
        if simes[c] > level:
            continue
        weaker = int(np.argmax(p[:, c]))
        if p[weaker, c] <= level:
            rejected[:, c] = True
        elif p[1 - weaker, c] <= level / 2:
            rejected[1 - weaker, c] = True
    return rejected


def p_values(seed: int, n: int, power: float, ties: bool) -> np.ndarray:
    p = np.random.default_rng(seed).random((2, n)) ** power
    return np.ceil(p * 20) / 20 if ties else p


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 14),
    power=st.sampled_from([1.0, 3.0, 8.0]),
    ties=st.booleans(),
)
def test_a_q_value_is_the_smallest_level_at_which_the_test_is_rejected(seed, n, power, ties):
    p = p_values(seed, n, power, ties)
    q = within_concepts(p)
    assert q.min() >= 0
    assert q.max() <= 1
    for level in np.random.default_rng([seed, 1]).random(8):
        np.testing.assert_array_equal(q <= level, procedure(p, level))
    for test in np.ndindex(q.shape):
        assert procedure(p, q[test] * (1 + 1e-12))[test]
        assert not procedure(p, q[test] * (1 - 1e-12))[test]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40))
def test_the_smaller_q_value_of_a_concept_is_that_of_simes_p_values(seed, n):
    p = p_values(seed, n, 4.0, ties=False)
    simes = np.minimum(2 * p.min(0), p.max(0))
    expected = stats.false_discovery_control(simes)
    np.testing.assert_allclose(within_concepts(p).min(0), expected, rtol=1e-12)


def test_errors_are_controlled_by_concept_where_few_are_represented():
    """Of 100 concepts four have both tests at p near zero, and false ones one test or the other.

    Among all tests by themselves, errors are 5 % of tests and so nearly 10 % of concepts.
    """
    rng = np.random.default_rng(0)
    ours, by_test = [], []
    for _ in range(2000):
        p = rng.random((2, 100))
        p[:, :4] = 1e-9
        for found, shares in (
            ((within_concepts(p) <= 0.05).any(0), ours),
            (
                (stats.false_discovery_control(p.ravel()).reshape(2, -1) <= 0.05).any(0),
                by_test,
            ),
        ):
            shares.append(found[4:].sum() / found.sum())
    error = np.std(ours) / len(ours) ** 0.5
    assert np.mean(ours) <= 0.05 + 3 * error
    assert np.mean(by_test) > 0.07


def confirmation(p: np.ndarray, specific: np.ndarray) -> Confirmation:
    n = len(p)
    nobody = np.zeros(0, np.int64)
    labels = Labels(csr_array(np.zeros((0, n), bool)), nobody, nobody)
    interval = Interval(p, p, p)
    none = np.zeros((0, n))
    return Confirmation(
        none, labels, np.zeros((n, 1)), interval, p, p, specific, specific, specific
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_step_6_is_over_the_rejections_of_step_5(seed):
    rng = np.random.default_rng(seed)
    p = p_values(seed, 20, 6.0, ties=False)
    specific = rng.random((2, 20)) ** 3
    parts = adjusted(*map(confirmation, p, specific), 0.05)
    rejected = np.stack([part.q <= 0.05 for part in parts])
    np.testing.assert_array_equal(rejected, procedure(p, 0.05))
    specific_q = np.stack([part.specific_q for part in parts])
    np.testing.assert_array_equal(np.isfinite(specific_q), rejected)
    if rejected.any():
        expected = stats.false_discovery_control(specific[rejected])
        np.testing.assert_allclose(specific_q[rejected], expected)
    assert rejections(*parts, 0.05) == rejected.sum()
    assert level_of(*parts, 0.05) == 0.05 * max(rejected.any(0).sum(), 1) / 40

"""Principal components against scikit-learn, correlations against the textbook formula."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.decomposition import PCA

from discovery.concepts import load_concepts
from discovery.contrast import Reliability
from discovery.geometry import (
    Norm,
    correlate,
    geometry_rows,
    human_norms,
    principal_components,
    vector_rows,
)


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 12)) * np.geomspace(4, 0.5, 12) + 7


def test_components_equal_scikit_learn_up_to_sign(vectors):
    ours = principal_components(vectors, k=3)
    pca = PCA(3, svd_solver="full").fit(vectors)
    np.testing.assert_allclose(ours.shares, pca.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(ours.axes), np.abs(pca.components_), atol=1e-10)
    np.testing.assert_allclose(np.abs(ours.scores), np.abs(pca.transform(vectors)), atol=1e-10)
    np.testing.assert_allclose((vectors - vectors.mean(0)) @ ours.axes.T, ours.scores, atol=1e-10)


def test_signs_follow_the_norms_else_the_largest_entry(vectors):
    free = principal_components(vectors)
    largest = np.argmax(np.abs(free.axes), axis=1)
    assert (free.axes[[0, 1], largest] > 0).all()
    np.testing.assert_allclose(principal_components(-vectors).axes, free.axes)
    rng = np.random.default_rng(1)
    for sign in (1, -1):
        valence = sign * free.scores[:, 0] + rng.normal(size=20)
        valence[::3] = np.nan
        oriented = principal_components(vectors, [valence])
        assert correlate(oriented.scores[:, 0], valence).r > 0.5
        np.testing.assert_allclose(oriented.scores[:, 0], sign * free.scores[:, 0])
        np.testing.assert_allclose(oriented.axes[0], sign * free.axes[0])
        np.testing.assert_allclose(oriented.scores[:, 1], free.scores[:, 1])


def test_correlation_and_interval_are_fishers():
    rng = np.random.default_rng(2)
    x = rng.normal(size=50)
    y = 0.6 * x + rng.normal(size=50)
    y[5:15] = np.nan
    known = ~np.isnan(y)
    ours = correlate(x, y)
    r = np.corrcoef(x[known], y[known])[0, 1]
    half = stats.norm.ppf(0.975) / np.sqrt(40 - 3)
    assert ours.n == 40
    assert ours.r == pytest.approx(r)
    assert (ours.low, ours.high) == pytest.approx(np.tanh(np.arctanh(r) + np.array([-half, half])))


def test_no_correlation_without_four_varying_pairs():
    x = np.arange(5.0)
    assert correlate(x, np.array([1, 2, 4, np.nan, np.nan])) is None
    assert correlate(x, np.ones(5)) is None
    assert correlate(np.ones(5), x) is None
    assert correlate(x, np.array([1, 2, 4, 3, np.nan])).n == 4


def test_rows_hold_every_component_and_norm(vectors):
    concepts = [
        replace(
            concept,
            valence=v,
            arousal=None if i % 2 else v,
            dominance=None,
            valence_vader=-v,
            glasgow_exact=i < 12,
        )
        for i, (concept, v) in enumerate(
            zip(load_concepts()[:20], np.linspace(1, 9, 20).tolist(), strict=True)
        )
    ]
    norms = human_norms(concepts)
    assert [(n.name, n.source) for n in norms] == [
        ("valence", "glasgow"),
        ("arousal", "glasgow"),
        ("dominance", "glasgow"),
        ("valence", "glasgow, exact words"),
        ("arousal", "glasgow, exact words"),
        ("dominance", "glasgow, exact words"),
        ("valence", "vader"),
    ]
    components = principal_components(vectors, [norms[0].values, norms[1].values])
    rows = geometry_rows("blocks.1.hook_resid_post@rule", components, norms)
    assert [(r.norm, r.source, r.component, r.n) for r in rows] == [
        ("valence", "glasgow", 1, 20),
        ("valence", "glasgow", 2, 20),
        ("arousal", "glasgow", 1, 10),
        ("arousal", "glasgow", 2, 10),
        ("valence", "glasgow, exact words", 1, 12),
        ("valence", "glasgow, exact words", 2, 12),
        ("arousal", "glasgow, exact words", 1, 6),
        ("arousal", "glasgow, exact words", 2, 6),
        ("valence", "vader", 1, 20),
        ("valence", "vader", 2, 20),
    ]
    assert rows[0].r == pytest.approx(-rows[8].r)
    assert rows[0].r > 0
    assert rows[3].r > 0
    assert [r.variance for r in rows[:2]] == components.shares.tolist()
    assert all(r.low < r.r < r.high for r in rows)


def test_vector_rows_are_in_units_of_the_residual_norm(vectors):
    reliability = Reliability(np.full(20, 0.5), np.linspace(0, 1, 20), np.linspace(0.1, 1, 20))
    names = [f"concept {i}" for i in range(20)]
    rows = [
        vector_rows(
            "blocks.1.hook_resid_post@rule",
            names,
            scale * vectors,
            scale * 8.0,
            reliability,
            principal_components(scale * vectors),
        )
        for scale in (1.0, 3.0)
    ]
    assert rows[0][4].concept == "concept 4"
    assert rows[0][4].norm == pytest.approx(np.linalg.norm(vectors[4]) / 8)
    assert rows[0][4].reliability == reliability.reliability[4]
    assert rows[0][4].ceiling == reliability.ceiling[4]
    for a, b in zip(*rows, strict=True):
        assert (a.norm, a.pc1, a.pc2) == pytest.approx((b.norm, b.pc1, b.pc2))
    assert np.std([r.pc1 for r in rows[0]]) > np.std([r.pc2 for r in rows[0]]) > 0


def test_two_concepts_and_identical_ones_still_have_a_plane():
    pair = principal_components(np.array([[1.0, 0, 0], [-1, 0, 0]]), [np.array([-1.0, 1])])
    np.testing.assert_allclose(pair.shares, [1, 0], atol=1e-12)
    same = principal_components(np.ones((3, 4)))
    np.testing.assert_array_equal(same.shares, [0, 0])
    np.testing.assert_allclose(same.scores, 0)
    assert geometry_rows("s@rule", same, [Norm("valence", "glasgow", np.arange(3.0))]) == []

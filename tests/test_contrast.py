"""Contrastive vectors against a naive loop, planted directions, and theory."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from discovery.contrast import (
    contrastive_vectors,
    nearest,
    neutral_axes,
    project_out,
    split_half,
    unit_rows,
)
from saes.errors import UserError


def world(concepts=6, topics=8, d=32, signal=1.0, noise=1.0, seed=0):
    """Residuals = concept direction + topic direction + noise; one text a concept and topic."""
    rng = np.random.default_rng(seed)
    planted = signal * rng.normal(size=(concepts, d)) / np.sqrt(d)
    nuisance = rng.normal(size=(topics, d))
    labels = np.repeat(np.arange(concepts), topics)
    topic = np.tile(np.arange(topics), concepts)
    x = planted[labels] + nuisance[topic] + noise * rng.normal(size=(len(labels), d)) / np.sqrt(d)
    return x.astype(np.float32), labels, topic, planted


def test_recipe_equals_a_naive_reference():
    x, labels, _, _ = world()
    rng = np.random.default_rng(1)
    neutral = (rng.normal(size=(40, 32)) * np.geomspace(5, 0.1, 32) + 3).astype(np.float32)
    # An unbalanced corpus, in another order: the grand mean is over concepts, not over texts.
    order = rng.permutation(len(labels))[:-5]
    x, labels = x[order], labels[order]
    means = np.stack([x[labels == c].astype(np.float64).mean(0) for c in range(6)])
    expected = means - means.mean(0)
    pca = PCA(svd_solver="full").fit(neutral.astype(np.float64))
    n = next(k for k in range(33) if pca.explained_variance_ratio_[:k].sum() >= 0.5)
    for axis in pca.components_[:n]:
        expected = expected - np.outer(expected @ axis, axis)

    result = contrastive_vectors(x, labels, 6, neutral, 0.5)
    assert len(result.neutral) == n > 1
    assert result.neutral_variance == pytest.approx(pca.explained_variance_ratio_[:n].sum())
    np.testing.assert_allclose(result.vectors, expected, atol=1e-9)
    np.testing.assert_allclose(result.vectors @ result.neutral.T, 0, atol=1e-9)


def test_zero_variance_keeps_the_plain_differences():
    x, labels, _, _ = world()
    result = contrastive_vectors(x, labels, 6, np.zeros((1, 32), dtype=np.float32), 0.0)
    assert len(result.neutral) == 0 == result.neutral_variance
    np.testing.assert_allclose(result.vectors.mean(0), 0, atol=1e-9)
    assert np.linalg.norm(result.vectors) > 1


def test_planted_directions_are_recovered_and_nuisance_is_removed():
    rng = np.random.default_rng(3)
    x, labels, _, planted = world(topics=12, d=64, signal=2, noise=0.5)
    shift = np.zeros(64)
    shift[0] = 1
    # A nuisance that one concept happens to carry, and that varies in neutral text.
    x = x + 5.0 * shift * (labels == 2)[:, None]
    neutral = 0.05 * rng.normal(size=(50, 64)) + 10 * rng.normal(size=(50, 1)) * shift
    result = contrastive_vectors(x, labels, 6, neutral)
    truth = project_out(planted - planted.mean(0), result.neutral)
    cosine = np.sum(unit_rows(result.vectors) * unit_rows(truth), axis=1)
    assert cosine.min() > 0.97
    assert abs(unit_rows(result.vectors)[2, 0]) < 0.02


def test_reliability_follows_theory_and_vanishes_for_noise():
    # In high dimension E cos of two halves of n/2 topics is s / (s + v / (n / 2)), with s the
    # squared length of the true difference and v that of the noise; stepped up: s / (s + v / n).
    concepts, topics, d = 30, 12, 600
    for noise in (1.0, 3.0):
        x, labels, topic, planted = world(concepts, topics, d, noise=noise)
        result = split_half(x, labels, topic, concepts, np.zeros((0, d)), halves=20)
        signal = np.sum((planted - planted.mean(0)) ** 2, axis=1)
        error = noise**2 * (1 - 1 / concepts) / topics
        # The ceiling is what the estimate reaches with the true vector.
        vectors = contrastive_vectors(x, labels, concepts, np.zeros((1, d)), 0.0).vectors
        truth = np.sum(unit_rows(vectors) * unit_rows(planted - planted.mean(0)), axis=1)
        for ours, expected in (
            (result.cosine, signal / (signal + 2 * error)),
            (result.reliability, signal / (signal + error)),
            (result.ceiling, truth),
        ):
            np.testing.assert_allclose(ours, expected, atol=0.12)  # one concept
            assert ours.mean() == pytest.approx(expected.mean(), abs=0.015)
    x, labels, topic, _ = world(concepts, topics, d, signal=0)
    nothing = split_half(x, labels, topic, concepts, np.zeros((0, d)), halves=20)
    assert abs(nothing.cosine.mean()) < 0.02
    assert nothing.reliability.min() == 0


def test_halves_are_seeded_and_named_topics_are_numbers():
    x, labels, topic, _ = world()
    names = np.array(list("hgfedcba"))[topic]
    axes = np.zeros((0, 32))
    once = split_half(x, labels, names, 6, axes, seed=1)
    again = split_half(x, labels, names, 6, axes, seed=1)
    other = split_half(x, labels, names, 6, axes, seed=2)
    np.testing.assert_array_equal(once.cosine, again.cosine)
    assert (once.cosine != other.cosine).any()
    assert np.abs(once.cosine - other.cosine).max() < 0.1


def test_nearest_is_by_cosine_with_ties_to_the_lower_index():
    vectors = np.array([[2.0, 0], [1, 0], [1, 1], [3, 0], [-1, 0]])
    np.testing.assert_array_equal(
        nearest(vectors, 3), [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2], [2, 0, 1]]
    )
    assert nearest(vectors, 9).shape == (5, 4)


def test_zero_rows_have_no_direction():
    np.testing.assert_array_equal(unit_rows(np.array([[0.0, 0], [3, 4]])), [[0, 0], [0.6, 0.8]])


def test_bad_input_is_refused_with_the_way_out():
    x, labels, topic, _ = world()
    with pytest.raises(UserError, match=r"1 of 7 concepts have no text \(first: number 6\)"):
        contrastive_vectors(x, labels, 7, x)
    with pytest.raises(UserError, match="at least 2 concepts"):
        contrastive_vectors(x[:8], labels[:8], 1, x)
    with pytest.raises(UserError, match=r"in \[0, 1\), got 1"):
        contrastive_vectors(x, labels, 6, x, 1.0)
    with pytest.raises(UserError, match="no variance to remove"):
        neutral_axes(np.ones((4, 3)), 0.5)
    lone = (labels != 4) | (topic == 0)
    with pytest.raises(UserError, match=r"1 of 6 .* too few topics .*number 4"):
        split_half(x[lone], labels[lone], topic[lone], 6, np.zeros((0, 32)))

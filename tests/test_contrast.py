"""Contrastive vectors against a naive loop, planted directions, and theory."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.decomposition import PCA

from discovery.contrast import (
    contrastive_vectors,
    differences,
    nearest,
    neutral_axes,
    project_out,
    split_half,
    unit_rows,
)
from discovery.labels import Labels, single
from saes.errors import UserError


def world(concepts=6, topics=8, d=32, signal=1.0, noise=1.0, seed=0):
    """Residuals = concept direction + topic direction + noise; one text a concept and topic."""
    rng = np.random.default_rng(seed)
    planted = signal * rng.normal(size=(concepts, d)) / np.sqrt(d)
    nuisance = rng.normal(size=(topics, d))
    labels = np.repeat(np.arange(concepts), topics)
    topic = np.tile(np.arange(topics), concepts)
    x = planted[labels] + nuisance[topic] + noise * rng.normal(size=(len(labels), d)) / np.sqrt(d)
    return x.astype(np.float32), single(labels, concepts, topic, topic), planted


def test_recipe_equals_a_naive_reference():
    x, labels, _ = world()
    rng = np.random.default_rng(1)
    neutral = (rng.normal(size=(40, 32)) * np.geomspace(5, 0.1, 32) + 3).astype(np.float32)
    # An unbalanced corpus, in another order: the grand mean is over concepts, not over texts.
    order = rng.permutation(len(x))[:-5]
    x, labels = x[order], labels.rows(order)
    means = np.stack([x[labels.of(c)].astype(np.float64).mean(0) for c in range(6)])
    expected = means - means.mean(0)
    pca = PCA(svd_solver="full").fit(neutral.astype(np.float64))
    n = next(k for k in range(33) if pca.explained_variance_ratio_[:k].sum() >= 0.5)
    for axis in pca.components_[:n]:
        expected = expected - np.outer(expected @ axis, axis)

    result = contrastive_vectors(x, labels, neutral, 0.5)
    assert len(result.neutral) == n > 1
    assert result.neutral_variance == pytest.approx(pca.explained_variance_ratio_[:n].sum())
    np.testing.assert_allclose(result.vectors, expected, atol=1e-9)
    np.testing.assert_allclose(result.vectors @ result.neutral.T, 0, atol=1e-9)


@pytest.mark.parametrize("n", [20, 40, 200])
def test_neutral_axes_are_the_principal_components_of_scikit_learn(n):
    rng = np.random.default_rng(n)
    neutral = (rng.normal(size=(n, 24)) * np.geomspace(5, 0.5, 24) + 3).astype(np.float32)
    axes, explained = neutral_axes(neutral, 0.8)
    pca = PCA(svd_solver="full").fit(neutral.astype(np.float64))
    assert explained == pytest.approx(pca.explained_variance_ratio_[: len(axes)].sum())
    assert pca.explained_variance_ratio_[: len(axes) - 1].sum() < 0.8 <= explained
    cosines = np.abs(np.sum(axes * pca.components_[: len(axes)], axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    with pytest.raises(UserError, match=f"{n} neutral texts show no variance"):
        neutral_axes(np.ones((n, 24)), 0.5)


def test_zero_variance_keeps_the_plain_differences():
    x, labels, _ = world()
    result = contrastive_vectors(x, labels, np.zeros((1, 32), dtype=np.float32), 0.0)
    assert len(result.neutral) == 0 == result.neutral_variance
    np.testing.assert_allclose(result.vectors.mean(0), 0, atol=1e-9)
    assert np.linalg.norm(result.vectors) > 1


def test_planted_directions_are_recovered_and_nuisance_is_removed():
    rng = np.random.default_rng(3)
    x, labels, planted = world(topics=12, d=64, signal=2, noise=0.5)
    shift = np.zeros(64)
    shift[0] = 1
    # A nuisance that one concept happens to carry, and that varies in neutral text.
    x = x + 5.0 * shift * labels.of(2)[:, None]
    neutral = 0.05 * rng.normal(size=(50, 64)) + 10 * rng.normal(size=(50, 1)) * shift
    result = contrastive_vectors(x, labels, neutral)
    truth = project_out(planted - planted.mean(0), result.neutral)
    cosine = np.sum(unit_rows(result.vectors) * unit_rows(truth), axis=1)
    assert cosine.min() > 0.97
    assert abs(unit_rows(result.vectors)[2, 0]) < 0.02


def test_reliability_follows_theory_and_vanishes_for_noise():
    # In high dimension E cos of two halves of n/2 topics is s / (s + v / (n / 2)), with s the
    # squared length of the true difference and v that of the noise; stepped up: s / (s + v / n).
    concepts, topics, d = 30, 12, 600
    for noise in (1.0, 3.0):
        x, labels, planted = world(concepts, topics, d, noise=noise)
        result = split_half(x, labels, np.zeros((0, d)), halves=20)
        signal = np.sum((planted - planted.mean(0)) ** 2, axis=1)
        error = noise**2 * (1 - 1 / concepts) / topics
        # The ceiling is what the estimate reaches with the true vector.
        vectors = contrastive_vectors(x, labels, np.zeros((1, d)), 0.0).vectors
        truth = np.sum(unit_rows(vectors) * unit_rows(planted - planted.mean(0)), axis=1)
        for ours, expected in (
            (result.cosine, signal / (signal + 2 * error)),
            (result.reliability, signal / (signal + error)),
            (result.ceiling, truth),
        ):
            np.testing.assert_allclose(ours, expected, atol=0.12)  # one concept
            assert ours.mean() == pytest.approx(expected.mean(), abs=0.015)
    x, labels, _ = world(concepts, topics, d, signal=0)
    nothing = split_half(x, labels, np.zeros((0, d)), halves=20)
    assert abs(nothing.cosine.mean()) < 0.02
    assert nothing.reliability.min() == 0


def test_halves_are_seeded():
    x, labels, _ = world()
    axes = np.zeros((0, 32))
    once = split_half(x, labels, axes, seed=1)
    again = split_half(x, labels, axes, seed=1)
    other = split_half(x, labels, axes, seed=2)
    np.testing.assert_array_equal(once.cosine, again.cosine)
    assert (once.cosine != other.cosine).any()
    assert np.abs(once.cosine - other.cosine).max() < 0.1


def flat(labels: Labels, units: np.ndarray) -> Labels:
    """The same texts without topics."""
    return labels._replace(topics=np.zeros_like(labels.topics), units=units)


def test_halves_keep_topics_whole_or_else_units():
    """Texts with one mark in both halves would make the mark look like a reliable vector."""
    x, labels, _ = world(concepts=4, topics=6, d=64, signal=0, noise=0.1)
    x = x + np.random.default_rng(5).normal(size=x.shape)  # a mark for each concept and topic
    copies = np.tile(np.arange(len(x)), 10)
    many, several, axes = x[copies], labels.rows(copies), np.zeros((0, 64))
    assert split_half(many, several, axes).cosine.max() < 0.3
    assert split_half(many, flat(several, copies), axes).cosine.max() < 0.3
    assert split_half(many, flat(several, np.arange(len(copies))), axes).cosine.min() > 0.6


def test_a_text_counts_for_each_of_its_concepts():
    x, labels, _ = world()
    dense = labels.dense()
    dense[::4, 5] = True
    dense[::7] = False
    several = labels._replace(concepts=csr_array(dense))
    means = np.stack([x[dense[:, c]].astype(np.float64).mean(0) for c in range(6)])
    np.testing.assert_allclose(differences(x, several), means - means.mean(0), atol=1e-9)
    dense[:, 3] = False
    without = differences(x, labels._replace(concepts=csr_array(dense)))
    rest = np.delete(np.arange(6), 3)
    np.testing.assert_array_equal(without[3], 0)
    np.testing.assert_allclose(without[rest], means[rest] - means[rest].mean(0), atol=1e-9)


def test_swapping_the_labels_of_a_pair_flips_their_difference():
    x, labels, _ = world(concepts=2)
    swapped = labels._replace(concepts=csr_array(labels.dense()[:, ::-1]))
    np.testing.assert_allclose(differences(x, swapped), -differences(x, labels), atol=1e-9)


def test_nearest_is_by_cosine_with_ties_to_the_lower_index():
    vectors = np.array([[2.0, 0], [1, 0], [1, 1], [3, 0], [-1, 0]])
    np.testing.assert_array_equal(
        nearest(vectors, 3), [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2], [2, 0, 1]]
    )
    assert nearest(vectors, 9).shape == (5, 4)


def test_zero_rows_have_no_direction():
    np.testing.assert_array_equal(unit_rows(np.array([[0.0, 0], [3, 4]])), [[0, 0], [0.6, 0.8]])


def test_bad_input_is_refused_with_the_way_out():
    x, labels, _ = world()
    wider = labels._replace(concepts=csr_array(np.pad(labels.dense(), ((0, 0), (0, 1)))))
    with pytest.raises(UserError, match=r"1 of 7 concepts have no text \(first: number 6\)"):
        contrastive_vectors(x, wider, x)
    with pytest.raises(UserError, match="at least 2 concepts"):
        contrastive_vectors(x[:8], single(np.zeros(8, int), 1, np.arange(8), np.arange(8)), x)
    with pytest.raises(UserError, match=r"in \[0, 1\), got 1"):
        contrastive_vectors(x, labels, x, 1.0)
    with pytest.raises(UserError, match="no variance to remove"):
        neutral_axes(np.ones((4, 3)), 0.5)


def test_a_concept_of_one_topic_has_no_reliability():
    x, labels, _ = world()
    lone = ~labels.of(4) | (labels.topics == 0)
    got = split_half(x[lone], labels.rows(lone), np.zeros((0, 32)))
    rest = np.delete(np.arange(6), 4)
    for values in got:
        assert np.isnan(values[4])
        assert np.isfinite(values[rest]).all()
    one_unit = split_half(x, flat(labels, np.zeros_like(labels.units)), np.zeros((0, 32)))
    assert np.isnan(one_unit.ceiling).all()

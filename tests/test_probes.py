"""Dense readers against scikit-learn, and on planted directions."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from discovery import contrast, scores
from discovery.probes import (
    Labels,
    along,
    concept_means,
    cross_fit,
    fit_probe,
    fit_vectors,
    shrunken_covariance,
)

N, TOPICS, WIDTH = 8, 12, 16


def planted(seed: int, strength: float = 1.0) -> tuple[np.ndarray, Labels]:
    """Residuals with a direction for each concept, unequal noise and shifts by topic."""
    rng = np.random.default_rng(seed)
    concepts, topics = np.tile(np.arange(N), TOPICS), np.repeat(np.arange(TOPICS), N)
    directions = np.random.default_rng(99).normal(0, 1, (N, WIDTH))
    noise = rng.normal(0, 1, (N * TOPICS, WIDTH)) * np.geomspace(0.3, 8, WIDTH)
    x = strength * directions[concepts] + noise + rng.normal(0, 3, (TOPICS, WIDTH))[topics]
    return x.astype(np.float32), Labels(concepts, topics, topics // 2, N)


def auroc(values: np.ndarray, labels: Labels) -> float:
    return float(np.mean(scores.aurocs_by_group(values, labels.concepts, labels.topics)))


@pytest.mark.parametrize(("n", "d"), [(200, 5), (40, 30), (10, 30)])
def test_shrunken_covariance_is_that_of_sklearn(n, d):
    x = np.random.default_rng(n).normal(0, 1, (n, d)) * np.arange(1, d + 1)
    x -= x.mean(0)
    expected, _ = ledoit_wolf(x, assume_centered=True)
    np.testing.assert_allclose(shrunken_covariance(x), expected, rtol=1e-10, atol=1e-10)


def means_apart(x, labels):
    """The probe without whitening."""
    return along(concept_means(x - x.mean(0), labels))


def test_covariance_of_a_sphere_is_shrunken_all_the_way():
    x = np.concatenate([np.eye(4), -np.eye(4)])
    np.testing.assert_allclose(shrunken_covariance(x), np.eye(4) / 4, atol=1e-12)


def test_probe_of_two_concepts_is_the_discriminant_of_sklearn():
    rng = np.random.default_rng(0)
    concepts, topics = np.arange(4000) % 2, np.zeros(4000, int)
    x = rng.normal(0, 1, (4000, 6)) * np.arange(1, 7) + concepts[:, None]
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x, concepts).coef_[0]
    got = fit_probe(x, Labels(concepts, topics, topics, 2))(x)[:, 1]
    assert np.corrcoef(got, x @ expected)[0, 1] > 0.999
    plain = means_apart(x, Labels(concepts, topics, topics, 2))(x)[:, 1]
    assert np.corrcoef(plain, x @ expected)[0, 1] < 0.9


def test_planted_directions_are_read_on_other_texts_and_whitening_helps():
    first, labels = planted(0)
    hard, hard_labels = planted(1)
    difference = auroc(means_apart(first, labels)(hard), hard_labels)
    probe = auroc(fit_probe(first, labels)(hard), hard_labels)
    assert 0.6 < difference < probe - 0.1
    assert probe > 0.9


def test_the_probe_ignores_shifts_of_topics():
    x, labels = planted(0)
    others, _ = planted(1)
    shifted = x + 50 * labels.topics[:, None].astype(np.float32)
    got = fit_probe(shifted, labels)(others)
    np.testing.assert_allclose(got, fit_probe(x, labels)(others), atol=2e-2)


def test_vectors_are_those_of_the_contrast_recipe():
    x, labels = planted(0)
    neutral = np.random.default_rng(3).normal(0, 1, (30, WIDTH)) * np.geomspace(0.3, 8, WIDTH)
    vectors = contrast.contrastive_vectors(x, labels.concepts, N, neutral).vectors
    np.testing.assert_allclose(fit_vectors(neutral)(x, labels)(x), x @ vectors.T, atol=1e-4)
    np.testing.assert_allclose(along(vectors)(x), x @ vectors.T, atol=1e-4)


def test_concept_means():
    x, labels = planted(0)
    np.testing.assert_allclose(concept_means(x, labels)[3], x[labels.concepts == 3].mean(0))


def test_cross_fitting_scores_each_writer_by_the_others():
    fit = fit_probe
    x, labels = planted(0)
    got = cross_fit(fit, x, labels)
    own = labels.writers == 2
    rest = Labels(labels.concepts[~own], labels.topics[~own], labels.writers[~own], N)
    np.testing.assert_allclose(got[own], fit(x[~own], rest)(x[own]), atol=1e-9)


def test_noise_reads_at_chance_when_cross_fitted():
    fit = fit_probe
    x, labels = planted(0, strength=0.0)
    assert abs(auroc(cross_fit(fit, x, labels), labels) - 0.5) < 0.1
    assert auroc(fit(x, labels)(x), labels) > 0.6  # what reading the texts of the fit would say

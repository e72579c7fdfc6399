"""Dense readers against scikit-learn, and on planted directions."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from discovery import contrast, ranks
from discovery.labels import Labels, single
from discovery.probes import (
    along,
    concept_means,
    cross_fit,
    fit_probe,
    fit_vectors,
)
from saes.errors import UserError

N, TOPICS, WIDTH = 8, 12, 16


def planted(seed: int, strength: float = 1.0) -> tuple[np.ndarray, Labels]:
    """Residuals with a direction for each concept, unequal noise and shifts by topic."""
    rng = np.random.default_rng(seed)
    concepts, topics = np.tile(np.arange(N), TOPICS), np.repeat(np.arange(TOPICS), N)
    directions = np.random.default_rng(99).normal(0, 1, (N, WIDTH))
    noise = rng.normal(0, 1, (N * TOPICS, WIDTH)) * np.geomspace(0.3, 8, WIDTH)
    x = strength * directions[concepts] + noise + rng.normal(0, 3, (TOPICS, WIDTH))[topics]
    return x.astype(np.float32), single(concepts, N, topics, topics // 2)


def of_two(concepts: np.ndarray) -> Labels:
    """Labels of two concepts, every text a unit of one topic."""
    n = len(concepts)
    return single(concepts, 2, np.zeros(n, int), np.arange(n))._replace(units=np.arange(n))


def auroc(values: np.ndarray, labels: Labels) -> float:
    return float(np.mean(ranks.aurocs_by_group(values, labels)))


@pytest.mark.parametrize(("n", "d"), [(200, 5), (40, 30), (10, 30)])
def test_the_probe_whitens_by_the_covariance_of_ledoit_and_wolf(n, d):
    rng = np.random.default_rng(n)
    x, labels = rng.normal(0, 1, (n, d)) * np.arange(1, d + 1), of_two(np.arange(n) % 2)
    centred = x - x.mean(0)
    covariance, _ = ledoit_wolf(centred, assume_centered=True)
    directions = np.linalg.solve(covariance, concept_means(centred, labels).T)
    np.testing.assert_allclose(fit_probe(x, labels)(x), x @ directions, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_residuals_that_do_not_vary_tell_nothing(value):
    """As the embeddings of the last token, where all texts end in a full stop."""
    x, labels = planted(0)
    same = np.full_like(x, value)
    assert auroc(fit_probe(same, labels)(same), labels) == 0.5
    signs = np.where(np.arange(len(x)) % 2, 1.0, -1.0)[:, None] * np.eye(WIDTH)[0]
    assert np.isfinite(fit_probe(signs, labels)(signs)).all()


def means_apart(x, labels):
    """The probe without whitening."""
    return along(concept_means(x - x.mean(0), labels))


def test_probe_of_two_concepts_is_the_discriminant_of_sklearn():
    rng = np.random.default_rng(0)
    concepts = np.arange(4000) % 2
    x = rng.normal(0, 1, (4000, 6)) * np.arange(1, 7) + concepts[:, None]
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x, concepts).coef_[0]
    got = fit_probe(x, of_two(concepts))(x)[:, 1]
    assert np.corrcoef(got, x @ expected)[0, 1] > 0.999
    plain = means_apart(x, of_two(concepts))(x)[:, 1]
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
    vectors = contrast.contrastive_vectors(x, labels, neutral).vectors
    np.testing.assert_allclose(fit_vectors(neutral)(x, labels)(x), x @ vectors.T, atol=1e-4)
    np.testing.assert_allclose(along(vectors)(x), x @ vectors.T, atol=1e-4)


def test_concept_means_count_a_text_for_each_of_its_concepts():
    x, labels = planted(0)
    np.testing.assert_allclose(concept_means(x, labels)[3], x[labels.of(3)].mean(0), rtol=1e-5)
    both = labels.dense()
    both[::3, 3] = True
    both[::5] = False  # some texts have no concept
    several = labels._replace(concepts=csr_array(both))
    for c in range(N):
        np.testing.assert_allclose(
            concept_means(x, several)[c], x[both[:, c]].mean(0), rtol=1e-4, atol=1e-5
        )


def test_the_probe_of_several_concepts_is_least_squares_on_each_label():
    """Fisher's discriminant and least squares on 0/1 labels have one direction (a text may have
    several concepts; topics are a fixed effect)."""
    rng = np.random.default_rng(5)
    n, topics = 3000, np.arange(3000) % 3
    labels = single(np.full(n, -1), 3, topics, np.arange(n))
    dense = rng.random((n, 3)) < [0.1, 0.3, 0.5]
    labels = labels._replace(concepts=csr_array(dense), units=np.arange(n))
    x = rng.normal(0, 1, (n, 5)) + dense @ rng.normal(0, 1, (3, 5)) + topics[:, None]
    design = np.concatenate([x, np.eye(3)[topics]], axis=1)
    weights = np.linalg.lstsq(design, dense.astype(float), rcond=None)[0][:5]
    got = fit_probe(x, labels)(x)
    for c in range(3):
        assert np.corrcoef(got[:, c], x @ weights[:, c])[0, 1] > 0.9999


def test_cross_fitting_scores_each_fold_by_the_others():
    fit = fit_probe
    x, labels = planted(0)
    got = cross_fit(fit, x, labels)
    own = labels.units == labels.units[40]
    assert 0 < own.sum() < len(own) / 2
    np.testing.assert_allclose(got[own], fit(x[~own], labels.rows(~own))(x[own]), atol=1e-9)


def test_a_concept_of_one_fold_is_refused():
    x, labels = planted(0)
    dense = labels.dense()
    dense[labels.units != 0, 2] = False
    alone = labels._replace(concepts=csr_array(dense))
    with pytest.raises(UserError, match=r"all texts of 1 concepts \(first: number 2\)"):
        cross_fit(fit_probe, x, alone)
    one = labels._replace(units=np.zeros_like(labels.units))
    with pytest.raises(UserError, match=f"all texts of {N} concepts"):
        cross_fit(fit_probe, x, one)


def test_noise_reads_at_chance_when_cross_fitted():
    fit = fit_probe
    x, labels = planted(0, strength=0.0)
    assert abs(auroc(cross_fit(fit, x, labels), labels) - 0.5) < 0.1
    assert auroc(fit(x, labels)(x), labels) > 0.6  # what reading the texts of the fit would say

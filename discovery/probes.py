"""Dense readers of residuals: contrastive vectors, and a linear probe.

A fit takes texts and their labels and returns a reader, which scores other texts for every concept.
Of those scores only the order of the texts, for one concept within one topic, means anything. numpy
and scipy only.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from discovery import scores
from discovery.contrast import contrastive_vectors

Residuals = Float[np.ndarray, "texts d_model"]
Reader = Callable[[np.ndarray], Float[np.ndarray, "texts concepts"]]


class Labels(NamedTuple):
    """The labels of some texts."""

    concepts: Int[np.ndarray, " texts"]
    """From 0."""
    topics: Int[np.ndarray, " texts"]
    writers: Int[np.ndarray, " texts"]
    n_concepts: int

    def rows(self, keep: Bool[np.ndarray, " texts"]) -> "Labels":
        """The labels of some of the texts."""
        return Labels(self.concepts[keep], self.topics[keep], self.writers[keep], self.n_concepts)


Fit = Callable[[np.ndarray, Labels], Reader]


def cross_fit(fit: Fit, data: np.ndarray, labels: Labels) -> Float[np.ndarray, "texts concepts"]:
    """Score each writer's texts by a reader that was fitted on those of the other writers.

    Args:
        fit: the method.
        data: what it reads, one item a text along the first axis.
        labels: the labels of the texts.
    """
    result = np.empty((len(labels.concepts), labels.n_concepts))
    for writer in np.unique(labels.writers):
        own = labels.writers == writer
        result[own] = fit(data[~own], labels.rows(~own))(data[own])
    return result


def along(directions: Float[np.ndarray, "concepts d_model"]) -> Reader:
    """Reads the component of residuals along given directions, such as contrastive vectors."""
    return lambda x: x.astype(np.float64) @ directions.T


def concept_means(
    x: Float[np.ndarray, "texts d_model"], labels: Labels
) -> Float[np.ndarray, "concepts d_model"]:
    """Mean of each concept's texts."""
    return np.stack([x[labels.concepts == c].mean(0) for c in range(labels.n_concepts)])


def fit_vectors(neutral: Float[np.ndarray, "neutral_texts d_model"], variance: float = 0.5) -> Fit:
    """A fit of contrastive vectors by the original recipe, given residuals of neutral texts."""

    def fit(x: Residuals, labels: Labels) -> Reader:
        fitted = contrastive_vectors(x, labels.concepts, labels.n_concepts, neutral, variance)
        return along(fitted.vectors)

    return fit


def fit_probe(x: Residuals, labels: Labels) -> Reader:
    """Linear discriminant of each concept against all others: whitened difference of means.

    One covariance serves all concepts: that of texts around their topic's mean, shrunken as by
    Ledoit and Wolf (2004).
    """
    residuals = scores.centred(x.astype(np.float64), labels.topics)
    differences = concept_means(residuals, labels)
    return along(np.linalg.solve(shrunken_covariance(residuals), differences.T).T)


def shrunken_covariance(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    """Covariance of centred rows, shrunken to a multiple of the identity.

    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance
    matrices", lemma 3.3: the intensity is the estimated error of the sample covariance as a share
    of its distance from the target.
    """
    n, d = x.shape
    sample = x.T @ x / n
    scale = np.trace(sample) / d
    distance = (sample**2).sum() - d * scale**2
    squared = x**2
    error = ((squared.T @ squared).sum() / n - (sample**2).sum()) / n
    intensity = min(1.0, error / distance) if distance > 0 else 1.0
    return (1 - intensity) * sample + intensity * scale * np.eye(d)

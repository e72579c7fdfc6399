"""Dense readers of residuals: contrastive vectors, and a linear probe.

A fit takes texts and their labels and returns a reader, which scores other texts for every concept.
Of those scores only the order of the texts, for one concept within one topic, means anything.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from discovery.contrast import averages, neutral_axes, outside
from discovery.labels import Labels
from discovery.ranks import centred
from saes.errors import UserError

Residuals = Float[np.ndarray, "texts d_model"]
Data = Any
"""What a reader reads, one text a row: residuals, latents or counts of words."""
Reader = Callable[[Data], Float[np.ndarray, "texts concepts"]]
Fit = Callable[[Data, Labels], Reader]

_FLOOR = 1e-9  # of the variances that whiten, as a share of their mean


def cross_fit(fit: Fit, data: Data, labels: Labels) -> Float[np.ndarray, "texts concepts"]:
    """Score the texts of each fold by a reader that was fitted on those of the other folds.

    Folds keep units, so writers and topics, whole (`Labels.folds`).

    Args:
        fit: the method.
        data: what it reads.
        labels: the labels of the texts.

    Raises:
        UserError: a fold that holds all texts of a concept.
    """
    folds = labels.folds()
    result = np.empty((len(folds), labels.n_concepts))
    for fold in np.unique(folds):
        own = folds == fold
        rest = labels.rows(~own)
        empty = np.flatnonzero(rest.counts == 0)
        if len(empty):
            raise UserError(
                f"all texts of {len(empty)} concepts (first: number {empty[0]}) are in one fold, "
                "and no others are left to fit on: add texts of other writers or topics"
            )
        result[own] = fit(data[~own], rest)(data[own])
    return result


def along(directions: Float[np.ndarray, "concepts d_model"]) -> Reader:
    """Reads the component of residuals along given directions, such as contrastive vectors."""
    return lambda x: x.astype(np.float64) @ directions.T


def concept_means(
    x: Float[np.ndarray, "texts d_model"], labels: Labels
) -> Float[np.ndarray, "concepts d_model"]:
    """Mean of each concept's texts; a text with several concepts counts for each."""
    return np.asarray(averages(labels) @ x)


def fit_vectors(neutral: Float[np.ndarray, "neutral_texts d_model"], variance: float = 0.5) -> Fit:
    """A fit of contrastive vectors by the original recipe, given residuals of neutral texts."""

    axes, _ = neutral_axes(neutral, variance)

    def fit(x: Residuals, labels: Labels) -> Reader:
        return along(outside(axes, x, labels))

    return fit


def fit_probe(x: Residuals, labels: Labels) -> Reader:
    """Linear discriminant of each concept against all others: whitened difference of means.

    One covariance serves all concepts: that of texts around their topic's mean, shrunken as by
    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance
    matrices". Around their topic's mean all texts average zero, so that the mean of a concept's
    texts points where its difference from the others does.
    """
    from sklearn.covariance import ledoit_wolf

    residuals = centred(x.astype(np.float64), labels.topics)
    covariance, _ = ledoit_wolf(residuals, assume_centered=True)
    # of residuals that hardly vary, such as embeddings of one and the same token, it is singular
    floor = _FLOOR * np.trace(covariance) / len(covariance) or 1.0
    covariance += floor * np.eye(len(covariance))
    return along(np.linalg.solve(covariance, concept_means(residuals, labels).T).T)

"""Contrastive vectors: the original recipe, how reliable they are, and which concepts are near.

The recipe is that of "Emotion Concepts and their Function in a Large Language Model" (arXiv
2604.07729): the mean of a concept minus the mean over concepts, then the top principal components
of neutral text, as many as explain half of its variance, are projected out. A text with several
concepts counts in the mean of each.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from discovery.labels import Labels
from saes.errors import UserError


class ContrastResult(NamedTuple):
    """Contrastive vectors and the nuisance directions that were removed from them."""

    vectors: Float[np.ndarray, "concepts d_model"]
    """Not normalised: the unit is that of the residual stream."""
    neutral: Float[np.ndarray, "components d_model"]
    """Orthonormal principal axes of the neutral residuals; every vector is orthogonal to them."""
    neutral_variance: float
    """Share of the neutral variance that the removed axes explain."""


class Reliability(NamedTuple):
    """How well half of the texts reproduces the vectors of the other half; NaN where unknown."""

    cosine: Float[np.ndarray, " concepts"]
    """Mean cosine between the vectors of two halves."""
    reliability: Float[np.ndarray, " concepts"]
    """Spearman-Brown: what the cosine would be between two whole corpora of this size; 0 to 1."""
    ceiling: Float[np.ndarray, " concepts"]
    """sqrt(reliability): the cosine to expect with the noise-free vector, so with anything."""


def contrastive_vectors(
    residuals: Float[np.ndarray, "texts d_model"],
    labels: Labels,
    neutral: Float[np.ndarray, "neutral_texts d_model"],
    variance: float = 0.5,
) -> ContrastResult:
    """Contrastive vectors of all concepts from pooled residuals at one site.

    Args:
        residuals: pooled residual of each labelled text.
        labels: of the same texts.
        neutral: pooled residuals of texts without emotion.
        variance: share of the neutral variance that the removed components must explain; 0 keeps
            the plain differences of means.

    Raises:
        UserError: fewer than two concepts, a concept without texts, too little neutral text.
    """
    axes, explained = neutral_axes(neutral, variance)
    return ContrastResult(outside(axes, residuals, labels), axes, explained)


def outside(
    axes: Float[np.ndarray, "components d_model"],
    residuals: Float[np.ndarray, "texts d_model"],
    labels: Labels,
) -> Float[np.ndarray, "concepts d_model"]:
    """Contrastive vectors of all concepts, given the neutral axes that are projected out.

    Raises:
        UserError: fewer than two concepts, or a concept without texts.
    """
    n_concepts = labels.n_concepts
    if n_concepts < 2:
        raise UserError(f"contrastive vectors need at least 2 concepts, got {n_concepts}")
    empty = np.flatnonzero(labels.counts == 0)
    if len(empty):
        raise UserError(
            f"{len(empty)} of {n_concepts} concepts have no text (first: number {empty[0]}): "
            "add texts for them or leave them out"
        )
    return project_out(differences(residuals, labels), axes)


def neutral_axes(
    neutral: Float[np.ndarray, "neutral_texts d_model"], variance: float
) -> tuple[Float[np.ndarray, "components d_model"], float]:
    """The fewest top principal axes that explain at least `variance`, and what they explain.

    Raises:
        UserError: `variance` outside [0, 1), or neutral texts that do not vary.
    """
    if not 0 <= variance < 1:
        raise UserError(f"the neutral variance to remove must be in [0, 1), got {variance}")
    if variance == 0:
        return np.zeros((0, neutral.shape[1])), 0.0
    centred = neutral.astype(np.float64) - neutral.mean(0, dtype=np.float64)
    variances, axes = _principal(centred)
    total = np.sum(variances)
    if len(neutral) < 2 or total == 0:
        raise UserError(
            f"{len(neutral)} neutral texts show no variance to remove: give more of them, "
            "or set the neutral variance to 0"
        )
    explained = np.cumsum(variances) / total
    n = int(np.searchsorted(explained, variance)) + 1
    return axes[:n], float(explained[n - 1])


def _principal(
    centred: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " components"], Float[np.ndarray, "components d"]]:
    """Variances, times n, along the principal axes, largest first, and the axes."""
    n, d = centred.shape
    if n <= 2 * d:
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        return singular**2, axes
    variances, axes = np.linalg.eigh(centred.T @ centred)  # many texts: far cheaper
    return np.maximum(variances[::-1], 0), axes.T[::-1]


def split_half(
    residuals: Float[np.ndarray, "texts d_model"],
    labels: Labels,
    neutral: Float[np.ndarray, "components d_model"],
    *,
    halves: int = 50,
    seed: int = 0,
) -> Reliability:
    """Split-half reliability of contrastive vectors, over random halves of the topics.

    Halves are halves of the topics, not of the texts: texts of a topic share more than a concept.
    Where there is one topic only, they are halves of the units (writers, or else single texts).
    The cosines are averaged over `halves` random splits and then stepped up to the full corpus by
    the Spearman-Brown formula. A negative mean cosine is no reliability: 0. A split in which a
    concept is missing from one half (only in unbalanced corpora) says nothing about that concept; a
    concept that is never in both, as all its texts are of one topic or unit, has NaN throughout.

    Args:
        residuals: pooled residual of each labelled text.
        labels: of the same texts.
        neutral: the axes that the recipe projects out (`ContrastResult.neutral`).
        halves: how many random splits.
        seed: of the splits.
    """
    _, topic = np.unique(labels.topics, return_inverse=True)
    _, unit = np.unique(labels.units, return_inverse=True)
    part = topic if topic.max(initial=0) > 0 else unit
    n_parts, n_concepts = int(part.max(initial=0)) + 1, labels.n_concepts
    cleaned = project_out(residuals.astype(np.float64), neutral)
    rng = np.random.default_rng(seed)
    total, seen = np.zeros(n_concepts), np.zeros(n_concepts, dtype=np.int64)
    for _ in range(halves):
        first = np.isin(part, rng.permutation(n_parts)[: n_parts // 2])
        means = [averages(labels, half) for half in (first, ~first)]
        a, b = (_differences(cleaned, average) for average in means)
        both = np.all([average.sum(1) > 0 for average in means], axis=0)
        total[both] += np.sum(unit_rows(a[both]) * unit_rows(b[both]), axis=1)
        seen += both
    cosine = np.where(seen > 0, total / np.maximum(seen, 1), np.nan)
    positive = np.clip(cosine, 0, 1)
    reliability = 2 * positive / (1 + positive)
    return Reliability(cosine, reliability, np.sqrt(reliability))


def nearest(
    vectors: Float[np.ndarray, "concepts d_model"], k: int = 5
) -> Int[np.ndarray, "concepts neighbours"]:
    """The `k` other concepts with the largest cosine, nearest first; ties go to the lower index.

    With fewer than k + 1 concepts there are as many neighbours as other concepts.
    """
    units = unit_rows(vectors)
    cosine = units @ units.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")
    return order[:, : min(k, len(vectors) - 1)]


def project_out(
    x: Float[np.ndarray, "n d_model"], axes: Float[np.ndarray, "components d_model"]
) -> Float[np.ndarray, "n d_model"]:
    """`x` without its part in the span of the orthonormal `axes`."""
    return x - (x @ axes.T) @ axes


def unit_rows(x: Float[np.ndarray, "n d_model"]) -> Float[np.ndarray, "n d_model"]:
    """Rows scaled to length 1; a row of zeros stays zero, so that its cosines are 0."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def differences(
    residuals: Float[np.ndarray, "texts d_model"], labels: Labels
) -> Float[np.ndarray, "concepts d_model"]:
    """Mean of each concept minus the mean over the concepts that have texts (others: zeros)."""
    return _differences(residuals.astype(np.float64), averages(labels))


def averages(
    labels: Labels, keep: Bool[np.ndarray, " texts"] | None = None
) -> Float[csr_array, "concepts texts"]:
    """The matrix that takes each concept's mean over its texts, all or those of `keep`.

    The row of a concept without texts is zero.
    """
    members = csr_array(labels.concepts.T.astype(np.float64))
    if keep is not None:
        members.data *= keep[members.indices]
    counts = np.maximum(members.sum(1), 1)
    members.data /= np.repeat(counts, np.diff(members.indptr))
    return members


def _differences(
    residuals: Float[np.ndarray, "texts d_model"], average: Float[csr_array, "concepts texts"]
) -> Float[np.ndarray, "concepts d_model"]:
    means = np.asarray(average @ residuals)
    present = average.sum(1) > 0
    grand = means[present].sum(0) / max(1, np.count_nonzero(present))
    return np.where(present[:, None], means - grand, 0.0)

"""The plane of the concept vectors: principal components, and how they follow human norms.

As in arXiv 2604.07729, whose first component followed valence (r = 0.81) and second arousal
(r = 0.66, 45 words). Token embeddings alone hold much of this geometry (2609.22208), so the same
rows are made for the embedding layer, site `blocks.0.hook_resid_pre`, as the baseline.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from discovery.captured import pooling_of, site_of
from discovery.concepts import Concept
from discovery.contrast import Reliability
from discovery.records import Geometry, Vector


class Components(NamedTuple):
    """Principal components of the centred concept vectors."""

    scores: Float[np.ndarray, "concepts components"]
    axes: Float[np.ndarray, "components d_model"]
    shares: Float[np.ndarray, " components"]
    """Share of the variance between concepts that each component explains."""


class Norm(NamedTuple):
    """A human rating of the concept words."""

    name: str
    """valence, arousal or dominance."""
    source: str
    """glasgow (Scott et al. 2019), its exact words alone, or vader (Hutto & Gilbert 2014)."""
    values: Float[np.ndarray, " concepts"]
    """NaN where the word was not rated."""


class Correlation(NamedTuple):
    """Pearson's r with its 95 % interval by Fisher's z, over n pairs."""

    r: float
    low: float
    high: float
    n: int


def human_norms(concepts: Sequence[Concept]) -> list[Norm]:
    """The ratings of `concepts`: valence, arousal and dominance of Glasgow, valence of VADER.

    Glasgow rated some concepts only as another form ("amuse" for "amused"), so each of its norms is
    there once more for the exact words alone.
    """
    exact = [c.glasgow_exact for c in concepts]

    def column(values: Sequence[float | None]) -> Float[np.ndarray, " concepts"]:
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)

    glasgow = {
        "valence": column([c.valence for c in concepts]),
        "arousal": column([c.arousal for c in concepts]),
        "dominance": column([c.dominance for c in concepts]),
    }
    return [
        *(Norm(name, "glasgow", values) for name, values in glasgow.items()),
        *(
            Norm(name, "glasgow, exact words", np.where(exact, values, np.nan))
            for name, values in glasgow.items()
        ),
        Norm("valence", "vader", column([c.valence_vader for c in concepts])),
    ]


def principal_components(
    vectors: Float[np.ndarray, "concepts d_model"],
    anchors: Sequence[Float[np.ndarray, " concepts"]] = (),
    k: int = 2,
) -> Components:
    """The first `k` principal components of the centred vectors.

    Args:
        vectors: one row a concept.
        anchors: norms (NaN where unrated) that fix the signs: component i rises with anchor i,
            so valence first, arousal second. Where an anchor is missing or has no correlation,
            the largest entry of the axis is positive.
        k: how many; at most the smaller side of `vectors`.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    u, singular, axes = np.linalg.svd(centred, full_matrices=False)
    scores, axes = u[:, :k] * singular[:k], axes[:k]
    signs = np.sign(axes[np.arange(len(axes)), np.argmax(np.abs(axes), axis=1)])
    for i, anchor in enumerate(anchors[:k]):
        correlation = correlate(scores[:, i], anchor)
        if correlation is not None and correlation.r != 0:
            signs[i] = np.sign(correlation.r)
    total = np.sum(singular**2)
    shares = singular[:k] ** 2 / total if total > 0 else np.zeros(len(axes))
    return Components(scores * signs, axes * signs[:, None], shares)


def correlate(
    x: Float[np.ndarray, " concepts"], y: Float[np.ndarray, " concepts"]
) -> Correlation | None:
    """Pearson's r over the pairs in which both are known (not NaN).

    None where it is undefined or has no interval: fewer than four pairs, or no variation.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    result = stats.pearsonr(x, y)
    interval = result.confidence_interval(0.95)
    return Correlation(float(result.statistic), float(interval.low), float(interval.high), len(x))


def geometry_rows(view: str, components: Components, norms: Sequence[Norm]) -> list[Geometry]:
    """One row for each component and norm; a norm with too few rated concepts has none."""
    place = site_of(view), pooling_of(view)
    return [
        Geometry(*place, norm.name, norm.source, i + 1, *correlation, float(share))
        for norm in norms
        for i, share in enumerate(components.shares)
        if (correlation := correlate(components.scores[:, i], norm.values)) is not None
    ]


def vector_rows(
    view: str,
    names: Sequence[str],
    vectors: Float[np.ndarray, "concepts d_model"],
    mean_norm: float,
    reliability: Reliability,
    components: Components,
) -> list[Vector]:
    """One row for each concept; lengths and scores are fractions of the mean residual norm.

    Args:
        view: site and pooling of the vectors.
        names: concept of each row.
        vectors: contrastive vectors.
        mean_norm: mean residual norm at the site, so that sites and models can be compared.
        reliability: of the vectors; NaN where unknown.
        components: at least two principal components of `vectors`.
    """
    norms = np.linalg.norm(vectors, axis=1) / mean_norm
    plane = components.scores[:, :2] / mean_norm
    columns = (norms, reliability.reliability, reliability.ceiling, plane[:, 0], plane[:, 1])
    return [
        Vector(name, site_of(view), pooling_of(view), *(float(column[i]) for column in columns))
        for i, name in enumerate(names)
    ]

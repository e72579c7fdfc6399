"""Features against vectors: does the decoder row of a concept's feature point along its vector?

A cosine alone says little (published ones lie between -0.15 and 0.33, without a null), so each is
given with its place among the cosines of all decoder rows with the same vector, and with the
ceiling that the vector's reliability sets.

What is compared: the vectors have no part in the neutral directions, because the recipe projects
those out. The same directions are projected out of every decoder row before the cosine. Otherwise a
row would be charged for a part that was removed from the other side, differently for each latent,
and the ceiling could not be attained. The rows of the null are treated alike, so percentiles stay
fair.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from discovery.contrast import project_out, unit_rows
from discovery.records import Comparison

_ROWS = 8192  # decoder rows at a time: bounds the float64 copies


class Pick(NamedTuple):
    """What was chosen for a concept: its latent and its set, and the ceiling of its vector."""

    concept: str
    latent: int
    members: Sequence[tuple[int, float]]
    """(latent, weight) of the set's score."""
    ceiling: float
    """NaN where unknown, as for a concept with texts of one topic only."""


def compare(
    site: str,
    picks: Sequence[Pick],
    vectors: Float[np.ndarray, "concepts d_model"],
    neutral: Float[np.ndarray, "components d_model"],
    decoder: Float[np.ndarray, "d_sae d_model"],
) -> list[Comparison]:
    """One row for each pick.

    Args:
        site: where vectors and decoder live.
        picks: in the order of `vectors`.
        vectors: contrastive vectors, orthogonal to `neutral`.
        neutral: orthonormal axes that the recipe projected out (`ContrastResult.neutral`).
        decoder: rows of the dictionary (`W_dec`).
    """
    assert len(picks) == len(vectors)
    cosines = decoder_cosines(vectors, neutral, decoder)
    sets = np.stack([_direction(pick.members, decoder) for pick in picks])
    set_cosines = np.diag(decoder_cosines(vectors, neutral, sets))
    rows = []
    for pick, null, set_cosine in zip(picks, cosines, set_cosines, strict=True):
        cosine, nearest = null[pick.latent], int(np.argmax(null))
        low, high = np.quantile(null, [0.025, 0.975])
        rows.append(
            Comparison(
                concept=pick.concept,
                site=site,
                latent=pick.latent,
                cosine=float(cosine),
                percentile=percentile(float(cosine), null),
                null_mean=float(null.mean()),
                null_low=float(low),
                null_high=float(high),
                set_cosine=float(set_cosine),
                nearest_latent=nearest,
                nearest_cosine=float(null[nearest]),
                ceiling=pick.ceiling,
            )
        )
    return rows


def decoder_cosines(
    vectors: Float[np.ndarray, "concepts d_model"],
    neutral: Float[np.ndarray, "components d_model"],
    decoder: Float[np.ndarray, "rows d_model"],
) -> Float[np.ndarray, "concepts rows"]:
    """Cosine of every vector with every decoder row, outside the neutral directions.

    A row that lies in the neutral directions (all but a millionth) has no direction left: cosine 0.
    """
    units = unit_rows(vectors.astype(np.float64))
    out = np.empty((len(vectors), len(decoder)))
    for start in range(0, len(decoder), _ROWS):
        rows = unit_rows(decoder[start : start + _ROWS].astype(np.float64))
        rest = project_out(rows, neutral)
        rest[np.linalg.norm(rest, axis=1) < 1e-6] = 0
        out[:, start : start + _ROWS] = units @ unit_rows(rest).T
    return out


def percentile(value: float, null: Float[np.ndarray, " rows"]) -> float:
    """Share of `null` below `value` in percent; what equals it counts half."""
    return float(100 * (np.mean(null < value) + 0.5 * np.mean(null == value)))


def _direction(
    members: Sequence[tuple[int, float]], decoder: Float[np.ndarray, "d_sae d_model"]
) -> Float[np.ndarray, " d_model"]:
    """What a set writes to the residual stream: its decoder rows, weighted."""
    latents = [latent for latent, _ in members]
    return np.array([weight for _, weight in members]) @ decoder[latents].astype(np.float64)

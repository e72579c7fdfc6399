"""Figures beside the verdicts, on which no verdict rests: other intervals, other comparisons.

numpy and scipy only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.sparse import csc_array, csr_array

from discovery import inference, ranks
from discovery.confirm import Confirmation, texts_of
from discovery.labels import Labels
from discovery.records import Candidate, Cross, CurvePoint
from discovery.scores import score_pairs
from discovery.selection import LabelledSet, best_latents, curve, score


class Beside(NamedTuple):
    """Figures beside the AUROC of each concept's single latent, or set; NaN where unknown."""

    pooled: Float[np.ndarray, " concepts"]
    """AUROC over all texts together, topics ignored."""
    delong_low: Float[np.ndarray, " concepts"]
    delong_high: Float[np.ndarray, " concepts"]
    bootstrap_low: Float[np.ndarray, " concepts"]
    bootstrap_high: Float[np.ndarray, " concepts"]
    family: Float[np.ndarray, " concepts"]
    """AUROC within topics among texts of the concept's family."""
    neutral: Float[np.ndarray, " concepts"]
    """AUROC against neutral texts."""


def nothing_beside(n_concepts: int) -> Beside:
    """Where only verdicts are wanted."""
    return Beside(*np.full((len(Beside._fields), n_concepts), np.nan))


def beside(
    confirmed: Confirmation,
    families: Sequence[str],
    neutral: Float[np.ndarray, "neutral concepts"] | None,
    draws: int,
    seed: int,
    together: Labels | None = None,
) -> Beside:
    """Figures beside what was confirmed.

    Args:
        confirmed: scores and labels of the texts.
        families: of the concepts.
        neutral: scores of neutral texts, column c for concept c.
        draws: of the bootstrap.
        seed: of the bootstrap.
        together: labels whose topics hold the texts that `pooled` compares; without, all texts.
    """
    values, labels = confirmed.scores, confirmed.labels
    together = together or labels._replace(topics=np.zeros_like(labels.topics))
    nothing = np.full(labels.n_concepts, np.nan)
    low, high, bootstrap_low, bootstrap_high, against = (nothing.copy() for _ in range(5))
    for c, column in enumerate(values.T):
        positive = labels.of(c)
        if np.isfinite(confirmed.aurocs[c]).any():
            at = (column, positive, labels.topics)
            _, low[c], high[c] = inference.delong_interval(*at)
            _, bootstrap_low[c], bootstrap_high[c] = inference.bootstrap_interval(
                *at, labels.units, draws, seed
            )
        if neutral is not None and len(neutral) and positive.any():
            against[c] = auroc(column[positive], neutral[:, c])
    pooled = inference.t_interval(ranks.aurocs_by_group(values, together)).mean
    family = family_aurocs(values, labels, families)
    return Beside(pooled, low, high, bootstrap_low, bootstrap_high, family, against)


def auroc(positive: Float[np.ndarray, " m"], other: Float[np.ndarray, " n"]) -> float:
    """The share of pairs in which the positive is above the other, ties counting half."""
    ordered = np.sort(other)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(other)))


def family_aurocs(
    values: Float[np.ndarray, "texts concepts"], labels: Labels, families: Sequence[str]
) -> Float[np.ndarray, " concepts"]:
    """Mean within-topic AUROC of column c for concept c, among texts of its family.

    NaN for a family of one concept, or where no topic holds another text of the family.
    """
    result = np.full(len(families), np.nan)
    by_concept = csc_array(labels.concepts)
    family = np.unique(np.array(families), return_inverse=True)[1]
    for f in range(int(family.max()) + 1):
        own = np.flatnonzero(family == f)
        rows = texts_of(by_concept, own)
        if len(own) < 2 or not len(rows):
            continue
        aurocs = ranks.aurocs_by_group(values[rows][:, own], labels.rows(rows).columns(own))
        known = np.isfinite(aurocs)
        mean = np.nansum(aurocs, 1) / np.maximum(known.sum(1), 1)
        result[own] = np.where(known.any(1), mean, np.nan)
    return result


def candidate_rows(
    texts: LabelledSet,
    confirmation: LabelledSet | None,
    view: str,
    concepts: Sequence[str],
    n: int,
) -> list[Candidate]:
    """The n best latents of each concept on the selection set, with all measures of the pair.

    They are in the order of the selection: the first is the single latent that was chosen.
    Without a confirmation set, the AUROC there is NaN.
    """
    x = texts.prepared(view).latents
    best = best_latents(texts, view, min(n, x.shape[1]))
    pairs = score_pairs(x, texts.labels)
    union, at = np.unique(best, return_inverse=True)
    at = at.reshape(best.shape)
    confirmed = np.full((len(union), len(concepts)), np.nan)
    if confirmation is not None:
        columns = csr_array(csc_array(confirmation.latents[view])[:, union])
        confirmed = ranks.within_group_auroc(columns, confirmation.labels)
    site = view.partition("@")[0]
    return [
        Candidate(
            concept,
            site,
            rank + 1,
            int(f),
            float(pairs.auroc[f, c]),
            float(pairs.auroc_pooled[f, c]),
            float(pairs.se[f, c]),
            float(pairs.mean_difference[f, c]),
            float(pairs.cohens_d[f, c]),
            float(pairs.firing_ratio[f, c]),
            float(pairs.mutual_information[f, c]),
            float(pairs.p[f, c]),
            float(pairs.q[f, c]),
            float(confirmed[at[c, rank], c]),
        )
        for c, concept in enumerate(concepts)
        for rank, f in enumerate(best[c])
    ]


def cross_rows(
    singles: Float[np.ndarray, "texts concepts"], labels: Labels, concepts: Sequence[str]
) -> list[Cross]:
    """AUROC of the latent chosen for each concept, for the texts of every concept."""
    aurocs = ranks.within_group_auroc(singles, labels)
    return [
        Cross(concept, other, float(aurocs[c, o]))
        for c, concept in enumerate(concepts)
        for o, other in enumerate(concepts)
    ]


def curve_rows(
    texts: LabelledSet, confirmation: LabelledSet | None, view: str, ks: Sequence[int]
) -> list[CurvePoint]:
    """Step 13: mean AUROC of sets of other sizes, on the selection and on the confirmation set."""
    rows = list[CurvePoint]()
    for fit in curve(texts, view, ks):
        k = fit.selection.members.shape[1]
        rows.append(_point(k, "selection", fit.set_scores, fit.labels))
        if confirmation is not None:
            sets = score(fit.selection, confirmation.latents[view])[1]
            rows.append(_point(k, "confirmation", sets, confirmation.labels))
    return rows


def _point(
    k: int, name: str, scores: Float[np.ndarray, "texts concepts"], labels: Labels
) -> CurvePoint:
    mean = inference.mean_auroc_interval(scores, labels)
    return CurvePoint(k, name, mean.auroc, mean.low, mean.high)

"""Steps 1 to 3 of the verdict protocol: on the first set, choose latents for each concept.

No label of the confirmation set is ever seen here. Inner folds are writers: a fold chooses on the
texts of the other writers and scores those of its own. numpy and scipy only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array

from discovery import scores
from saes.errors import UserError

MIN_FIRING = 0.002
"""Latents that fire in a smaller share of the texts are passed over."""

SHRINKAGE = 0.5
"""How far the correlations among the latents of a set are shrunken to zero.

Chosen on planted data, where the AUROC of sets hardly depends on it between 0.3 and 0.7. There,
raw activations did as well as their roots or logarithms, and the AUROC as well as Cohen's d to rank
latents, so the simpler of each was taken.
"""


@dataclass(frozen=True)
class LabelledSet:
    """Pooled latents of labelled texts, at each site."""

    latents: dict[str, Float[csr_array, "texts _"]]
    """By site, [texts, d_sae]."""
    labels: Int[np.ndarray, " texts"]
    """The concept of each text, from 0."""
    topics: Int[np.ndarray, " texts"]
    """Texts are compared within a topic only; in mentions it is the number of the mention."""
    writers: Int[np.ndarray, " texts"]
    """Who wrote each text; read in the first set only, where writers are the folds."""

    def __post_init__(self) -> None:
        texts = {site: x.shape[0] for site, x in self.latents.items()}
        assert set(texts.values()) == {len(self.labels)}, f"{len(self.labels)} labels for {texts}"


class Selection(NamedTuple):
    """What was chosen on the first set."""

    site: str
    members: Int[np.ndarray, "concepts k"]
    """The set of each concept, best latent first."""
    weights: Float[np.ndarray, "concepts k"]
    """Discriminant weights of the members' pooled activations; each row has norm 1."""

    @property
    def latent(self) -> Int[np.ndarray, " concepts"]:
        """The best single latent of each concept."""
        return self.members[:, 0]


class SiteFit(NamedTuple):
    """The selection at one site, and its cross-fitted within-topic AUROCs on the first set."""

    selection: Selection
    latent_aurocs: Float[np.ndarray, "concepts topics"]
    set_aurocs: Float[np.ndarray, "concepts topics"]


class _Site(NamedTuple):
    """The first set at one site, prepared for repeated selection."""

    name: str
    columns: csc_array
    ranks: scores.Ranks
    labels: Int[np.ndarray, " texts"]
    topics: Int[np.ndarray, " texts"]


def select(first: LabelledSet, n_concepts: int, k: int) -> list[SiteFit]:
    """Choose latents at every site.

    Returns:
        The fits, best site first: that with the highest mean cross-fitted AUROC of the sets. One
        site serves all concepts.

    Raises:
        UserError: a topic of several writers, a concept of fewer than two writers, or a site of
            fewer than k latents.
    """
    _check(first, n_concepts, k)
    fits = [fit_site(first, site, n_concepts, k) for site in sorted(first.latents)]
    return sorted(fits, key=lambda fit: -round(float(np.nanmean(fit.set_aurocs)), 12))


def _check(first: LabelledSet, n_concepts: int, k: int) -> None:
    for topic in np.unique(first.topics):
        writers = np.unique(first.writers[first.topics == topic])
        if len(writers) > 1:
            raise UserError(
                f"topic {topic} of the first set has writers {writers.tolist()}, but folds are "
                "writers: make each pair of topic and writer a topic"
            )
    for concept in range(n_concepts):
        if len(np.unique(first.writers[first.labels == concept])) < 2:
            raise UserError(
                f"concept {concept} has fewer than two writers in the first set, and folds are "
                "writers: add texts or leave the concept out"
            )
    for site, x in first.latents.items():
        if x.shape[1] < k:
            raise UserError(f"{site} has {x.shape[1]} latents, too few for a set of k={k}")


def fit_site(first: LabelledSet, site: str, n_concepts: int, k: int) -> SiteFit:
    """Choose on all texts at one site, and cross-fit the same rule over writers."""
    x = first.latents[site]
    prepared = _Site(
        site,
        csc_array(x),
        scores.within_group_ranks(x, first.topics),
        first.labels,
        first.topics,
    )
    latent_scores = np.zeros((len(first.labels), n_concepts))
    set_scores = np.zeros_like(latent_scores)
    for writer in np.unique(first.writers):
        own = first.writers == writer
        chosen = _choose(prepared, ~own, n_concepts, k)
        latent_scores[own], set_scores[own] = score(chosen, x[own])
    return SiteFit(
        _choose(prepared, np.ones(len(first.labels), dtype=bool), n_concepts, k),
        scores.aurocs_by_group(latent_scores, first.labels, first.topics),
        scores.aurocs_by_group(set_scores, first.labels, first.topics),
    )


def score(
    selection: Selection, x: Float[csr_array, "texts d_sae"]
) -> tuple[Float[np.ndarray, "texts concepts"], Float[np.ndarray, "texts concepts"]]:
    """Scores of texts, given their pooled latents at the site: by single latents, and by sets."""
    columns = csc_array(x)
    sets = np.empty((columns.shape[0], len(selection.members)))
    for concept, (members, weights) in enumerate(
        zip(selection.members, selection.weights, strict=True)
    ):
        sets[:, concept] = columns[:, members].toarray() @ weights
    return columns[:, selection.latent].toarray().astype(np.float64), sets


def _choose(site: _Site, rows: Bool[np.ndarray, " texts"], n_concepts: int, k: int) -> Selection:
    """The rule of step 2, on some topics of the first set."""
    members = top_latents(site.ranks.rows(rows), site.labels[rows], n_concepts, k)
    weights = np.empty(members.shape)
    for concept in range(n_concepts):
        x = site.columns[:, members[concept]].toarray()[rows]
        weights[concept] = discriminant(x, site.labels[rows] == concept, site.topics[rows])
    return Selection(site.name, members, weights)


def top_latents(
    ranks: scores.Ranks, labels: Int[np.ndarray, " texts"], n_concepts: int, k: int
) -> Int[np.ndarray, "concepts k"]:
    """The k latents with the highest within-topic AUROC, best first; ties go to the lower index."""
    aurocs = scores.auroc_from_ranks(ranks, labels, n_concepts).round(12)
    firing = np.bincount(ranks.deviation.indices, minlength=len(aurocs)) / len(labels)
    aurocs[firing < MIN_FIRING] = -1.0
    return np.argsort(-aurocs.T, axis=1, kind="stable")[:, :k]


def discriminant(
    x: Float[np.ndarray, "texts k"],
    positive: Bool[np.ndarray, " texts"],
    topics: Int[np.ndarray, " texts"],
) -> Float[np.ndarray, " k"]:
    """Weights of Fisher's discriminant of a concept against all others, within topics.

    The covariance is that of all texts around their topic's mean, with its correlations shrunken
    by `SHRINKAGE`. Latents that hardly vary within topics are held down rather than blown up. The
    result has norm 1, or 0 if no latent differs.
    """
    x = x.astype(np.float64)
    residuals = scores.centred(x, topics)
    difference = residuals[positive].mean(0)
    covariance = residuals.T @ residuals / len(residuals)
    floor = 1e-6 * (x**2).mean(0) + 1e-30
    shrunken = (1 - SHRINKAGE) * covariance
    np.fill_diagonal(shrunken, np.maximum(np.diag(covariance), floor))
    weights = np.linalg.solve(shrunken, difference)
    return weights / max(float(np.linalg.norm(weights)), 1e-30)

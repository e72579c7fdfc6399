"""The verdict on each concept: is there a latent, or a set of latents, that stands for it?

Step numbers are those of the protocol in docs/statistics.md:

1.  statistic: AUROC within topics, averaged over topics          `discovery.ranks`
2.  selection on the selection set, cross-fitted over units       `discovery.selection`
3.  freeze: what follows reads the frozen `Selection`
4.  confirmation on the confirmation set, once, by exact p-values `discovery.confirm`
5.  false-discovery control over concepts, and in each over two   `discovery.confirm`
6.  specificity among the nearest concepts                        `discovery.confirm`
7.  baselines                                                     `discovery.baselines`
8.  verdicts                                                      `verdict`
9.  lexical control                                               `discovery.confirm`
10. the AUROC that would have been detected with 80 % power       `detectable`
11. intervals                                                     `discovery.inference`
12. situations, in the mean over concepts                         `discovery.baselines`
13. the reverse run, and sets of other sizes                      `confirm`, `describe`
14. one corpus only                                               `discovery.replicate`

numpy and scipy only.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, stats
from scipy.sparse import csr_array

from discovery import describe, inference
from discovery.confirm import Confirmation, Lexical, Reverse, confirm, lexical_control, reverse
from discovery.describe import Beside
from discovery.labels import Labels
from discovery.records import (
    VERDICTS,
    Alignment,
    Candidate,
    Control,
    Cross,
    CurvePoint,
    SetMember,
    SiteChoice,
    Verdict,
)
from discovery.selection import (
    LabelledSet,
    Selection,
    SiteFit,
    check,
    enough,
    few_texts,
    score,
    select,
)
from saes.errors import UserError

KS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Sizes of sets on the curve."""


class AlignResult(NamedTuple):
    """The verdicts, and what later stages need of the way to them."""

    alignments: list[Alignment]
    members: list[SetMember]
    sites: list[SiteChoice]
    candidates: list[Candidate]
    cross: list[Cross]
    curve: list[CurvePoint]
    rejected: int
    """How many of the 2 x concepts tests of step 5 rejected."""
    fits: list[SiteFit]
    """The frozen selections, the chosen view first, with AUROCs on the selection set."""
    singles: Confirmation
    sets: Confirmation

    @property
    def fit(self) -> SiteFit:
        """The frozen selection at the chosen view."""
        return self.fits[0]


@dataclass(frozen=True)
class Evidence:
    """All that the rows of `Alignment` are made of."""

    fits: list[SiteFit]
    """The chosen view first."""
    singles: Confirmation
    sets: Confirmation
    rivals: Int[np.ndarray, "concepts neighbours"]
    firing: Float[np.ndarray, " concepts"]
    """Share of the confirmation texts in which the single latent fires."""
    detectable: Float[np.ndarray, " concepts"]
    beside: tuple[Beside, Beside]
    lexical: Lexical | None
    reverse: Reverse | None


def align(
    selection: LabelledSet,
    confirmation: LabelledSet,
    lexical: LabelledSet | None,
    neutral: Mapping[str, csr_array] | None,
    nearest: Mapping[str, Int[np.ndarray, "concepts neighbours"]],
    concepts: Sequence[str],
    families: Sequence[str],
    *,
    k: int = 16,
    q: float = 0.05,
    candidates: int = 10,
    ks: Sequence[int] = KS,
    draws: int = 1000,
    seed: int = 0,
    verdicts_only: bool = False,
) -> AlignResult:
    """Run the protocol.

    Args:
        selection: everything is chosen on this set.
        confirmation: verdicts are confirmed on this set, once.
        lexical: texts with a concept's word and without the concept, if a lexical control is to be
            run: the first half of the topics chooses, the second half tests.
        neutral: by view, latents of texts that stand for no concept.
        nearest: by view, the concepts nearest to each, by contrastive vectors of the selection set.
        concepts: names, in the order of the labels.
        families: the family of each concept.
        k: latents in a set.
        q: false-discovery rate of steps 5, 6 and 9.
        candidates: latents of each concept to describe.
        ks: sizes of sets on the curve of step 13; those above the number of latents are left out.
        draws: of each bootstrap.
        seed: of the bootstraps.
        verdicts_only: leave out what no verdict rests on: candidates, cross and curve are empty,
            the reverse run is None, and figures that cannot be None are NaN.

    Raises:
        UserError: a set on which the protocol cannot be run.
    """
    check_concepts(concepts, nearest, selection)
    check(selection, k, concepts)
    check_confirmation(confirmation.labels, concepts)
    check_lexical(None if lexical is None else lexical.labels)
    fits = select(selection, k, concepts)
    chosen = fits[0].selection
    rivals = nearest[chosen.view]
    singles, sets = confirm(chosen, confirmation, rivals, q)
    nothing = describe.nothing_beside(len(concepts))
    single_beside, set_beside = nothing, nothing
    if not verdicts_only:
        others = (None, None) if neutral is None else score(chosen, neutral[chosen.view])
        single_beside, set_beside = (
            describe.beside(confirmed, families, values, draws, seed)
            for confirmed, values in zip((singles, sets), others, strict=True)
        )
    x = confirmation.latents[chosen.view]
    evidence = Evidence(
        fits,
        singles,
        sets,
        rivals,
        firing_rates(x, chosen.latent),
        detectable(confirmation.labels, level_of(singles, sets, q)),
        (single_beside, set_beside),
        None if lexical is None else lexical_control(chosen, lexical),
        None if verdicts_only else reverse(selection, confirmation, chosen.view, k),
    )
    result = verdicts(evidence, concepts, families, q)
    if verdicts_only:
        return result
    return result._replace(
        candidates=describe.candidate_rows(
            selection, confirmation, chosen.view, concepts, candidates
        ),
        cross=describe.cross_rows(singles.scores, confirmation.labels, concepts),
        curve=describe.curve_rows(selection, confirmation, chosen.view, ks),
    )


def verdicts(
    evidence: Evidence, concepts: Sequence[str], families: Sequence[str], q: float
) -> AlignResult:
    """The rows that verdicts rest on; candidates, cross and curve are empty."""
    fits, singles, sets = evidence.fits, evidence.singles, evidence.sets
    return AlignResult(
        alignment_rows(evidence, concepts, families, q),
        set_members(fits[0].selection, concepts),
        site_choices(fits),
        [],
        [],
        [],
        rejections(singles, sets, q),
        fits,
        singles,
        sets,
    )


def check_concepts(
    concepts: Sequence[str],
    nearest: Mapping[str, Int[np.ndarray, "concepts neighbours"]],
    texts: LabelledSet,
) -> None:
    """Refuse one concept alone, which nothing can be specific for.

    Raises:
        UserError: fewer than two concepts.
    """
    if len(concepts) < 2:
        raise UserError(
            f"there is one concept, {concepts[0]!r}, and a latent is tested against the concepts "
            "nearest to it: give at least one more concept with texts"
        )
    assert texts.labels.n_concepts == len(concepts), "labels are of other concepts"
    assert texts.latents.keys() <= nearest.keys(), "a view without nearest concepts"


def check_confirmation(labels: Labels, concepts: Sequence[str]) -> None:
    """Refuse a confirmation set on which some concept can't be tested.

    Raises:
        UserError: a concept without texts, or none whose topic has a text of something else.
    """
    missing = np.flatnonzero(labels.counts == 0)
    if len(missing):
        many = few_texts(missing, labels, concepts)
        raise UserError(
            f"the confirmation set has no text of {many}: add some or leave the concepts out; "
            + enough(len(concepts))
        )
    alone = np.flatnonzero(labels.compared() == 0)
    if len(alone):
        raise UserError(
            f"in the confirmation set no text of {few_texts(alone, labels, concepts)} shares its "
            "topic with a text of something else, and texts are compared within topics only: leave "
            "the topics out, or add texts"
        )


def check_lexical(labels: Labels | None) -> None:
    """Refuse a lexical set that cannot be halved.

    Raises:
        UserError: fewer than two topics.
    """
    if labels is not None and len(np.unique(labels.topics)) < 2:
        raise UserError(
            "the lexical set has fewer than two topics: a latent is chosen on the first half of "
            "them and tested on the second, so give each concept two texts or more, or leave the "
            "lexical control out"
        )


def rejections(singles: Confirmation, sets: Confirmation, q: float) -> int:
    """How many tests step 5 rejected."""
    return int((singles.q <= q).sum() + (sets.q <= q).sum())


def level_of(singles: Confirmation, sets: Confirmation, q: float) -> float:
    """The level at which step 5 rejected a concept by one of its tests, whatever the other says.

    Half of q R / n where R of n concepts have a rejection, and of q / n where none has.
    """
    found = int(((singles.q <= q) | (sets.q <= q)).sum())
    return q * max(found, 1) / (2 * len(singles.p))


def firing_rates(
    x: csr_array, latents: Int[np.ndarray, " concepts"]
) -> Float[np.ndarray, " concepts"]:
    """Share of the texts in which each of some latents is not zero."""
    fired = np.bincount(x.indices[x.data != 0], minlength=x.shape[1])
    return fired[latents] / max(x.shape[0], 1)


def detectable(labels: Labels, level: float) -> Float[np.ndarray, " concepts"]:
    """Step 10: the AUROC of each concept that its texts would have shown with 80 % power.

    Exact for one text of the concept in each topic, as in the packaged corpus; else by the normal
    approximation of `inference.needed_positives`. NaN where even a perfect score would not do.
    """
    topics, size = np.unique(labels.topics, return_counts=True)
    compared = labels.compared()
    group_size = int(np.median(size))
    one_each = len(topics) * group_size < 1 << 16 and (compared == len(topics)).all()
    if one_each and (labels.counts == len(topics)).all():
        same = inference.detectable_auroc(len(topics), group_size, level)
        return np.full(labels.n_concepts, same)
    return np.array([_detectable(int(m), len(labels.topics) - int(m), level) for m in compared])


@functools.cache
def _detectable(positives: int, negatives: int, level: float, power: float = 0.8) -> float:
    """AUROC at which a rank test of one topic rejects at a level with this power."""
    null = ((positives + negatives + 1) / (12 * positives * negatives)) ** 0.5
    critical, reach = 0.5 + float(stats.norm.isf(level)) * null, float(stats.norm.ppf(power))

    def surplus(auroc: float) -> float:
        error = inference.hanley_mcneil(auroc, positives, negatives)
        return auroc - critical - reach * error

    highest = 1 - 1e-9
    if surplus(highest) <= 0:
        return float("nan")
    return float(optimize.brentq(surplus, 0.5, highest, xtol=1e-6))


def alignment_rows(
    evidence: Evidence, concepts: Sequence[str], families: Sequence[str], q: float
) -> list[Alignment]:
    """Verdicts with all their figures."""
    chosen = evidence.fits[0].selection
    singles, sets, lexical = evidence.singles, evidence.sets, evidence.lexical
    positives = singles.labels.counts
    return [
        Alignment(
            concept=concept,
            family=families[c],
            verdict=verdict(
                _passes(singles, c, q),
                _passes(sets, c, q),
                lexical=lexical is not None and bool(lexical.q[c] <= q),
            ),
            also_lexical=lexical is not None and bool(singles.q[c] <= q and lexical.own_q[c] <= q),
            site=chosen.site,
            pooling=chosen.pooling,
            latent=int(chosen.latent[c]),
            firing=float(evidence.firing[c]),
            **_figures("", evidence.fits[0].latent_aurocs[c], singles, evidence.beside[0], c),
            **_figures("set_", evidence.fits[0].set_aurocs[c], sets, evidence.beside[1], c),
            nearest=tuple(concepts[int(i)] for i in evidence.rivals[c]),
            positives=int(positives[c]),
            **_reverse_figures(evidence.reverse, c),
            **_lexical_figures(lexical, c),
            detectable_auroc=float(evidence.detectable[c]),
        )
        for c, concept in enumerate(concepts)
    ]


def _passes(confirmed: Confirmation, concept: int, q: float) -> tuple[bool, bool]:
    """Whether a concept passed step 5, and step 6."""
    return bool(confirmed.q[concept] <= q), bool(confirmed.specific_q[concept] <= q)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _figures(
    prefix: str,
    selection: Float[np.ndarray, " groups"],
    confirmed: Confirmation,
    beside: Beside,
    c: int,
) -> dict[str, Any]:
    """The fields of `Alignment` that singles and sets have alike, for concept c."""
    figures = {
        "auroc_selection": float(np.nanmean(selection)) if np.isfinite(selection).any() else np.nan,
        "auroc": float(confirmed.auroc[c]),
        "auroc_low": float(confirmed.interval.low[c]),
        "auroc_high": float(confirmed.interval.high[c]),
        "p": float(confirmed.p[c]),
        "q": float(confirmed.q[c]),
        "specific_auroc": float(confirmed.specific_auroc[c]),
        "specific_p": float(confirmed.specific_p[c]),
        "specific_q": _known(confirmed.specific_q[c]),
        "auroc_pooled": float(beside.pooled[c]),
        "delong_low": float(beside.delong_low[c]),
        "delong_high": float(beside.delong_high[c]),
        "bootstrap_low": float(beside.bootstrap_low[c]),
        "bootstrap_high": float(beside.bootstrap_high[c]),
        "family_auroc": _known(beside.family[c]),
        "neutral_auroc": _known(beside.neutral[c]),
    }
    return {prefix + name: value for name, value in figures.items()}


def _reverse_figures(run: Reverse | None, c: int) -> dict[str, Any]:
    """The fields of step 13."""
    names = ("reverse_latent", "reverse_auroc", "reverse_q", "reverse_set_auroc", "reverse_set_q")
    if run is None:
        return dict.fromkeys(names)
    latent, *rest = (column[c] for column in run)
    return dict(zip(names, [int(latent), *map(float, rest)], strict=True))


def _lexical_figures(lexical: Lexical | None, c: int) -> dict[str, Any]:
    """The fields of step 9; None without lexical texts of the concept."""
    names = ("lexical_latent", "lexical_auroc", "lexical_p", "lexical_q", "latent_lexical_p")
    if lexical is None or lexical.latent[c] < 0:
        return dict.fromkeys(names)
    latent, *rest = (column[c] for column in lexical[:5])
    return dict(zip(names, [int(latent), *map(float, rest)], strict=True))


def set_members(chosen: Selection, concepts: Sequence[str]) -> list[SetMember]:
    """The latents of every concept's set."""
    return [
        SetMember(concept, chosen.site, rank, int(latent), float(weight))
        for concept, latents, weights in zip(concepts, chosen.members, chosen.weights, strict=True)
        for rank, (latent, weight) in enumerate(zip(latents, weights, strict=True), start=1)
    ]


def site_choices(fits: Sequence[SiteFit]) -> list[SiteChoice]:
    """One row a view, the chosen one first."""
    return [
        SiteChoice(
            site=fit.selection.site,
            pooling=fit.selection.pooling,
            latent_auroc_selection=float(np.nanmean(fit.latent_aurocs)),
            set_auroc_selection=float(np.nanmean(fit.set_aurocs)),
            chosen=fit is fits[0],
        )
        for fit in fits
    ]


def verdict(single: tuple[bool, bool], set_: tuple[bool, bool], lexical: bool) -> Verdict:
    """Steps 8 and 9, from whether the single latent and the set passed steps 5 and 6."""
    if all(single):
        return "found"
    if all(set_):
        return "found as a set"
    if single[0] or set_[0]:
        return "found for the family"
    return "lexical only" if lexical else "not found"


def shuffled(labelled: LabelledSet, rng: np.random.Generator) -> LabelledSet:
    """The same texts with labels shuffled within each topic: no concept is left to be found."""
    return labelled.relabelled(labelled.labels.shuffled(rng))


def tally(labels: str, result: AlignResult) -> Control:
    """Verdict counts of a run of the protocol under one labelling."""
    counts = Counter(row.verdict for row in result.alignments)
    found, as_a_set, for_the_family, lexical_only, not_found = (counts[v] for v in VERDICTS)
    return Control(
        labels, found, as_a_set, for_the_family, lexical_only, not_found, result.rejected
    )

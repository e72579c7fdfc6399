"""The verdict on each concept: is there a latent, or a set of latents, that stands for it?

Step numbers are those of the protocol in docs/statistics.md:

1.  statistic: AUROC within topics, averaged over topics          `discovery.scores`
2.  selection on the first set, cross-fitted over writers         `discovery.selection`
3.  freeze
4.  confirmation on the hard set, once, by exact p-values         `confirm`
5.  Benjamini-Hochberg over singles and sets of all concepts      `confirm`
6.  specificity among the five nearest concepts                   `confirm`
8.  verdicts                                                      `verdict`
9.  lexical control on mentions                                   `lexical_control`
10. the AUROC that would have been detected with 80 % power       `align`

Step 7, the baselines, is in `discovery.baselines`. numpy and scipy only.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from discovery import scores, selection
from discovery.records import VERDICTS, Alignment, Control, SetMember, SiteChoice, Verdict
from discovery.selection import LabelledSet, Selection, SiteFit
from saes.errors import UserError


class Confirmation(NamedTuple):
    """Steps 4 to 6 for the single latents, or the sets, of all concepts."""

    aurocs: Float[np.ndarray, "concepts topics"]
    interval: scores.Interval
    """Of the mean of `aurocs` over topics."""
    auroc: Float[np.ndarray, " concepts"]
    p: Float[np.ndarray, " concepts"]
    q: Float[np.ndarray, " concepts"]
    specific_auroc: Float[np.ndarray, " concepts"]
    specific_p: Float[np.ndarray, " concepts"]
    specific_q: Float[np.ndarray, " concepts"]
    """NaN where step 5 did not reject."""


class Lexical(NamedTuple):
    """Step 9 for all concepts: figures on the second half of the mentions."""

    latent: Int[np.ndarray, " concepts"]
    """Chosen on the first half of the mentions."""
    auroc: Float[np.ndarray, " concepts"]
    p: Float[np.ndarray, " concepts"]
    q: Float[np.ndarray, " concepts"]
    story_p: Float[np.ndarray, " concepts"]
    """Of the latent that was chosen on stories."""
    story_q: Float[np.ndarray, " concepts"]


class AlignResult(NamedTuple):
    """The verdicts, and what later stages need of the way to them."""

    alignments: list[Alignment]
    members: list[SetMember]
    sites: list[SiteChoice]
    rejected: int
    """How many of the 2 x concepts tests of step 5 rejected."""
    fit: SiteFit
    """The frozen selection at the chosen site, with its AUROCs by topic on the first set."""
    singles: Confirmation
    sets: Confirmation


def align(
    first: LabelledSet,
    hard: LabelledSet,
    mentions: LabelledSet,
    nearest: Mapping[str, Int[np.ndarray, "concepts neighbours"]],
    concepts: Sequence[str],
    families: Sequence[str],
    k: int = 16,
    q: float = 0.05,
) -> AlignResult:
    """Run the protocol.

    Args:
        first: everything is chosen on this set.
        hard: verdicts are confirmed on this set, once.
        mentions: texts with the concept's word and without the feeling. `topics` number the
            mentions of a concept: the first half of the numbers chooses, the second half tests.
        nearest: by site, the five concepts nearest to each, by contrastive vectors of the first
            set.
        concepts: names, in the order of the labels.
        families: the family of each concept.
        k: latents in a set.
        q: false-discovery rate of steps 5, 6 and 9.

    Raises:
        UserError: a set on which the protocol cannot be run.
    """
    _check("hard set", hard, concepts)
    _check("mentions", mentions, concepts)
    fits = selection.select(first, len(concepts), k)
    chosen = fits[0].selection
    rivals = nearest[chosen.site]
    singles, sets = confirm(chosen, hard, rivals, q)
    lexical = lexical_control(chosen, mentions)
    rejected = int((singles.q <= q).sum() + (sets.q <= q).sum())
    topics, sizes = np.unique(hard.topics, return_counts=True)
    level = q * max(rejected, 1) / (2 * len(concepts))
    detectable = scores.detectable_auroc(len(topics), int(np.median(sizes)), level)
    latents = hard.latents[chosen.site][:, chosen.latent].toarray()
    firing = np.count_nonzero(latents, axis=0) / len(latents)
    alignments = [
        Alignment(
            concept=concept,
            family=families[c],
            verdict=verdict(
                _passes(singles, c, q), _passes(sets, c, q), lexical=bool(lexical.q[c] <= q)
            ),
            also_lexical=bool(singles.q[c] <= q and lexical.story_q[c] <= q),
            site=chosen.site,
            latent=int(chosen.latent[c]),
            firing=float(firing[c]),
            **_figures("", fits[0].latent_aurocs[c], singles, c),
            **_figures("set_", fits[0].set_aurocs[c], sets, c),
            nearest=tuple(concepts[int(i)] for i in rivals[c]),
            lexical_latent=int(lexical.latent[c]),
            lexical_auroc=float(lexical.auroc[c]),
            lexical_p=float(lexical.p[c]),
            lexical_q=float(lexical.q[c]),
            latent_lexical_p=float(lexical.story_p[c]),
            detectable_auroc=detectable,
        )
        for c, concept in enumerate(concepts)
    ]
    return AlignResult(
        alignments, _members(chosen, concepts), _sites(fits), rejected, fits[0], singles, sets
    )


def _check(name: str, labelled: LabelledSet, concepts: Sequence[str]) -> None:
    if len(np.unique(labelled.topics)) < 2:
        raise UserError(f"the {name} has fewer than two topics, and nothing is tested within one")
    missing = np.setdiff1d(np.arange(len(concepts)), labelled.labels)
    if len(missing):
        names = ", ".join(concepts[int(c)] for c in missing[:3])
        raise UserError(
            f"the {name} has no text of {len(missing)} concepts ({names}): "
            "add some or leave the concepts out"
        )


def _passes(confirmed: Confirmation, concept: int, q: float) -> tuple[bool, bool]:
    """Whether a concept passed step 5, and step 6."""
    return bool(confirmed.q[concept] <= q), bool(confirmed.specific_q[concept] <= q)


def _figures(
    prefix: str, first: Float[np.ndarray, " topics"], confirmed: Confirmation, c: int
) -> dict[str, Any]:
    """The fields of `Alignment` that singles and sets have alike, for concept c."""
    specific_q = float(confirmed.specific_q[c])
    figures = {
        "auroc_first": float(np.nanmean(first)),
        "auroc": float(confirmed.auroc[c]),
        "auroc_low": float(confirmed.interval.low[c]),
        "auroc_high": float(confirmed.interval.high[c]),
        "p": float(confirmed.p[c]),
        "q": float(confirmed.q[c]),
        "specific_auroc": float(confirmed.specific_auroc[c]),
        "specific_p": float(confirmed.specific_p[c]),
        "specific_q": None if np.isnan(specific_q) else specific_q,
    }
    return {prefix + name: value for name, value in figures.items()}


def _members(chosen: Selection, concepts: Sequence[str]) -> list[SetMember]:
    return [
        SetMember(concept, chosen.site, rank, int(latent), float(weight))
        for concept, latents, weights in zip(concepts, chosen.members, chosen.weights, strict=True)
        for rank, (latent, weight) in enumerate(zip(latents, weights, strict=True), start=1)
    ]


def _sites(fits: Sequence[SiteFit]) -> list[SiteChoice]:
    """One row a site, the chosen one first."""
    return [
        SiteChoice(
            site=fit.selection.site,
            latent_auroc_first=float(np.nanmean(fit.latent_aurocs)),
            set_auroc_first=float(np.nanmean(fit.set_aurocs)),
            chosen=fit is fits[0],
        )
        for fit in fits
    ]


def confirm(
    chosen: Selection,
    hard: LabelledSet,
    nearest: Int[np.ndarray, "concepts neighbours"],
    q: float,
) -> tuple[Confirmation, Confirmation]:
    """Steps 4 to 6, for single latents and for sets.

    The specificity test is the same exact test, among the texts of a concept and of the concepts
    nearest to it. Its false-discovery control covers the rejections of step 5.
    """
    n = len(nearest)
    both = selection.score(chosen, hard.latents[chosen.site])
    own = [_test(values, hard) for values in both]
    rivals = [np.append(nearest[c], c) for c in range(n)]
    specific = [_test(values, hard, rivals) for values in both]
    q_value = scores.benjamini_hochberg(np.concatenate([test.p for test in own])).reshape(2, n)
    specific_p = np.stack([test.p for test in specific])
    specific_q = np.full((2, n), np.nan)
    rejected = q_value <= q
    specific_q[rejected] = scores.benjamini_hochberg(specific_p[rejected])
    singles, sets = (
        Confirmation(
            aurocs := scores.aurocs_by_group(values, hard.labels, hard.topics),
            scores.auroc_interval(aurocs),
            own[i].auroc,
            own[i].p,
            q_value[i],
            specific[i].auroc,
            specific[i].p,
            specific_q[i],
        )
        for i, values in enumerate(both)
    )
    return singles, sets


class _Tests(NamedTuple):
    auroc: Float[np.ndarray, " concepts"]
    p: Float[np.ndarray, " concepts"]


def _test(
    values: Float[np.ndarray, "texts concepts"],
    labelled: LabelledSet,
    rivals: Sequence[Int[np.ndarray, " some"]] | None = None,
) -> _Tests:
    """Exact test of column c for concept c, among all texts or those of concepts `rivals[c]`."""
    tests = []
    for c, column in enumerate(values.T):
        rows = np.isin(labelled.labels, rivals[c]) if rivals else slice(None)
        labels, topics = labelled.labels[rows], labelled.topics[rows]
        tests.append(scores.exact_p(column[rows], labels == c, topics))
    return _Tests(np.array([t.auroc for t in tests]), np.array([t.p for t in tests]))


def lexical_control(chosen: Selection, mentions: LabelledSet) -> Lexical:
    """Step 9: does a latent fire on the word without the feeling, and does the story latent?

    A latent is chosen on the first half of the mentions at the selection's site and tested on the
    second half; so is the latent that was chosen on stories. Mention i of a concept is compared
    with mentions i of the others.
    """
    x = mentions.latents[chosen.site]
    numbers = np.unique(mentions.topics)
    choosing = mentions.topics < numbers[len(numbers) // 2]
    ranks = scores.within_group_ranks(x[choosing], mentions.topics[choosing])
    labels = mentions.labels[choosing]
    latent = selection.top_latents(ranks, labels, len(chosen.members), k=1)[:, 0]
    rest = LabelledSet(
        {chosen.site: x[~choosing]},
        mentions.labels[~choosing],
        mentions.topics[~choosing],
        mentions.writers[~choosing],
    )
    own, story = (
        _test(rest.latents[chosen.site][:, latents].toarray(), rest)
        for latents in (latent, chosen.latent)
    )
    bh = scores.benjamini_hochberg
    return Lexical(latent, own.auroc, own.p, bh(own.p), story.p, bh(story.p))


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
    labels = labelled.labels.copy()
    for topic in np.unique(labelled.topics):
        rows = np.flatnonzero(labelled.topics == topic)
        labels[rows] = labels[rng.permutation(rows)]
    return replace(labelled, labels=labels)


def tally(labels: str, result: AlignResult) -> Control:
    """Verdict counts of a run of the protocol under one labelling."""
    counts = Counter(row.verdict for row in result.alignments)
    found, as_a_set, for_the_family, lexical_only, not_found = (counts[v] for v in VERDICTS)
    return Control(
        labels, found, as_a_set, for_the_family, lexical_only, not_found, result.rejected
    )

"""Steps 4 to 6, 9 and 13 of the verdict protocol: tests of what was frozen, on other texts.

numpy and scipy only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array

from discovery import inference, ranks
from discovery.inference import benjamini_hochberg, rank_test
from discovery.labels import Labels
from discovery.selection import LabelledSet, Selection, best_latents, choose, score


class Confirmation(NamedTuple):
    """Steps 4 to 6 for the single latents, or the sets, of all concepts."""

    scores: Float[np.ndarray, "texts concepts"]
    """Column c is for concept c."""
    labels: Labels
    aurocs: Float[np.ndarray, "concepts topics"]
    """NaN where a topic has no text of the concept, or no other."""
    interval: inference.Interval
    """Of the mean of `aurocs` over topics."""
    p: Float[np.ndarray, " concepts"]
    q: Float[np.ndarray, " concepts"]
    """Step 5 rejects where it is at most its q (`within_concepts`)."""
    specific_auroc: Float[np.ndarray, " concepts"]
    specific_p: Float[np.ndarray, " concepts"]
    specific_q: Float[np.ndarray, " concepts"]
    """NaN where step 5 did not reject."""

    @property
    def auroc(self) -> Float[np.ndarray, " concepts"]:
        """Means of `aurocs`."""
        return self.interval.mean


class RankTests(NamedTuple):
    """One test a concept."""

    auroc: Float[np.ndarray, " concepts"]
    p: Float[np.ndarray, " concepts"]


class Lexical(NamedTuple):
    """Step 9 for all concepts: figures on the second half of the lexical texts.

    NaN, and latent -1, for concepts without lexical texts in both halves.
    """

    latent: Int[np.ndarray, " concepts"]
    """Chosen on the first half."""
    auroc: Float[np.ndarray, " concepts"]
    p: Float[np.ndarray, " concepts"]
    q: Float[np.ndarray, " concepts"]
    own_p: Float[np.ndarray, " concepts"]
    """Of the latent that was chosen on the selection set."""
    own_q: Float[np.ndarray, " concepts"]


class Reverse(NamedTuple):
    """Step 13 for all concepts: latents chosen on the confirmation set, on the selection set."""

    latent: Int[np.ndarray, " concepts"]
    auroc: Float[np.ndarray, " concepts"]
    q: Float[np.ndarray, " concepts"]
    set_auroc: Float[np.ndarray, " concepts"]
    set_q: Float[np.ndarray, " concepts"]


def confirm(
    chosen: Selection,
    confirmation: LabelledSet,
    nearest: Int[np.ndarray, "concepts neighbours"],
    q: float,
) -> tuple[Confirmation, Confirmation]:
    """Steps 4 to 6, for single latents and for sets.

    The specificity test is the same test among the texts of a concept and of the concepts nearest
    to it. Its false-discovery control covers the rejections of step 5.
    """
    labels = confirmation.labels
    both = score(chosen, confirmation.latents[chosen.view])
    rivals = [np.append(near, c) for c, near in enumerate(nearest)]
    own = [rank_tests(values, labels) for values in both]
    specific = [rank_tests(values, labels, rivals) for values in both]
    single, sets = (
        Confirmation(
            values,
            labels,
            ranks.aurocs_by_group(values, labels),
            inference.auroc_intervals(values, labels),
            of_all.p,
            of_all.p,
            among.auroc,
            among.p,
            among.p,
        )
        for values, of_all, among in zip(both, own, specific, strict=True)
    )
    return adjusted(single, sets, q)


def adjusted(
    singles: Confirmation, sets: Confirmation, q: float
) -> tuple[Confirmation, Confirmation]:
    """Steps 5 and 6: q-values of all p-values, and of the specific ones of what step 5 rejects.

    Those that are there are replaced. Step 6 is Benjamini-Hochberg over the tests that step 5
    rejected, single latents and sets together.
    """
    q_value = within_concepts(np.stack([singles.p, sets.p]))
    specific_p = np.stack([singles.specific_p, sets.specific_p])
    specific_q = np.full(q_value.shape, np.nan)
    rejected = q_value <= q
    specific_q[rejected] = benjamini_hochberg(specific_p[rejected])
    return (
        singles._replace(q=q_value[0], specific_q=specific_q[0]),
        sets._replace(q=q_value[1], specific_q=specific_q[1]),
    )


def within_concepts(p: Float[np.ndarray, "2 concepts"]) -> Float[np.ndarray, "2 concepts"]:
    """Step 5: q-values of two tests a concept, the errors counted by concept.

    The two p-values of a concept make one (Simes 1986), and Benjamini-Hochberg at q over these
    finds R of n concepts. In each of them the two tests are made at the level q R / n (Benjamini
    and Bogomolov 2014), again by Benjamini-Hochberg: one is rejected if its p-value is at most half
    of the level, both are if both p-values are at most the level. A q-value is the smallest q at
    which the test is rejected by all of this; that of a concept is the smaller one of its two.
    """
    n = p.shape[1]
    low, high = np.sort(p, axis=0)
    simes = np.minimum(2 * low, high)
    own = np.where(p == low, simes, high)  # rejected where it is at most q R / n
    found = np.sort(benjamini_hochberg(simes))  # q reaches found[i]: R is i + 1 or more
    reached = np.searchsorted(found * np.arange(1, n + 1), n * own)
    at_next = np.append(found, np.inf)[reached]
    before = np.where(reached > 0, n * own / np.maximum(reached, 1), np.inf)
    return np.minimum(at_next, before)


def rank_tests(
    values: Float[np.ndarray, "texts concepts"],
    labels: Labels,
    rivals: Sequence[Int[np.ndarray, " _"]] | None = None,
) -> RankTests:
    """Test column c for concept c, among all texts or those of the concepts `rivals[c]`.

    Where no topic holds a text of the concept and another of these, nothing speaks for the concept:
    the AUROC is 0.5 and p is 1.
    """
    by_concept = csc_array(labels.concepts)
    found = [(0.5, 1.0)] * labels.n_concepts
    for c, column in enumerate(values.T):
        positive = np.zeros(len(values), bool)
        positive[texts_of(by_concept, [c])] = True
        rows = texts_of(by_concept, rivals[c]) if rivals else np.arange(len(values))
        try:
            test = rank_test(column[rows], positive[rows], labels.topics[rows])
        except ValueError:
            continue
        found[c] = (test.auroc, test.p)
    auroc, p = np.array(found).reshape(-1, 2).T
    return RankTests(auroc, p)


def texts_of(
    by_concept: Bool[csc_array, "texts concepts"],
    concepts: Sequence[int] | Int[np.ndarray, " some"],
) -> Int[np.ndarray, " rows"]:
    """The texts that are labelled with any of some concepts, in order."""
    ends = by_concept.indptr
    parts = [by_concept.indices[ends[c] : ends[c + 1]] for c in concepts]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def lexical_control(chosen: Selection, lexical: LabelledSet) -> Lexical:
    """Step 9: does a latent fire on the word without the feeling, and does the one chosen?

    A latent is chosen on the first half of the topics of the lexical texts, at the selection's
    view, and tested on the second half; so is the latent that was chosen on the selection set.
    Where lexical texts have no topics, the topic is the number of the text in its concept: text i
    is compared with texts i of the other concepts. Where that leaves a concept of two texts or more
    without any to test, every other topic chooses.
    """
    x, labels = lexical.latents[chosen.view], lexical.labels
    numbers, number = np.unique(labels.topics, return_inverse=True)
    choosing = number < len(numbers) // 2
    if ((labels.counts > 1) & (labels.rows(~choosing).counts == 0)).any():
        choosing = number % 2 == 0  # concepts have unequal numbers of texts: halve each of them
    half = LabelledSet({chosen.view: csr_array(x[choosing])}, labels.rows(choosing))
    rest, tested = csr_array(x[~choosing]), labels.rows(~choosing)
    known = (half.labels.compared() > 0) & (tested.compared() > 0)
    latent = np.full(len(known), -1)
    result = np.full((5, len(known)), np.nan)
    if known.any():
        latent[known] = best_latents(half, chosen.view, 1)[known, 0]
        own, story = (
            rank_tests(csc_array(rest)[:, latents].toarray(), tested)
            for latents in (latent, chosen.latent)
        )
        result[:, known] = np.stack(
            [
                own.auroc[known],
                own.p[known],
                benjamini_hochberg(own.p[known]),
                story.p[known],
                benjamini_hochberg(story.p[known]),
            ]
        )
    return Lexical(latent, *result)


def reverse(selection: LabelledSet, confirmation: LabelledSet, view: str, k: int) -> Reverse:
    """Step 13: choose on the confirmation set and test on the selection set, at the same view.

    The latents can then be compared with those of the verdicts. No verdict rests on it.
    """
    chosen = choose(confirmation.only(view), view, k)
    both = score(chosen, selection.latents[view])
    single, sets = (rank_tests(values, selection.labels) for values in both)
    q = within_concepts(np.stack([single.p, sets.p]))
    return Reverse(chosen.latent, single.auroc, q[0], sets.auroc, q[1])

"""Step 14 of the verdict protocol: one corpus only, and no second one to confirm on.

Either the texts are split in halves by unit (role `split` of `discovery.corpora`), and the protocol
is run as ever; or they are cross-fitted, as here. The folds of a cross-fit share texts, so its
AUROCs vary more than an analytic p-value allows for; the null is taken from the whole selection,
run again under labels shuffled within topics. numpy and scipy only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array

from discovery import describe, inference, ranks
from discovery.align import (
    KS,
    AlignResult,
    Evidence,
    check_concepts,
    check_lexical,
    detectable,
    firing_rates,
    level_of,
    shuffled,
    verdicts,
)
from discovery.confirm import Confirmation, adjusted, lexical_control, texts_of
from discovery.describe import Beside
from discovery.labels import Labels
from discovery.selection import LabelledSet, SiteFit, check, fit_views
from saes.errors import UserError


class Statistics(NamedTuple):
    """Cross-fitted AUROCs of one run, and in units of their error if no concept were there.

    By kind (single latents, sets), test (among all texts, among those of the nearest concepts) and
    concept; NaN where no group holds both a text of the concept and another.
    """

    auroc: Float[np.ndarray, "2 2 concepts"]
    z: Float[np.ndarray, "2 2 concepts"]


def crossfit(
    texts: LabelledSet,
    lexical: LabelledSet | None,
    nearest: Mapping[str, Int[np.ndarray, "concepts neighbours"]],
    concepts: Sequence[str],
    families: Sequence[str],
    *,
    k: int = 16,
    q: float = 0.05,
    candidates: int = 10,
    ks: Sequence[int] = KS,
    shuffles: int = 40,
    draws: int = 1000,
    seed: int = 0,
    verdicts_only: bool = False,
    progress: Callable[[int], object] | None = None,
) -> AlignResult:
    """Run the protocol on one corpus.

    A p-value is the share of shuffled runs, pooled over concepts, whose statistic is as large. The
    statistic is the cross-fitted AUROC less one half, over the error it would have if folds shared
    no texts: so concepts of many and of few texts can share a null. Intervals are widened by the
    standard deviation of that null. Figures of the confirmation set are those of the cross-fit;
    what needs a second set (the reverse run, the AUROC of candidates there, neutral texts) is None,
    or NaN where it cannot be None.

    Args:
        texts: all labelled texts.
        lexical: as in `discovery.align.align`, and so what is not named here.
        nearest: by view, the concepts nearest to each.
        concepts: names, in the order of the labels.
        families: the family of each concept.
        k: latents in a set.
        q: false-discovery rate.
        candidates: latents of each concept to describe.
        ks: sizes of sets on the curve.
        shuffles: runs of the whole selection under shuffled labels.
        draws: of each bootstrap.
        seed: of the shuffles and bootstraps.
        verdicts_only: leave out what no verdict rests on.
        progress: called with 1 after each shuffle.

    Raises:
        UserError: too few shuffles, or texts on which the protocol cannot be run.
    """
    least = math.ceil(2 / q)
    if shuffles < least:
        raise UserError(
            f"shuffles is {shuffles}, but p-values as small as a false-discovery rate of {q} asks "
            f"for take at least {least}; raise it"
        )
    check_concepts(concepts, nearest, texts)
    check(texts, k, concepts)
    check_lexical(None if lexical is None else lexical.labels)
    fits = fit_views(texts, k)
    fit = fits[0]
    view = fit.selection.view
    true = statistics(fit, nearest[view])
    rng = np.random.default_rng(seed)
    null = np.empty((shuffles, *true.z.shape))
    for i in range(shuffles):
        run = fit_views(shuffled(texts, rng), k)[0]
        null[i] = statistics(run, nearest[run.selection.view]).z
        if progress:
            progress(1)
    p = pooled_p(true.z, null)
    width = np.maximum(1.0, np.nanstd(null[:, :, 0], axis=(0, 2)))
    single = _confirmation(fit.latent_scores, fit, true.auroc[0], p[0], float(width[0]))
    set_ = _confirmation(fit.set_scores, fit, true.auroc[1], p[1], float(width[1]))
    singles, sets = adjusted(single, set_, q)
    folds = texts.labels._replace(topics=texts.labels.folds())
    besides = [describe.nothing_beside(len(concepts))] * 2
    if not verdicts_only:
        besides = [
            _widened(describe.beside(part, families, None, draws, seed, folds), part, float(w))
            for part, w in zip((singles, sets), width, strict=True)
        ]
    power = 0.5 + width[0] * (detectable(fit.labels, level_of(singles, sets, q)) - 0.5)
    evidence = Evidence(
        fits,
        singles,
        sets,
        nearest[view],
        firing_rates(csr_array(texts.latents[view]), fit.selection.latent),
        np.where(power < 1, power, np.nan),
        (besides[0], besides[1]),
        None if lexical is None else lexical_control(fit.selection, lexical),
        None,
    )
    result = verdicts(evidence, concepts, families, q)
    if verdicts_only:
        return result
    return result._replace(
        candidates=describe.candidate_rows(texts, None, view, concepts, candidates),
        cross=describe.cross_rows(fit.latent_scores, fit.labels, concepts),
        curve=describe.curve_rows(texts, None, view, ks),
    )


def pooled_p(
    observed: Float[np.ndarray, "*tests concepts"],
    null: Float[np.ndarray, "shuffles *tests concepts"],
) -> Float[np.ndarray, "*tests concepts"]:
    """p-values by a null pooled over concepts: (1 + how many are as large) / (1 + how many)."""
    p = np.ones(observed.shape)
    for test in np.ndindex(observed.shape[:-1]):
        pool = null[(slice(None), *test)]
        pool = np.sort(pool[np.isfinite(pool)])
        below = np.searchsorted(pool, observed[test] - 1e-9)
        own = (1 + len(pool) - below) / (1 + len(pool))
        p[test] = np.where(np.isfinite(observed[test]), own, 1.0)
    return p


def statistics(fit: SiteFit, nearest: Int[np.ndarray, "concepts neighbours"]) -> Statistics:
    """Cross-fitted AUROCs of a selection with their errors, for single latents and for sets."""
    n = len(nearest)
    by_concept = csc_array(fit.labels.concepts)
    everything = np.arange(len(fit.labels.topics))
    rivals = [texts_of(by_concept, np.append(near, c)) for c, near in enumerate(nearest)]
    auroc, z = np.full((2, 2, n), np.nan), np.full((2, 2, n), np.nan)
    for test, rows in enumerate(([everything] * n, rivals)):
        groups = _Groups.of(fit.labels, by_concept, rows)
        for kind, scores in enumerate((fit.latent_scores, fit.set_scores)):
            auroc[kind, test], error = groups.aurocs(scores)
            z[kind, test] = (auroc[kind, test] - 0.5) / error
    return Statistics(auroc, z)


class _Groups(NamedTuple):
    """Texts of each concept's comparison, one concept after another, and their segments.

    A segment is a concept and a group of texts that are compared for it.
    """

    row: Int[np.ndarray, " entries"]
    concept: Int[np.ndarray, " entries"]
    positive: Bool[np.ndarray, " entries"]
    segment: Int[np.ndarray, " entries"]
    owner: Int[np.ndarray, " segments"]
    """The concept of each segment."""
    n_concepts: int

    @classmethod
    def of(
        cls,
        labels: Labels,
        by_concept: Bool[csc_array, "texts concepts"],
        rows: Sequence[Int[np.ndarray, " _"]],
    ) -> "_Groups":
        """Compare the texts `rows[c]` for concept c."""
        row = np.concatenate(rows)
        concept = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        positive = np.concatenate(
            [np.isin(r, texts_of(by_concept, [c])) for c, r in enumerate(rows)]
        )
        width = int(labels.topics.max()) + 1
        codes, segment = np.unique(concept * width + labels.topics[row], return_inverse=True)
        return cls(row, concept, positive, segment, codes // width, len(rows))

    def aurocs(
        self, scores: Float[np.ndarray, "texts concepts"]
    ) -> tuple[Float[np.ndarray, " concepts"], Float[np.ndarray, " concepts"]]:
        """Mean AUROC over segments, and its error if texts were independent and ties absent."""
        value = scores[self.row, self.concept]
        order = np.lexsort((value, self.segment))
        ordered, segment = value[order], self.segment[order]
        size = np.bincount(self.segment, minlength=len(self.owner))
        start = np.flatnonzero(np.diff(segment, prepend=-1) | (np.diff(ordered, prepend=0) != 0))
        length = np.diff(np.append(start, len(order)))
        before = (np.cumsum(size) - size)[segment[start]]
        rank = np.repeat(start - before + (length + 1) / 2, length)
        own = self.positive[order]
        m = np.bincount(segment[own], minlength=len(size))
        total = np.bincount(segment[own], rank[own], minlength=len(size))
        used = (m > 0) & (m < size)
        m, n, owner = m[used], size[used] - m[used], self.owner[used]
        auroc = (total[used] - m * (m + 1) / 2) / (m * n)
        variance = (m + n + 1) / (12 * m * n)
        groups = np.bincount(owner, minlength=self.n_concepts).astype(np.float64)
        groups[groups == 0] = np.nan
        mean = np.bincount(owner, auroc, minlength=self.n_concepts) / groups
        return mean, np.bincount(owner, variance, minlength=self.n_concepts) ** 0.5 / groups


def _confirmation(
    scores: Float[np.ndarray, "texts concepts"],
    fit: SiteFit,
    auroc: Float[np.ndarray, "2 concepts"],
    p: Float[np.ndarray, "2 concepts"],
    width: float,
) -> Confirmation:
    """Cross-fitted figures in the form of confirmed ones; q-values are still to be made."""
    mean, low, high = inference.auroc_intervals(scores, fit.labels)
    aurocs = ranks.aurocs_by_group(scores, fit.labels)
    interval = inference.Interval(mean, *_wider(mean, low, high, width))
    specific = np.nan_to_num(auroc[1], nan=0.5)
    return Confirmation(scores, fit.labels, aurocs, interval, p[0], p[0], specific, p[1], p[1])


def _wider(
    mean: Float[np.ndarray, " concepts"],
    low: Float[np.ndarray, " concepts"],
    high: Float[np.ndarray, " concepts"],
    width: float,
) -> tuple[Float[np.ndarray, " concepts"], Float[np.ndarray, " concepts"]]:
    """Bounds `width` times as far from the mean, within 0 and 1."""
    return np.maximum(mean - width * (mean - low), 0), np.minimum(mean + width * (high - mean), 1)


def _widened(beside: Beside, confirmed: Confirmation, width: float) -> Beside:
    mean = confirmed.auroc
    delong = _wider(mean, beside.delong_low, beside.delong_high, width)
    bootstrap = _wider(mean, beside.bootstrap_low, beside.bootstrap_high, width)
    return beside._replace(
        delong_low=delong[0],
        delong_high=delong[1],
        bootstrap_low=bootstrap[0],
        bootstrap_high=bootstrap[1],
    )

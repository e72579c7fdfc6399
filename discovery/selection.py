"""Steps 1 to 3 of the verdict protocol: on the selection set, choose latents for each concept.

No label of the confirmation set is ever seen here. Inner folds keep units whole (a unit is what
texts share by topic or writer): a fold chooses by the labels of the other folds and scores its own
texts. numpy and scipy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array

from discovery import inference, ranks
from discovery.labels import Labels
from saes.errors import UserError

MIN_FIRING = 0.002
"""Latents that fire in a smaller share of the texts are passed over."""

SHRINKAGE = 0.5
"""How far the correlations among the latents of a set are shrunken to zero.

On planted data (`scripts/validate_discovery.py --only ways`) the AUROC of sets changes by less than
0.01 between 0.3 and 1, and as little where roots or logarithms take the place of raw activations;
to rank latents the AUROC does better than Cohen's d.
"""

BLOCK = 1 << 24
"""Numbers that the discriminants of a block of concepts hold at once, about: 128 MiB."""


class Prepared(NamedTuple):
    """What selection needs of a view that does not depend on labels."""

    source: Float[csr_array, "texts d_sae"]
    latents: Float[csr_array, "texts d_sae"]
    """Those of `source`, sorted, without stored zeros."""
    topics: Int[np.ndarray, " texts"]
    ranks: ranks.Ranks
    """Within topics, over all texts of the set."""
    fires: Int[np.ndarray, " d_sae"]
    """In how many texts each latent does."""


@dataclass(frozen=True)
class LabelledSet:
    """Pooled latents of labelled texts, at each view (a site and a pooling).

    Ranks are made once a view and shared with every set that `relabelled` makes of this one.
    """

    latents: dict[str, csr_array]
    """By view, [texts, d_sae]."""
    labels: Labels
    cache: dict[str, Prepared] = field(default_factory=dict[str, Prepared], repr=False)

    def __post_init__(self) -> None:
        texts = {view: x.shape[0] for view, x in self.latents.items()}
        n = len(self.labels.topics)
        assert set(texts.values()) <= {n}, f"{n} labels for {texts}"

    def prepared(self, view: str) -> Prepared:
        """The view's latents and their ranks within topics."""
        source, topics = self.latents[view], self.labels.topics
        known = self.cache.get(view)
        if known and known.source is source and np.array_equal(known.topics, topics):
            return known
        x = csr_array(source, copy=True)
        x.sum_duplicates()
        x.eliminate_zeros()
        fires = np.bincount(x.indices, minlength=x.shape[1])
        self.cache[view] = Prepared(source, x, topics, ranks.within_group_ranks(x, topics), fires)
        return self.cache[view]

    def relabelled(self, labels: Labels) -> "LabelledSet":
        """The same texts with other labels."""
        return LabelledSet(self.latents, labels, self.cache)

    def only(self, view: str) -> "LabelledSet":
        """The same texts at one view."""
        return LabelledSet({view: self.latents[view]}, self.labels, self.cache)


class Selection(NamedTuple):
    """What was chosen on the selection set."""

    view: str
    members: Int[np.ndarray, "concepts k"]
    """The set of each concept, best latent first."""
    weights: Float[np.ndarray, "concepts k"]
    """Discriminant weights of the members' pooled activations; each row has norm 1."""

    @property
    def latent(self) -> Int[np.ndarray, " concepts"]:
        """The best single latent of each concept."""
        return self.members[:, 0]

    @property
    def site(self) -> str:
        """The view's site."""
        return self.view.partition("@")[0]

    @property
    def pooling(self) -> str:
        """The view's pooling."""
        return self.view.partition("@")[2]


class SiteFit(NamedTuple):
    """The selection at one view, and its cross-fitted AUROCs on the selection set."""

    selection: Selection
    latent_aurocs: Float[np.ndarray, "concepts groups"]
    """Within the groups of `labels`; NaN where a group has no text of the concept, or no other."""
    set_aurocs: Float[np.ndarray, "concepts groups"]
    latent_scores: Float[np.ndarray, "texts concepts"]
    """Of each text, by the selection of the other folds."""
    set_scores: Float[np.ndarray, "texts concepts"]
    labels: Labels
    """The labels with topics cut by fold: scores of different folds have no common scale."""


def select(texts: LabelledSet, k: int, names: Sequence[str] | None = None) -> list[SiteFit]:
    """Choose latents at every view.

    Args:
        texts: the selection set.
        k: latents in a set.
        names: of the concepts, for messages.

    Returns:
        The fits, best view first: that with the highest mean cross-fitted AUROC of the sets. One
        view serves all concepts.

    Raises:
        UserError: texts on which nothing can be selected (see `check`).
    """
    check(texts, k, names)
    return fit_views(texts, k)


def fit_views(texts: LabelledSet, k: int) -> list[SiteFit]:
    """`select` on texts that have been checked."""
    folds = texts.labels.folds()
    fits = [fit_view(texts, view, (k,), folds)[0] for view in sorted(texts.latents)]
    return sorted(fits, key=lambda fit: -round(float(np.nanmean(fit.set_aurocs)), 12))


def check(texts: LabelledSet, k: int, names: Sequence[str] | None = None) -> None:
    """Refuse a selection set that cannot be cross-fitted.

    Raises:
        UserError: as `check_labels`, or a view without k latents or without one that varies.
    """
    check_labels(texts.labels, names)
    for view, x in texts.latents.items():
        if x.shape[1] < k:
            raise UserError(f"{view} has {x.shape[1]} latents, too few for a set of k={k}")
        if (x.max(axis=0) - x.min(axis=0)).nnz == 0:
            raise UserError(
                f"no latent at {view} differs between any two texts of the selection set (all are "
                "zero or constant), so there is nothing to choose from: is it the right SAE?"
            )


def check_labels(labels: Labels, names: Sequence[str] | None = None) -> None:
    """Refuse texts that cannot be cross-fitted.

    Raises:
        UserError: one unit only, or a concept whose texts are too few to choose on some and score
            others.
    """
    folds = labels.folds()
    n_texts = len(folds)
    if folds.max(initial=0) == 0:
        raise UserError(
            f"all {n_texts} texts of the selection set share one unit (texts that share a topic or "
            "a writer do), so none can be left out to score a choice on: give texts of at least two"
        )
    row = np.repeat(np.arange(n_texts), np.diff(labels.concepts.indptr))
    held = np.zeros((int(folds.max()) + 1, labels.n_concepts), bool)
    held[folds[row], labels.concepts.indices] = True
    few = np.flatnonzero(held.sum(0) < 2)
    if len(few):
        many = few_texts(few, labels, names)
        raise UserError(
            f"the selection set has too few texts of {many}: a latent is chosen on some and scored "
            "on others, so texts of two units (topics or writers) are the least; "
            + enough(labels.n_concepts)
        )
    alone = np.flatnonzero(labels.compared() == 0)
    if len(alone):
        raise UserError(
            f"in the selection set no text of {few_texts(alone, labels, names)} shares its topic "
            "with a text of something else, and texts are compared within topics only: leave the "
            "topics out, or add texts"
        )
    apart = np.flatnonzero(labels.crossed(folds).compared() == 0)
    if len(apart):
        raise UserError(
            f"in the selection set no fold holds a text of {few_texts(apart, labels, names)} and a "
            "text of something else (folds keep writers whole, and held-out texts are compared "
            "within a fold): give texts of other writers, or leave the writers out"
        )


def few_texts(
    concepts: Int[np.ndarray, " some"], labels: Labels, names: Sequence[str] | None
) -> str:
    """Words for some concepts and how many texts each has: the first three by name."""
    counts = labels.counts
    shown = [
        f"{repr(names[int(c)]) if names else f'number {c}'} ({counts[c]})" for c in concepts[:3]
    ]
    more = ", ..." if len(concepts) > 3 else ""
    return f"{len(concepts)} concept{'s' * (len(concepts) > 1)}: {', '.join(shown)}{more}"


def enough(n_concepts: int, q: float = 0.05) -> str:
    """Words for how many texts a concept needs, among 100 others, to show which AUROC in step 5."""
    return f"among 100 others {inference.needed_texts(100, q / (2 * n_concepts))}"


def fit_view(
    texts: LabelledSet, view: str, ks: Sequence[int], folds: Int[np.ndarray, " texts"]
) -> list[SiteFit]:
    """Choose on all texts at one view, and cross-fit the same rule over folds, for each k of `ks`.

    The sets of different k are nested: the first k latents of the largest.
    """
    prepared = texts.prepared(view)
    labels = texts.labels
    held_out = [folds == fold for fold in np.unique(folds)]
    runs = [np.ones(len(folds), bool), *(~own for own in held_out)]
    members = np.stack([top_latents(prepared, labels, keep, max(ks)) for keep in runs])
    weights = discriminants(prepared.latents, labels, folds, members, ks)
    groups = labels.crossed(folds)
    shape = (len(folds), labels.n_concepts)
    fits = list[SiteFit]()
    for k, weight in zip(ks, weights, strict=True):
        singles, sets = np.zeros(shape), np.zeros(shape)
        for own, chosen, w in zip(held_out, members[1:], weight[1:], strict=True):
            fold = Selection(view, chosen[:, :k], w)
            singles[own], sets[own] = score(fold, csr_array(prepared.latents[own]))
        fits.append(
            SiteFit(
                Selection(view, members[0, :, :k], weight[0]),
                ranks.aurocs_by_group(singles, groups),
                ranks.aurocs_by_group(sets, groups),
                singles,
                sets,
                groups,
            )
        )
    return fits


def best_latents(texts: LabelledSet, view: str, k: int) -> Int[np.ndarray, "concepts k"]:
    """The k best single latents of each concept on all texts of a set, best first."""
    everything = np.ones(len(texts.labels.topics), bool)
    return top_latents(texts.prepared(view), texts.labels, everything, k)


def choose(texts: LabelledSet, view: str, k: int) -> Selection:
    """The rule of step 2 on all texts of a set at one view, without cross-fitting."""
    x = texts.prepared(view).latents
    members = best_latents(texts, view, k)
    weights = discriminants(x, texts.labels, np.zeros(x.shape[0], np.int64), members[None], (k,))
    return Selection(view, members, weights[0][0])


def curve(texts: LabelledSet, view: str, ks: Sequence[int]) -> list[SiteFit]:
    """Step 13: sets of other sizes at one view; those of more latents than there are, left out."""
    fitting = [k for k in ks if k <= texts.latents[view].shape[1]]
    return fit_view(texts, view, fitting, texts.labels.folds()) if fitting else []


def score(
    selection: Selection, x: Float[csr_array, "texts d_sae"]
) -> tuple[Float[np.ndarray, "texts concepts"], Float[np.ndarray, "texts concepts"]]:
    """Scores of texts, given their pooled latents at the view: by single latents, and by sets."""
    n_concepts, k = selection.members.shape
    concept = np.arange(n_concepts)
    latents = np.concatenate([selection.latent, selection.members.ravel()])
    column = np.concatenate([concept, np.repeat(concept + n_concepts, k)])
    weights = np.concatenate([np.ones(n_concepts), selection.weights.ravel()])
    both = x @ csr_array((weights, (latents, column)), shape=(x.shape[1], 2 * n_concepts))
    scores = both.toarray()
    return scores[:, :n_concepts], scores[:, n_concepts:]


def top_latents(
    prepared: Prepared, labels: Labels, keep: Bool[np.ndarray, " texts"], k: int
) -> Int[np.ndarray, "concepts k"]:
    """The k latents of the largest within-topic AUROC, best first; ties go to the lower index.

    Only labels of the texts `keep` are read. The others stay among the texts that a positive is
    compared with, as texts without a label: where folds keep topics whole they never meet one.
    """
    x = prepared.latents
    aurocs = ranks.auroc_from_ranks(prepared.ranks, labels.masked(keep)).T
    np.round(aurocs, 12, out=aurocs)
    aurocs[np.isnan(aurocs)] = 0.5
    fires = prepared.fires - np.bincount(x[~keep].indices, minlength=x.shape[1])
    aurocs[:, fires / max(np.count_nonzero(keep), 1) < MIN_FIRING] = -1.0
    return _largest(aurocs, k)


def _largest(values: Float[np.ndarray, "rows n"], k: int) -> Int[np.ndarray, "rows k"]:
    """Indices of the k largest of each row, largest first; ties go to the lower index."""
    n_rows, n = values.shape
    least = np.partition(values, n - k, axis=1)[:, n - k]
    row, column = np.nonzero(values >= least[:, None])
    order = np.lexsort((column, -values[row, column], row))
    start = np.searchsorted(row, np.arange(n_rows))
    return column[order][start[:, None] + np.arange(k)]


def discriminants(
    x: Float[csr_array, "texts d_sae"],
    labels: Labels,
    folds: Int[np.ndarray, " texts"],
    members: Int[np.ndarray, "runs concepts most"],
    ks: Sequence[int],
) -> list[Float[np.ndarray, "runs concepts _"]]:
    """Weights of Fisher's discriminant of each concept against all others, within topics.

    Run 0 is on all texts, run i on those outside the i-th fold. The covariance is that of a run's
    texts around their topic's mean, with its correlations shrunken by `SHRINKAGE`. Latents that
    hardly vary within topics are held down rather than blown up. Weights have norm 1, or are 0 if
    no latent differs.

    Returns:
        For each k of `ks`, the weights of the first k members.
    """
    n_runs, n_concepts, most = members.shape
    order = np.lexsort((labels.topics, folds))
    texts = _Ordered(csc_array(x[order]), labels.rows(order), folds[order])
    block = max(1, BLOCK // max(1, len(order) * most * n_runs))
    weights = [np.empty((n_runs, n_concepts, k)) for k in ks]
    for start in range(0, n_concepts, block):
        part = slice(start, min(start + block, n_concepts))
        for run, moments in enumerate(_moments(texts, part, members[:, part])):
            for out, own in zip(weights, _solve(moments, ks), strict=True):
                out[run, part] = own
    return weights


class _Ordered(NamedTuple):
    """Texts in order of fold and topic, so that both are slices."""

    columns: csc_array
    labels: Labels
    folds: Int[np.ndarray, " texts"]


class _Moments(NamedTuple):
    """Of the members of some concepts, over the texts of a run."""

    difference: Float[np.ndarray, "concepts k"]
    """Mean over the concept's texts, around the means of their topics."""
    covariance: Float[np.ndarray, "concepts k k"]
    """Around the topics' means."""
    square: Float[np.ndarray, "concepts k"]
    """Mean square."""


def _moments(
    texts: _Ordered, part: slice, members: Int[np.ndarray, "runs concepts k"]
) -> list[_Moments]:
    """Moments for each run: sums over all texts, less those over the fold that is left out."""
    union, local = np.unique(members, return_inverse=True)
    local = local.reshape(members.shape)
    values = texts.columns[:, union].T.toarray().astype(np.float64)  # [latents, texts]
    positive = texts.labels.concepts[:, part].T.toarray().astype(np.float64)  # [concepts, texts]
    topic = np.unique(texts.labels.topics, return_inverse=True)[1]
    changes = (np.diff(topic) != 0) | (np.diff(texts.folds) != 0)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    sums = np.add.reduceat(values, starts, axis=1)  # [latents, segments]
    positives = np.add.reduceat(positive, starts, axis=1)  # [concepts, segments]
    sizes = np.diff(np.append(starts, len(topic)))
    fold_of = np.unique(texts.folds, return_inverse=True)[1]
    n_topics = int(topic.max()) + 1
    result = list[_Moments]()
    for run, at in enumerate(local):
        kept = fold_of[starts] != run - 1
        to_topic = csr_array(
            (np.ones(kept.sum()), (np.flatnonzero(kept), topic[starts[kept]])),
            shape=(len(starts), n_topics),
        )
        size = sizes @ to_topic
        per_text = np.divide(1.0, size, out=np.zeros(n_topics), where=size > 0)
        topic_sums = (sums @ to_topic)[at]  # [concepts, k, topics]
        in_topic = positives @ to_topic  # [concepts, topics]
        first, last = np.searchsorted(fold_of, [run - 1, run]) if run else (0, 0)
        own = values[at]  # [concepts, k, texts]
        raw = np.zeros((*at.shape, at.shape[1]))
        mean = np.zeros(at.shape)
        for rows in (slice(0, first), slice(last, None)):
            raw += own[:, :, rows] @ own[:, :, rows].transpose(0, 2, 1)
            mean += (own[:, :, rows] @ positive[:, rows, None])[:, :, 0]
        mean -= (topic_sums @ (per_text * in_topic)[:, :, None])[:, :, 0]
        raw_mean = raw / size.sum()
        between = (topic_sums * per_text) @ topic_sums.transpose(0, 2, 1)
        square = np.diagonal(raw_mean, axis1=1, axis2=2).copy()
        n_positive = np.maximum(in_topic.sum(1), 1)
        result.append(_Moments(mean / n_positive[:, None], raw_mean - between / size.sum(), square))
    return result


def _solve(moments: _Moments, ks: Sequence[int]) -> list[Float[np.ndarray, "concepts _"]]:
    """Discriminant weights of the first k members, for each k of `ks`.

    The Cholesky factor of the first k members, and its inverse, are the corners of those of all.
    """
    difference, covariance, square = moments
    diagonal = np.arange(covariance.shape[1])
    variance = np.maximum(covariance[:, diagonal, diagonal], 1e-6 * square + 1e-30)
    shrunken = (1 - SHRINKAGE) * covariance
    shrunken[:, diagonal, diagonal] = variance
    inverse = np.linalg.inv(np.linalg.cholesky(shrunken))
    whitened = inverse @ difference[:, :, None]
    solved = list[np.ndarray]()
    for k in ks:
        weights = (inverse[:, :k, :k].transpose(0, 2, 1) @ whitened[:, :k])[:, :, 0]
        norm = np.linalg.norm(weights, axis=1, keepdims=True)
        solved.append(weights / np.maximum(norm, 1e-30))
    return solved

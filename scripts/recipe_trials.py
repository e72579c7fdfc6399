"""One trial of each simulation of what a user with one corpus can do, and of other ways to choose.

As in `trials`: a seed in, counts out.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import planted
from jaxtyping import Bool, Float
from scipy.sparse import csr_array
from trials import Q, Sets, Setting, nearest, proportion, protocol, unheard

from discovery import inference, ranks, selection
from discovery.labels import Labels
from discovery.replicate import crossfit
from discovery.scores import score_pairs
from discovery.selection import LabelledSet


def one_corpus(setting: Setting, seed: int) -> planted.World:
    """A world with one corpus: with topics for even seeds, without any for odd ones."""
    design = setting.small
    if seed % 2 == 0:
        return planted.corpus(design, seed)
    texts = design.concepts * sum(design.topics)
    rng = np.random.default_rng([seed, 3])
    sizes = rng.integers(12, 2 * sum(design.topics), design.concepts)
    return planted.corpus(design, seed, planted.flat(rng, texts, sizes))


def halves(labels: Labels, rng: np.random.Generator) -> Bool[np.ndarray, " texts"]:
    """Which texts are of the first half: units are kept whole."""
    units = np.unique(labels.units)
    return np.isin(labels.units, rng.permutation(units)[: len(units) // 2])


def halves_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """One corpus split in two by units: under the null, and with features planted."""
    made = one_corpus(setting, seed)
    rng = np.random.default_rng([seed, 4])

    def found(labels: Labels) -> Bool[np.ndarray, " concepts"]:
        first = halves(labels, rng)
        own = made.selection.relabelled(labels)
        result = protocol(Sets(_part(own, first), _part(own, ~first), None), made.family, setting.k)
        return np.array([a.verdict.startswith("found") for a in result.alignments])

    return _recipe(made, found, rng)


def crossfit_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """One corpus, cross-fitted, with p-values from shuffles of the whole selection."""
    made = one_corpus(setting, seed)
    rng = np.random.default_rng([seed, 5])
    names = [f"concept {c}" for c in range(len(made.kind))]
    families = [f"family {f}" for f in made.family]

    def found(labels: Labels) -> Bool[np.ndarray, " concepts"]:
        own = made.selection.relabelled(labels)
        near = {view: nearest(x, labels) for view, x in own.latents.items()}
        result = crossfit(
            own,
            None,
            near,
            names,
            families,
            k=setting.k,
            q=Q,
            shuffles=setting.shuffles,
            seed=seed,
            verdicts_only=True,
        )
        return np.array([a.verdict.startswith("found") for a in result.alignments])

    return _recipe(made, found, rng)


def naive_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """What is not done here: one corpus, cross-fitted, with a rank test of the held-out scores."""
    made = planted.world(setting.design, seed)
    rng = np.random.default_rng([seed, 6])
    x = made.selection.latents[planted.HEARS]
    labels = made.selection.labels.shuffled(rng)
    held_out = crossfitted(x, labels)
    tests = [
        inference.rank_test(column, labels.of(c), labels.topics)
        for c, column in enumerate(held_out.T)
    ]
    p = np.array([test.p for test in tests])
    z = np.array([test.auroc for test in tests]) - 0.5
    group = len(labels.topics) / len(np.unique(labels.topics))
    sd = np.sqrt((group + 1) / 12 / (group - 1) / len(np.unique(labels.topics)))
    return {
        "found": int((inference.benjamini_hochberg(p) <= Q).sum()),
        "width": float(np.sqrt(np.mean(z**2)) / sd),
    }


def crossfitted(x: csr_array, labels: Labels) -> Float[np.ndarray, "texts concepts"]:
    """Each text scored by the single latents that the other topics choose."""
    ranked = ranks.within_group_ranks(x, labels.topics)
    columns = x.tocsc()
    scores = np.empty((x.shape[0], labels.n_concepts))
    for topic in np.unique(labels.topics):
        inside = labels.topics == topic
        aurocs = ranks.auroc_from_ranks(ranked.rows(~inside), labels.rows(~inside))
        best = np.nanargmax(aurocs, axis=0)
        scores[inside] = columns[:, best].toarray()[inside]
    return scores


def _part(own: LabelledSet, rows: Bool[np.ndarray, " texts"]) -> LabelledSet:
    latents = {view: csr_array(x[rows]) for view, x in own.latents.items()}
    return LabelledSet(latents, own.labels.rows(rows))


def _recipe(
    made: planted.World,
    found: Callable[[Labels], Bool[np.ndarray, " concepts"]],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """A recipe under the null and with features planted."""
    null = found(made.selection.labels.shuffled(rng))
    true = found(made.selection.labels)
    nothing = unheard(made)
    hits = [
        (round(float(s), 3), int(true[own].sum()), int(own.sum()))
        for s in np.unique(made.strength)
        if (own := (made.strength == s) & (np.array(made.kind) == "planted")).any()
    ]
    flat = len(np.unique(made.selection.labels.topics)) == 1
    return {
        "corpus": "no topics" if flat else "topics",
        "null": int(null.sum()),
        "verdicts": proportion(true & nothing, true),
        "hits": hits,
    }


def ways_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """How well latents chosen on the selection set do on the confirmation set, by rule."""
    made = planted.world(setting.design, seed)
    x, y = made.selection.latents[planted.HEARS], made.confirmation.latents[planted.HEARS]
    labels = made.selection.labels
    own = np.array([kind in ("planted", "spread") for kind in made.kind])
    scores = score_pairs(x, labels)
    enough = np.asarray((x > 0).sum(0)).ravel() / x.shape[0] >= selection.MIN_FIRING
    measures = {
        "AUROC": scores.auroc,
        "Cohen's d": scores.cohens_d,
        "mutual information": np.where(scores.mean_difference > 0, scores.mutual_information, -1.0),
        "mean difference": scores.mean_difference,
    }
    singles = {}
    for name, values in measures.items():
        ranked = np.where(enough[:, None], np.nan_to_num(values, nan=-np.inf), -np.inf).round(12)
        best = np.argmax(ranked, axis=0)
        aurocs = ranks.aurocs_by_group(y[:, best].toarray(), made.confirmation.labels).mean(1)
        right = made.signal[np.arange(len(best)), best]
        singles[name] = (float(aurocs[own].mean()), float(right[own].mean()))
    return {"singles": singles, "sets": _set_ways(made, own, setting.k)}


def _set_ways(made: planted.World, own: Bool[np.ndarray, " concepts"], k: int) -> dict[str, float]:
    """Mean AUROC on the confirmation set of sets chosen under other settings of step 2."""

    def auroc(change: Callable[[csr_array], csr_array], size: int, shrinkage: float) -> float:
        first, second = (
            LabelledSet({planted.HEARS: change(part.latents[planted.HEARS])}, part.labels)
            for part in (made.selection, made.confirmation)
        )
        before, selection.SHRINKAGE = selection.SHRINKAGE, shrinkage
        try:
            chosen = selection.select(first, size)[0].selection
        finally:
            selection.SHRINKAGE = before
        _, sets = selection.score(chosen, second.latents[planted.HEARS])
        return float(ranks.aurocs_by_group(sets, second.labels)[own].mean())

    usual = selection.SHRINKAGE
    return {
        "as it is": auroc(lambda x: x, k, usual),
        **{f"shrinkage {s}": auroc(lambda x: x, k, s) for s in (0.0, 0.3, 0.7, 1.0)},
        "square roots": auroc(lambda x: x.sqrt(), k, usual),
        "logarithms": auroc(lambda x: x.log1p(), k, usual),
        **{f"k = {n}": auroc(lambda x: x, n, usual) for n in (4, 64)},
    }


TRIALS: dict[str, Callable[[Setting, int], dict[str, Any]]] = {
    "halves": halves_trial,
    "crossfit": crossfit_trial,
    "naive": naive_trial,
    "ways": ways_trial,
}

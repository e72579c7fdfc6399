"""Step 7 of the verdict protocol: other readers and controls beside the latents, on the same texts.

The readers are TF-IDF of the bare text, the token-embedding layer, a dense probe and contrastive
vectors. One that wins on the selection set may know the vocabulary only: the confirmation set may
avoid the words that give the concepts away there. The controls are random latents of like density,
and the latents of an SAE or a model of random weights, chosen just as the true ones.

Intervals are over topics, or DeLong's over texts where there are fewer than four
(`inference.auroc_intervals`). numpy and scipy only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats
from scipy.sparse import csc_array, csr_array

from discovery import inference, ranks, selection
from discovery.captured import Sets, pooling_of, site_of
from discovery.labels import Labels
from discovery.probes import Data, Fit, cross_fit, fit_probe, fit_vectors
from discovery.records import Depth, Difference, Score
from discovery.selection import LabelledSet, SiteFit
from saes.errors import UserError


class Reading(NamedTuple):
    """How well one method reads one set of texts."""

    aurocs: Float[np.ndarray, "concepts topics"]
    """NaN where a topic has no text of the concept, or no other."""
    low: Float[np.ndarray, " concepts"]
    """Lower end of the 95 % interval of the mean over topics; of several readings that were
    averaged, the least."""
    high: Float[np.ndarray, " concepts"]
    """Upper end, or the greatest."""
    influence: Float[np.ndarray, "texts concepts"] | None
    """What each text adds to the error of a concept's AUROC (`inference.influence`), where topics
    are few or some concept is not in all of them."""
    labels: Labels


class Results(NamedTuple):
    """AUROCs of one method for all concepts."""

    method: str
    """One of those of `records.Score`."""
    selection: Reading
    """Cross-fitted over units."""
    confirmation: Reading
    """Fitted on the selection set."""
    situations: Float[np.ndarray, "concepts situations"] | None = None
    """Fitted on the selection set; see `situation_aurocs`. None where there are none."""


def measure(
    method: str,
    fit: Fit,
    selection: tuple[Data, Labels],
    confirmation: tuple[Data, Labels],
    situations: tuple[Data, Labels] | None = None,
) -> Results:
    """Fit a method on the selection set and read all sets with it."""
    reader = fit(*selection)
    data, labels = selection
    return Results(
        method,
        read(cross_fit(fit, data, labels), labels.crossed(labels.folds())),
        read(reader(confirmation[0]), confirmation[1]),
        situation_aurocs(reader(situations[0]), situations[1]) if situations else None,
    )


def latent_results(
    names: tuple[str, str],
    fit: SiteFit,
    confirmation: tuple[csr_array, Labels],
    situations: tuple[csr_array, Labels] | None = None,
) -> tuple[Results, Results]:
    """Results of the best single latents and of the sets, as chosen on the selection set.

    Args:
        names: of the two methods.
        fit: what was chosen, with its cross-fitted scores.
        confirmation: latents at the chosen view, and labels.
        situations: likewise; None where there are none.
    """
    confirmed = selection.score(fit.selection, confirmation[0])
    situated = selection.score(fit.selection, situations[0]) if situations else (None, None)
    latent, set_ = (
        Results(
            name,
            read(first, fit.labels),
            read(second, confirmation[1]),
            None if third is None or situations is None else situation_aurocs(third, situations[1]),
        )
        for name, first, second, third in zip(
            names, (fit.latent_scores, fit.set_scores), confirmed, situated, strict=True
        )
    )
    return latent, set_


def control_results(
    name: str, selection_set: LabelledSet, confirmation: LabelledSet, k: int
) -> tuple[Results, Results]:
    """Choose on the latents of a control, such as an untrained SAE, just as on the true ones.

    Args:
        name: of the control; its sets are "NAME set".
        selection_set: latents of the control on the selection set, in one or several views.
        confirmation: likewise on the confirmation set.
        k: latents in a set.
    """
    fit = selection.select(selection_set, k)[0]
    latents = confirmation.latents[fit.selection.view]
    return latent_results((name, f"{name} set"), fit, (latents, confirmation.labels))


def random_latents(
    chosen: Int[np.ndarray, " concepts"],
    selection: tuple[csr_array, Labels],
    confirmation: tuple[csr_array, Labels],
    situations: tuple[csr_array, Labels] | None = None,
    *,
    n: int = 20,
    seed: int = 0,
) -> Results:
    """Mean AUROC, and range, of `n` random latents a concept that fire as often as the chosen one.

    No label chooses them: they are drawn from the 2 n other latents that are nearest in log density
    on the selection set. With fewer latents that ever fire there are fewer of them.

    Args:
        chosen: the latent of each concept.
        selection: latents at its view, and labels.
        confirmation: likewise.
        situations: likewise; None where there are none.
        n: latents a concept.
        seed: of the draws.

    Raises:
        UserError: fewer than two other latents ever fire.
    """
    drawn = draw_alike(chosen, selection[0], n, seed)
    situated = None
    if situations:
        each = [situation_aurocs(x, situations[1]) for x in _columns(situations[0], drawn)]
        situated = np.mean(each, axis=0)
    latents, labels = selection
    first = _read_all(_columns(latents, drawn), labels.crossed(labels.folds()))  # as all others
    second = _read_all(_columns(confirmation[0], drawn), confirmation[1])
    return Results("random", first, second, situated)


def draw_alike(
    chosen: Int[np.ndarray, " concepts"], x: csr_array, n: int, seed: int
) -> Int[np.ndarray, "concepts n"]:
    """`n` latents for each chosen one, of those nearest in log density (`random_latents`)."""
    fires = np.bincount(x.indices[x.data != 0], minlength=x.shape[1])
    alive = np.flatnonzero(fires)
    n = min(n, len(alive) - 1)
    if n < 2:
        raise UserError(
            f"only {len(alive)} of {x.shape[1]} latents ever fire on the selection set: there are "
            "none to compare with"
        )
    rng = np.random.default_rng(seed)
    density = np.log(np.maximum(fires, 1))
    result = np.empty((len(chosen), n), dtype=np.int64)
    for concept, latent in enumerate(chosen):
        others = alive[alive != latent]
        distance = np.abs(density[others] - density[latent])
        nearest = others[np.argsort(distance, kind="stable")[: 2 * n]]
        result[concept] = rng.choice(nearest, n, replace=False)
    return result


def _columns(
    x: csr_array, drawn: Int[np.ndarray, "concepts n"]
) -> Iterator[Float[np.ndarray, "texts concepts"]]:
    columns = csc_array(x)
    for latents in drawn.T:
        yield columns[:, latents].toarray().astype(np.float64)


def read(scores: Float[np.ndarray, "texts concepts"], labels: Labels) -> Reading:
    """How well scores, column c for concept c, tell the texts of the concepts from the others."""
    bounds = inference.auroc_intervals(scores, labels)
    return _read_all([scores], labels)._replace(low=bounds.low, high=bounds.high)


def _read_all(several: Iterable[Float[np.ndarray, "texts concepts"]], labels: Labels) -> Reading:
    """The mean of several readings of the same texts, with their range."""
    aurocs: list[np.ndarray] = []
    errors: np.ndarray | None = None
    for scores in several:
        aurocs.append(ranks.aurocs_by_group(scores, labels))
        there = np.isfinite(aurocs[0])
        whole = there[there.any(1)][:, there.any(0)].all()
        if there.any(0).sum() < inference.FEW_TOPICS or not whole:
            own = inference.influence(scores, labels)
            errors = own if errors is None else errors + own
    means = np.stack([_nanmean(own, 1) for own in aurocs])
    errors = None if errors is None else errors / len(aurocs)
    return Reading(np.mean(aurocs, axis=0), means.min(0), means.max(0), errors, labels)


def placements(
    values: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    """Share of `others` below each of `values`; what equals it counts half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right")
    return below / (2 * len(others))


def situation_aurocs(
    values: Float[np.ndarray, "texts concepts"], labels: Labels
) -> Float[np.ndarray, "concepts situations"]:
    """Percentile of each text of a concept among all texts without it.

    Situations have no topics. The mean over a concept's texts is its AUROC; concepts with fewer
    texts than others, or with all texts, have NaN in their places.
    """
    positive = labels.dense()
    result = np.full((labels.n_concepts, labels.counts.max(initial=0)), np.nan)
    for c, column in enumerate(values.T):
        own, others = column[positive[:, c]], column[~positive[:, c]]
        if len(others):
            result[c, : len(own)] = placements(own, others)
    return result


def score_rows(results: Results, concepts: Sequence[str]) -> list[Score]:
    """AUROC of a method for each concept on the selection and confirmation sets, and situations.

    Intervals are over topics (DeLong's where topics are few), or over the concept's situations; of
    random latents they are the range. A concept that has no AUROC on a set has no row for it.
    """
    sets = {
        name: inference.Interval(_nanmean(own.aurocs, 1), own.low, own.high)
        for name, own in (
            ("selection", results.selection),
            ("confirmation", results.confirmation),
        )
    }
    if results.situations is not None:
        sets["situations"] = inference.auroc_interval(results.situations)
    return [
        Score(concept, results.method, name, float(mean), float(low), float(high))
        for name, bounds in sets.items()
        for concept, mean, low, high in zip(concepts, *bounds, strict=True)
        if np.isfinite(mean)
    ]


def difference_rows(ours: Results, baseline: Results, concepts: Sequence[str]) -> list[Difference]:
    """AUROC of our method minus that of a baseline on the confirmation set, paired.

    The first row, for no concept, is the mean over concepts. All concepts share the texts, so its
    interval is over the topics' means; where topics are few it is over units. That of a concept is
    DeLong's then. A concept that has no AUROC has no row.
    """
    a, b = ours.confirmation, baseline.confirmation
    gap = a.aurocs - b.aurocs
    if a.influence is None or b.influence is None:
        bounds = inference.t_interval(np.concatenate([_nanmean(gap, 0)[None], gap]))
    else:
        bounds = _few_topics(_nanmean(gap, 1), a.influence - b.influence, a.labels)
    return [
        Difference(concept, ours.method, baseline.method, float(mean), float(low), float(high))
        for concept, mean, low, high in zip(["", *concepts], *bounds, strict=True)
        if np.isfinite(mean)
    ]


def _few_topics(
    mean: Float[np.ndarray, " concepts"],
    influence: Float[np.ndarray, "texts concepts"],
    labels: Labels,
) -> inference.Interval:
    """Intervals of differences from the influence of texts: of their mean first, then of each.

    Texts of a unit may depend on each other, units do not (Obuchowski 1997).
    """
    known = np.isfinite(mean)
    unit = np.unique(labels.units, return_inverse=True)[1]
    sums = np.bincount(unit, influence[:, known].mean(1))
    units = len(sums)
    n = np.append(units, np.minimum(labels.compared(), len(unit) - labels.counts))
    whole = (sums**2).sum() * units / max(1, units - 1)
    error = np.sqrt(np.append(whole, (influence**2).sum(0)))
    half = np.where(n > 1, stats.t.ppf(0.975, np.maximum(n - 1, 1)) * error, np.inf)
    centre = np.append(mean[known].mean(), mean)
    low, high = np.nan_to_num(centre) - half, np.nan_to_num(centre) + half
    return inference.Interval(centre, np.maximum(low, -1.0), np.minimum(high, 1.0))


def depth(
    fits: Sequence[SiteFit],
    latents: Mapping[str, csr_array],
    residuals: Mapping[str, Float[np.ndarray, "texts _"]],
    selection_set: Sets,
    confirmation: Sets,
    neutral: Int[np.ndarray, " neutral_texts"],
    variance: float = 0.5,
) -> list[Depth]:
    """Mean AUROC over concepts at every view: of latents, sets and dense readers.

    Args:
        fits: the selection at each view.
        latents: by view, of all captured texts.
        residuals: likewise.
        selection_set: where its texts are in these, and their labels.
        confirmation: likewise.
        neutral: where the neutral texts are.
        variance: share of the neutral variance that is projected out of vectors.
    """
    fitted = {fit.selection.view: fit for fit in fits}
    labels = selection_set.labels
    groups = labels.crossed(labels.folds())
    rows: list[Depth] = []

    def add(view: str, method: str, first: np.ndarray, second: np.ndarray) -> None:
        for name, scores, own in (
            ("selection", first, groups),
            ("confirmation", second, confirmation.labels),
        ):
            bounds = inference.mean_auroc_interval(scores, own)
            rows.append(Depth(site_of(view), pooling_of(view), method, name, *bounds))

    for view, x in residuals.items():
        if view in fitted:
            fit = fitted[view]
            singles, sets = selection.score(fit.selection, latents[view][confirmation.rows])
            add(view, "latent", fit.latent_scores, singles)
            add(view, "set", fit.set_scores, sets)
        first, second = x[selection_set.rows], x[confirmation.rows]
        methods = ("vector", fit_vectors(x[neutral], variance)), ("probe", fit_probe)
        for method, reader in methods:
            read_by = reader(first, labels)
            add(view, method, cross_fit(reader, first, labels), read_by(second))
    return rows


def _nanmean(values: Float[np.ndarray, "a b"], axis: int) -> Float[np.ndarray, " rest"]:
    """Mean of what is known along an axis; NaN where nothing is."""
    known = np.isfinite(values).sum(axis)
    return np.where(known > 0, np.nansum(values, axis) / np.maximum(known, 1), np.nan)

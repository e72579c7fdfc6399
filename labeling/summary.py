"""The headline numbers of a run, computed once; report, terminal and README quote these.

No torch, no matplotlib. Values that are not finite are left out of every mean and median; the `n`
beside it says how many were used.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from discovery.captured import EMBEDDING
from discovery.records import (
    VERDICTS,
    Alignment,
    Comparison,
    Control,
    Difference,
    Effect,
    Geometry,
    Score,
    SetMember,
    SiteChoice,
)
from discovery.scores import t_interval

METHODS = ("latent", "set", "vector", "probe", "embedding", "tfidf")
CONDITIONS = ("feature", "vector", "random")


class Mean(NamedTuple):
    """A mean over concepts with its 95 % t interval over concepts (None with fewer than two)."""

    mean: float
    low: float | None
    high: float | None
    n: int


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile over concepts."""

    lower: float
    median: float
    upper: float


class Standing(NamedTuple):
    """`ours` (latent or set) minus `baseline` on the hard set.

    `mean` is over concepts, with an interval over topics: concepts share the topics.
    """

    ours: str
    baseline: str
    mean: Mean
    above: int  # concepts whose interval over topics lies above 0
    below: int

    @property
    def outcome(self) -> int:
        """1, -1 or 0: the interval of the mean lies above 0, below 0, or holds 0."""
        if self.mean.low is None or self.mean.high is None:
            return 0
        return int(self.mean.low > 0) - int(self.mean.high < 0)


class Correlation(NamedTuple):
    """A component against a human norm at the vectors' site, and at the embedding layer."""

    here: Geometry
    embedding: Geometry | None


class Cosines(NamedTuple):
    """Feature direction against contrastive vector; medians over concepts."""

    n: int
    median: float
    above: int  # concepts whose cosine exceeds 97.5 % of all decoder rows
    null_high: float | None
    ceiling: float | None
    set_median: float | None
    nearest: int  # concepts whose feature is the decoder row nearest to the vector


class Causal(NamedTuple):
    """Interventions at one dose, and at equal KL; over the concepts with all three conditions."""

    dose: float
    n: int
    confirmed: int  # of `n`, concepts whose verdict is `found`
    effect: Mapping[str, Quartiles]  # per condition, nats
    kl: Mapping[str, float]  # per condition, median nats
    beyond_random: int  # concepts whose interval lies above every random control
    equal_kl: float  # median over concepts of the KL at which conditions are compared
    equal_effect: Mapping[str, float]  # per condition, median nats at that KL
    equal_beyond_random: int
    equal_beyond_vector: int


@dataclass(frozen=True)
class Summary:
    """All headline numbers of a run; what a run did not measure is empty or None."""

    counts: Mapping[str, int]  # by verdict, all five
    also_lexical: int  # found concepts whose latent also fires on mere mentions of the word
    shuffled: tuple[Control, ...]
    k: int | None  # latents in a set
    detectable: float | None  # median AUROC that the data would have shown with 80 % power
    site: str | None
    auroc: Mapping[tuple[str, str], Mean]  # (set, method)
    standings: tuple[Standing, ...]
    geometry: tuple[Correlation, ...]
    cosines: Cosines | None
    causal: Causal | None

    @property
    def n(self) -> int:
        """How many concepts were tried."""
        return sum(self.counts.values())


def finite_or_none(value: float) -> float | None:
    """The value, or None where it is not finite."""
    return value if math.isfinite(value) else None


def finite(values: Iterable[float | None]) -> list[float]:
    """The values that are there and finite, in their order."""
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def median(values: Iterable[float | None]) -> float | None:
    """Median of the finite values; None where there are none."""
    kept = finite(values)
    return float(np.median(kept)) if kept else None


def mean_interval(values: Iterable[float | None]) -> Mean | None:
    """Mean of the finite values with a 95 % t interval; None where there are none."""
    kept = finite(values)
    if not kept:
        return None
    if len(kept) < 2:
        return Mean(kept[0], None, None, len(kept))
    mean, low, high = (float(x[0]) for x in t_interval(np.array([kept])))
    return Mean(mean, low, high, len(kept))


def quartiles(values: Iterable[float | None]) -> Quartiles | None:
    """Quartiles of the finite values; None where there are none."""
    kept = finite(values)
    return Quartiles(*(float(q) for q in np.quantile(kept, (0.25, 0.5, 0.75)))) if kept else None


def chosen_site(sites: Sequence[SiteChoice], alignments: Sequence[Alignment]) -> str | None:
    """The chosen site; where no choice was recorded, the commonest site of the alignments."""
    for choice in sites:
        if choice.chosen:
            return choice.site
    common = Counter(a.site for a in alignments).most_common(1)
    return common[0][0] if common else None


def curves(effects: Iterable[Effect]) -> dict[str, dict[str, list[Effect]]]:
    """Concept → condition → dose-response curve with rising doses; concepts in their order."""
    found: dict[str, dict[str, list[Effect]]] = {}
    for effect in effects:
        found.setdefault(effect.concept, {}).setdefault(effect.condition, []).append(effect)
    return {
        concept: {name: sorted(curve, key=lambda e: e.dose) for name, curve in conditions.items()}
        for concept, conditions in found.items()
    }


def at_kl(curve: Sequence[Effect], kl: float) -> float | None:
    """Change of log-probability (nats) where a dose-response curve first reaches a KL (nats).

    Linear between neighbouring doses, from no change at dose 0; None if the curve never gets there.
    """
    before = (0.0, 0.0)
    for effect in curve:
        here = (effect.kl, effect.delta_logprob)
        if here[0] >= kl:
            share = (kl - before[0]) / (here[0] - before[0]) if here[0] > before[0] else 0.0
            return before[1] + share * (here[1] - before[1])
        before = here
    return None


def summarise(
    *,
    alignments: Sequence[Alignment],
    members: Sequence[SetMember],
    scores: Sequence[Score],
    differences: Sequence[Difference],
    controls: Sequence[Control],
    sites: Sequence[SiteChoice],
    geometry: Sequence[Geometry],
    comparisons: Sequence[Comparison],
    effects: Sequence[Effect],
) -> Summary:
    """Reduce the records of a run to its headline numbers."""
    verdicts = Counter(a.verdict for a in alignments)
    sizes = Counter(Counter(m.concept for m in members).values()).most_common(1)
    site = chosen_site(sites, alignments)
    return Summary(
        counts={v: verdicts[v] for v in VERDICTS},
        also_lexical=sum(a.verdict == "found" and a.also_lexical for a in alignments),
        shuffled=tuple(c for c in controls if c.labels != "true"),
        k=sizes[0][0] if sizes else None,
        detectable=median(a.detectable_auroc for a in alignments),
        site=site,
        auroc=_means(scores),
        standings=_standings(differences),
        geometry=_correlations(geometry, site),
        cosines=_cosines(comparisons),
        causal=_causal(effects),
    )


def _means(scores: Sequence[Score]) -> dict[tuple[str, str], Mean]:
    groups: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        groups.setdefault((score.set, score.method), []).append(score.auroc)
    means = {key: mean_interval(values) for key, values in groups.items()}
    return {key: mean for key, mean in means.items() if mean is not None}


def _standings(differences: Sequence[Difference]) -> tuple[Standing, ...]:
    groups: dict[tuple[str, str], list[Difference]] = {}
    overall = {(row.ours, row.baseline): row for row in differences if not row.concept}
    for row in differences:
        if row.concept:
            groups.setdefault((row.ours, row.baseline), []).append(row)
    order = {name: i for i, name in enumerate(METHODS)}
    rank = sorted(groups, key=lambda pair: [order.get(name, len(order)) for name in pair])
    standings = []
    for ours, baseline in rank:
        rows, mean = groups[ours, baseline], overall.get((ours, baseline))
        if mean is not None and math.isfinite(mean.difference):
            above, below = sum(r.low > 0 for r in rows), sum(r.high < 0 for r in rows)
            low, high = finite_or_none(mean.low), finite_or_none(mean.high)
            over_topics = Mean(mean.difference, low, high, len(rows))
            standings.append(Standing(ours, baseline, over_topics, above, below))
    return tuple(standings)


def _correlations(geometry: Sequence[Geometry], site: str | None) -> tuple[Correlation, ...]:
    there = {(g.norm, g.source, g.component): g for g in geometry if g.site == EMBEDDING != site}
    return tuple(
        Correlation(g, there.get((g.norm, g.source, g.component)))
        for g in geometry
        if g.site == site and math.isfinite(g.r)
    )


def headline(correlations: Sequence[Correlation], norm: str, component: int) -> Correlation | None:
    """The correlation of a component with a norm: Glasgow's where there is one."""
    fitting = [c for c in correlations if (c.here.norm, c.here.component) == (norm, component)]
    return max(fitting, key=lambda c: (c.here.source == "glasgow", c.here.n), default=None)


def _cosines(comparisons: Sequence[Comparison]) -> Cosines | None:
    rows = [c for c in comparisons if math.isfinite(c.cosine)]
    if not rows:
        return None
    return Cosines(
        n=len(rows),
        median=float(np.median([r.cosine for r in rows])),
        above=sum(r.cosine > r.null_high for r in rows),
        null_high=median(r.null_high for r in rows),
        ceiling=median(r.ceiling for r in rows),
        set_median=median(r.set_cosine for r in rows),
        nearest=sum(r.latent == r.nearest_latent for r in rows),
    )


def _causal(effects: Sequence[Effect]) -> Causal | None:
    usable = [e for e in effects if math.isfinite(e.delta_logprob) and math.isfinite(e.kl)]
    complete = [c for c in curves(usable).values() if all(name in c for name in CONDITIONS)]
    doses = [{e.dose for e in concept[name]} for concept in complete for name in CONDITIONS]
    shared = set.intersection(*doses) if doses else set()
    if not shared or max(shared) <= 0:
        return None
    dose = max(shared)
    at = [
        {name: next(e for e in c[name] if e.dose == dose) for name in CONDITIONS} for c in complete
    ]
    levels = [min(max(e.kl for e in c[name]) for name in CONDITIONS) for c in complete]
    equal = [
        {name: at_kl(c[name], kl) or 0.0 for name in CONDITIONS}  # each curve reaches that level
        for c, kl in zip(complete, levels, strict=True)
    ]
    effect = {name: quartiles(row[name].delta_logprob for row in at) for name in CONDITIONS}
    return Causal(
        dose=dose,
        n=len(complete),
        confirmed=sum(row["feature"].verdict == "found" for row in at),
        effect={name: q for name, q in effect.items() if q is not None},
        kl={name: float(np.median([row[name].kl for row in at])) for name in CONDITIONS},
        beyond_random=sum(row["feature"].low > row["random"].high for row in at),
        equal_kl=float(np.median(levels)),
        equal_effect={n: float(np.median([row[n] for row in equal])) for n in CONDITIONS},
        equal_beyond_random=sum(row["feature"] > row["random"] for row in equal),
        equal_beyond_vector=sum(row["feature"] > row["vector"] for row in equal),
    )

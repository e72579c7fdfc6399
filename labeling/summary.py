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
from scipy.stats import kendalltau

from discovery.captured import EMBEDDING
from discovery.inference import t_interval
from discovery.records import (
    VERDICTS,
    Alignment,
    Comparison,
    Control,
    Cross,
    Difference,
    Effect,
    Geometry,
    OutputScore,
    Score,
    SiteChoice,
    TextSet,
    Vector,
)
from labeling.results import Results

METHODS = ("latent", "set", "vector", "probe", "embedding", "tfidf")
CONTROLS = ("random", "untrained", "untrained set", "randomised", "randomised set")
CONDITIONS = ("feature", "vector", "random")
HELD_OUT = {False: "the confirmation set", True: "the folds left out"}
T_TOPICS = 4  # from so many topics on, intervals are over topics


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
    """`ours` (latent or set) minus `baseline` on the confirmation set.

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


class Agreement(NamedTuple):
    """Kendall's tau-b between the input-side AUROC of candidates and an output-side score."""

    measure: str  # output_score, word_score
    tau: Mean  # mean over concepts of tau-b within the concept
    candidates: int


class OutputSide(NamedTuple):
    """What raising the best latent of each concept did to the words of the concepts."""

    n: int  # concepts whose best latent was raised
    first: int  # those whose own words rise more than any other concept's
    median_rank: float  # of the concept's words among all concepts; chance is the middle
    passed: int | None  # those with word_p at most 0.05; None where random latents were not raised
    agreement: tuple[Agreement, ...]


class CrossMap(NamedTuple):
    """AUROCs of chosen latents for their own concept and for others; means."""

    n: int
    own: float
    family: float | None  # other concepts of the same family
    others: float | None  # concepts of other families
    highest: int  # concepts whose latent is higher for none of the other concepts


class Reverse(NamedTuple):
    """The reverse run: chosen on the confirmation set, tested on the selection set."""

    tested: int  # concepts found, as a single latent or as a set
    passed: int  # of these, with q at most 0.05 in the reverse run, in the same form


@dataclass(frozen=True)
class Summary:
    """All headline numbers of a run; what a run did not measure is empty or None."""

    counts: Mapping[str, int]  # by verdict, all five
    also_lexical: int  # found concepts whose latent also fires on mere mentions of the word
    lexical: bool  # a lexical control was run
    shuffled: tuple[Control, ...]
    k: int | None  # latents in a set
    detectable: float | None  # median AUROC that the data would have shown with 80 % power
    site: str | None
    pooling: str | None
    topics: int | None  # of the texts held out; 1 where they have none, None where not recorded
    crossfit: bool  # there was one corpus only: chosen on some folds, tested on the others
    auroc: Mapping[tuple[str, str], Mean]  # (set, method)
    standings: tuple[Standing, ...]
    sets: tuple[TextSet, ...]
    reverse: Reverse | None
    cross: CrossMap | None
    outputs: OutputSide | None
    geometry: tuple[Correlation, ...]
    cosines: Cosines | None
    causal: Causal | None

    @property
    def n(self) -> int:
        """How many concepts were tried."""
        return sum(self.counts.values())

    @property
    def auroc_words(self) -> str:
        """What an AUROC of this run is called."""
        return "AUROC" if self.topics == 1 else "within-topic AUROC"

    @property
    def held_out(self) -> str:
        """The texts on which latents were tested."""
        return HELD_OUT[self.crossfit]

    @property
    def interval_words(self) -> str:
        """What a concept's interval is over."""
        many = self.topics is None or self.topics >= T_TOPICS
        return "over topics" if many else "by DeLong"

    @property
    def curve_interval_words(self) -> str:
        """The interval of a mean over concepts in the curve and over depth, which is that of
        `discovery.inference.mean_auroc_interval`."""
        if self.interval_words == "over topics":
            return "95 % t interval over the means of topics"
        own = "over folds on the selection set"
        both = own if self.crossfit else f"{own}, by DeLong over units on the confirmation set"
        return f"95 % interval ({both})"


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


def is_crossfit(sets: Iterable[TextSet]) -> bool:
    """Whether there is one corpus only, so that latents were tested on folds left out."""
    names = {row.set for row in sets if row.texts}
    return "selection" in names and "confirmation" not in names


def topics_of(sets: Sequence[TextSet]) -> int | None:
    """Topics of the texts held out: 1 where they have none; None where nothing is recorded."""
    name = "selection" if is_crossfit(sets) else "confirmation"
    counts = [row.topics for row in sets if row.set == name and row.texts]
    if not counts:
        return None
    return sum(counts) if max(counts) > 1 else 1


def summarise(results: Results) -> Summary:
    """Reduce the records of a run to its headline numbers."""
    alignments = results.alignments
    verdicts = Counter(a.verdict for a in alignments)
    sizes = Counter(Counter(m.concept for m in results.members).values()).most_common(1)
    site = chosen_site(results.site_choices, alignments)
    poolings = Counter(a.pooling for a in alignments if a.site == site).most_common(1)
    pooling = poolings[0][0] if poolings else None
    return Summary(
        counts={v: verdicts[v] for v in VERDICTS},
        also_lexical=sum(a.verdict == "found" and a.also_lexical for a in alignments),
        lexical=any(a.lexical_auroc is not None for a in alignments),
        shuffled=tuple(c for c in results.controls if c.labels != "true"),
        k=sizes[0][0] if sizes else None,
        detectable=median(a.detectable_auroc for a in alignments),
        site=site,
        pooling=pooling,
        topics=topics_of(results.sets),
        crossfit=is_crossfit(results.sets),
        auroc=_means(results.scores),
        standings=_standings(results.differences),
        sets=tuple(results.sets),
        reverse=_reverse(alignments),
        cross=_cross(results.cross, alignments),
        outputs=_outputs(results.outputs),
        geometry=_correlations(results.geometry, site, pooling),
        cosines=_cosines(results.comparisons),
        causal=_causal(results.effects),
    )


def _reverse(alignments: Sequence[Alignment]) -> Reverse | None:
    if all(a.reverse_q is None for a in alignments):
        return None
    forms = {"found": "reverse_q", "found as a set": "reverse_set_q"}
    qs = [getattr(a, forms[a.verdict]) for a in alignments if a.verdict in forms]
    return Reverse(len(qs), sum(q is not None and q <= 0.05 for q in qs))


def _cross(rows: Sequence[Cross], alignments: Sequence[Alignment]) -> CrossMap | None:
    family = {a.concept: a.family for a in alignments}
    own, kin, others = dict[str, float](), list[float](), list[float]()
    most = dict[str, float]()
    for row in rows:
        if not math.isfinite(row.auroc):
            continue
        if row.concept == row.other:
            own[row.concept] = row.auroc
            continue
        most[row.concept] = max(most.get(row.concept, 0.0), row.auroc)
        (kin if family.get(row.concept) == family.get(row.other) else others).append(row.auroc)
    if not own:
        return None
    return CrossMap(
        n=len(own),
        own=float(np.mean(list(own.values()))),
        family=float(np.mean(kin)) if kin else None,
        others=float(np.mean(others)) if others else None,
        highest=sum(value >= most.get(concept, 0.0) for concept, value in own.items()),
    )


def _outputs(rows: Sequence[OutputScore]) -> OutputSide | None:
    best = [row for row in rows if row.rank == 1]
    if not best:
        return None
    compared = finite(row.word_p for row in best)
    return OutputSide(
        n=len(best),
        first=sum(row.word_rank == 1 for row in best),
        median_rank=float(np.median([row.word_rank for row in best])),
        passed=sum(p <= 0.05 for p in compared) if compared else None,
        agreement=tuple(
            found
            for measure in ("output_score", "word_score")
            if (found := agreement(rows, measure)) is not None
        ),
    )


def agreement(rows: Sequence[OutputScore], measure: str) -> Agreement | None:
    """Kendall's tau-b between input and output side, within each concept; its mean over concepts.

    Within concepts, so that concepts that are easy on both sides do not make the two agree. A
    concept whose candidates tie throughout on either side has none.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pair = (row.input_auroc, float(getattr(row, measure)))
        if all(map(math.isfinite, pair)):
            groups.setdefault(row.concept, []).append(pair)
    taus, used = list[float](), 0
    for pairs in groups.values():
        x, y = zip(*pairs, strict=True)
        if len(set(x)) > 1 and len(set(y)) > 1:
            taus.append(float(kendalltau(x, y, variant="b").statistic))
            used += len(pairs)
    mean = mean_interval(taus)
    return Agreement(measure, mean, used) if mean else None


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
    order = {name: i for i, name in enumerate((*METHODS, *CONTROLS))}
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


def is_at(row: Vector | Geometry, site: str | None, pooling: str | None) -> bool:
    """Whether a row is of this site under this pooling."""
    return (row.site, row.pooling) == (site, pooling)


def _correlations(
    geometry: Sequence[Geometry], site: str | None, pooling: str | None
) -> tuple[Correlation, ...]:
    there = {
        (g.norm, g.source, g.component): g
        for g in geometry
        if site != EMBEDDING and is_at(g, EMBEDDING, pooling)
    }
    return tuple(
        Correlation(g, there.get((g.norm, g.source, g.component)))
        for g in geometry
        if is_at(g, site, pooling) and math.isfinite(g.r)
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

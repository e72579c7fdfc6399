"""One HTML page that says what a run found: words, figures, tables, methods and limits.

Nothing outside the page is needed to read it: inline CSS and SVG, no scripts, no fonts. The same
records give the same bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from discovery.concepts import Concept
from discovery.records import (
    VERDICTS,
    Alignment,
    Comparison,
    Control,
    Difference,
    Effect,
    Geometry,
    Label,
    Score,
    SetMember,
    SiteChoice,
    Vector,
)
from labeling import figures, prose
from labeling.prose import summary_rows
from labeling.summary import CONDITIONS, METHODS, Summary, curves, summarise

__all__ = ["report", "summarise", "summary_rows"]

_TEMPLATES = Path(__file__).parent / "web" / "templates"
_OURS = ("latent", "set")


class ConceptRow(NamedTuple):
    """A line of the big table."""

    slug: str
    alignment: Alignment
    label: Label | None  # of the best single latent
    baseline: str  # the best baseline on the hard set, in words; empty if there is none
    baseline_auroc: float | None


class CausalRow(NamedTuple):
    """A line of the causal table: every condition at one dose."""

    concept: str
    slug: str
    verdict: str
    latent: int
    at: Mapping[str, Effect]


def report(
    path: Path,
    *,
    facts: Mapping[str, str],
    concepts: Sequence[Concept],
    alignments: Sequence[Alignment],
    members: Sequence[SetMember],
    scores: Sequence[Score],
    differences: Sequence[Difference],
    controls: Sequence[Control],
    sites: Sequence[SiteChoice],
    vectors: Sequence[Vector],
    geometry: Sequence[Geometry],
    comparisons: Sequence[Comparison],
    effects: Sequence[Effect],
    labels: Sequence[Label],
) -> None:
    """Write the report.

    Args:
        path: the HTML file to write; its folder exists.
        facts: what was run, in the order to be shown; `model` is part of the title.
        concepts: give slugs, families and norms; those without an alignment are left out.
        alignments: one a concept; at least one.
        members: latents of each concept's set.
        scores: AUROC by concept, method and set.
        differences: ours minus baseline on the hard set.
        controls: verdict counts under true and shuffled labels.
        sites: the choice of the site on the first set.
        vectors: contrastive vectors; those at the chosen site are drawn.
        geometry: correlations with norms, at the chosen site and the embedding layer.
        comparisons: feature against vector.
        effects: dose-response experiments; may be empty.
        labels: names of latents.
    """
    assert alignments
    summary = summarise(
        alignments=alignments,
        members=members,
        scores=scores,
        differences=differences,
        controls=controls,
        sites=sites,
        geometry=geometry,
        comparisons=comparisons,
        effects=effects,
    )
    slugs = {c.name: c.slug for c in concepts}
    page = (
        _environment()
        .get_template("report.html")
        .render(
            facts=facts,
            summary=summary,
            paragraphs=prose.paragraphs(summary),
            headline=summary_rows(summary),
            svg=_figures(summary, concepts, alignments, scores, vectors, comparisons, effects),
            captions=prose.captions(
                summary, alignments, _here(summary, concepts, vectors), concepts, effects
            ),
            colours=figures.VERDICT_COLOURS,
            verdicts=VERDICTS,
            board=_board(alignments, slugs),
            rows=_concept_rows(alignments, scores, labels, slugs, summary.k),
            sets=_sets(members),
            sites=sites,
            controls=controls,
            geometry=geometry,
            means=_means(summary),
            causal=_causal_rows(summary, effects, slugs),
            comparisons=[(slugs[c.concept], c) for c in comparisons],
        )
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": prose.number,
        "prob": prose.probability,
        "interval": prose.interval,
        "spark": lambda x: round(70 * (min(max(x, 0.3), 1.0) - 0.3) / 0.7, 1),
    }
    return environment


def _figures(
    summary: Summary,
    concepts: Sequence[Concept],
    alignments: Sequence[Alignment],
    scores: Sequence[Score],
    vectors: Sequence[Vector],
    comparisons: Sequence[Comparison],
    effects: Sequence[Effect],
) -> dict[str, str]:
    """Name → SVG; a figure without data is absent."""
    bars = [("true labels", summary.counts)]
    for control in summary.shuffled:
        values = (
            control.found,
            control.found_as_a_set,
            control.found_for_the_family,
            control.lexical_only,
            control.not_found,
        )
        bars.append((control.labels, dict(zip(VERDICTS, values, strict=True))))
    drawn = {
        "verdicts": figures.verdict_counts(bars),
        "families": figures.families(alignments),
    }
    here = _here(summary, concepts, vectors)
    if here:
        drawn["map"] = figures.valence_map(here, concepts, summary.geometry)
    if any(s.set in ("first", "hard") for s in scores):
        drawn["auroc"] = figures.auroc(scores, summary.k)
    if summary.standings:
        drawn["standings"] = figures.standings(summary.standings, summary.n, summary.k)
    if summary.cosines:
        slugs = {c.name: c.slug for c in concepts}
        drawn["cosines"] = figures.cosines(comparisons, alignments, slugs)
    if summary.causal:
        drawn["doses"] = figures.dose_summary(effects)
        drawn["multiples"] = figures.dose_multiples(effects)
    return drawn


def _here(summary: Summary, concepts: Sequence[Concept], vectors: Sequence[Vector]) -> list[Vector]:
    known = {c.name for c in concepts}
    return [v for v in vectors if v.site == summary.site and v.concept in known]


def _board(
    alignments: Sequence[Alignment], slugs: Mapping[str, str]
) -> dict[str, list[tuple[str, Alignment]]]:
    """Family → (slug, alignment) of its concepts, the better verdicts first."""
    board: dict[str, list[tuple[str, Alignment]]] = {}
    for row in sorted(alignments, key=_order):
        board.setdefault(row.family, []).append((slugs[row.concept], row))
    return dict(sorted(board.items()))


def _order(row: Alignment) -> tuple[int, float, str]:
    return VERDICTS.index(row.verdict), -max(row.auroc, row.set_auroc), row.concept


def _concept_rows(
    alignments: Sequence[Alignment],
    scores: Sequence[Score],
    labels: Sequence[Label],
    slugs: Mapping[str, str],
    k: int | None,
) -> list[ConceptRow]:
    named = {(n.site, n.latent): n for n in labels}
    best: dict[str, Score] = {}
    for score in scores:
        if score.set == "hard" and score.method not in _OURS:
            held = best.get(score.concept)
            if held is None or score.auroc > held.auroc:
                best[score.concept] = score
    rows = []
    for row in sorted(alignments, key=_order):
        baseline = best.get(row.concept)
        rows.append(
            ConceptRow(
                slugs[row.concept],
                row,
                named.get((row.site, row.latent)),
                prose.method_name(baseline.method, k) if baseline else "",
                baseline.auroc if baseline else None,
            )
        )
    return rows


def _sets(members: Sequence[SetMember]) -> dict[str, list[SetMember]]:
    sets: dict[str, list[SetMember]] = {}
    for member in sorted(members, key=lambda m: m.rank):
        sets.setdefault(member.concept, []).append(member)
    return dict(sorted(sets.items()))


def _means(summary: Summary) -> list[tuple[str, list[prose.Mean | None]]]:
    """Method → its mean AUROC on the first set, the hard set and the situations."""
    sets = ("first", "hard", "situations")
    return [
        (prose.method_name(m, summary.k), [summary.auroc.get((s, m)) for s in sets])
        for m in METHODS
        if any((s, m) in summary.auroc for s in sets)
    ]


def _causal_rows(
    summary: Summary, effects: Sequence[Effect], slugs: Mapping[str, str]
) -> list[CausalRow]:
    if summary.causal is None:
        return []
    rows = []
    for concept, conditions in curves(effects).items():
        at = {
            name: effect
            for name in CONDITIONS
            for effect in conditions.get(name, [])
            if effect.dose == summary.causal.dose
        }
        if "feature" in at:
            feature = at["feature"]
            rows.append(CausalRow(concept, slugs[concept], feature.verdict, feature.latent, at))
    return rows

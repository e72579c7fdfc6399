"""One HTML page that says what a run found: words, figures, tables, methods and limits.

Nothing outside the page is needed to read it: inline CSS and SVG, no scripts, no fonts. The same
records give the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from discovery.records import (
    VERDICTS,
    Alignment,
    Candidate,
    Effect,
    Label,
    OutputScore,
    Score,
    SetMember,
    Vector,
)
from labeling import discovery_figures, figures, prose
from labeling.results import Results
from labeling.summary import (
    CONDITIONS,
    CONTROLS,
    METHODS,
    Mean,
    Summary,
    curves,
    is_at,
    summarise,
)
from labeling.words import interval, method_name, number, probability

_TEMPLATES = Path(__file__).parent / "web" / "templates"
_OURS = ("latent", "set")
METHOD_SETS = ("selection", "confirmation", "situations")


class ConceptRow(NamedTuple):
    """A line of the big table."""

    slug: str
    alignment: Alignment
    label: Label | None  # of the best single latent
    baseline: str  # the best baseline on the confirmation set, in words; empty if there is none
    baseline_auroc: float | None
    controls: Mapping[str, Score]  # on the confirmation set, by method


class CandidateRow(NamedTuple):
    """A candidate latent: what its activations say, and what raising it does."""

    slug: str
    candidate: Candidate
    output: OutputScore | None


class CausalRow(NamedTuple):
    """A line of the causal table: every condition at one dose."""

    concept: str
    slug: str
    verdict: str
    latent: int
    at: Mapping[str, Effect]


def report(path: Path, results: Results) -> None:
    """Write the report of what is there; a part that was not run is left out.

    Args:
        path: the HTML file to write; its folder exists.
        results: at least one alignment, and the concept of each; the fact `model` is part of the
            title.
    """
    assert results.alignments
    alignments = results.alignments
    summary = summarise(results)
    slugs = {c.name: c.slug for c in results.concepts}
    page = (
        _environment()
        .get_template("report.html")
        .render(
            facts={"model": "this model"} | dict(results.facts),
            summary=summary,
            paragraphs=prose.paragraphs(summary),
            headline=prose.summary_rows(summary),
            svg=_figures(summary, results),
            captions=prose.captions(summary, results, _here(summary, results)),
            colours=figures.VERDICT_COLOURS,
            verdicts=VERDICTS,
            board=_board(alignments, slugs),
            rows=_concept_rows(results, slugs, summary.k),
            candidates=_candidate_rows(results, slugs),
            sets=_sets(results.members),
            sites=results.site_choices,
            controls=results.controls,
            geometry=results.geometry,
            means=_means(summary),
            mean_sets=_mean_sets(summary),
            causal=_causal_rows(summary, results.effects, slugs),
            comparisons=[(slugs[c.concept], c) for c in results.comparisons],
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
        "num": number,
        "prob": probability,
        "interval": interval,
        "spark": _spark,
    }
    return environment


def _spark(auroc: float) -> float:
    """Place of an AUROC in the small graphs, in their units; at chance where it is not finite."""
    shown = auroc if math.isfinite(auroc) else 0.5
    return round(70 * (min(max(shown, 0.3), 1.0) - 0.3) / 0.7, 1)


def _figures(summary: Summary, results: Results) -> dict[str, str]:
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
    slugs = {c.name: c.slug for c in results.concepts}
    drawn = {"verdicts": figures.verdict_counts(bars)}
    families = {a.concept: a.family for a in results.alignments}
    if len(set(families.values())) > 1:
        drawn["families"] = figures.families(results.alignments)
    here = _here(summary, results)
    if here:
        drawn["map"] = figures.valence_map(here, results.concepts, summary.geometry)
    axis, known = summary.auroc_words, (*METHODS, *CONTROLS)
    # of one corpus the cross-fitted figures stand for both sets
    two = ("selection",) if summary.crossfit else ("selection", "confirmation")
    scores = [s for s in results.scores if s.set in two and s.method in known]
    if scores:
        drawn["auroc"] = figures.auroc(scores, summary.k, axis)
    standings = [s for s in summary.standings if _alike(s.ours, s.baseline)]
    if standings:
        drawn["standings"] = figures.standings(standings, summary.n, summary.k)
    if summary.cross:
        drawn["cross"] = discovery_figures.cross_map(results.cross, families, slugs)
    if results.curve:
        drawn["curve"] = discovery_figures.curve(results.curve, summary.auroc, summary.k, axis)
    if results.depth:
        drawn["depth"] = discovery_figures.depth(results.depth, summary.site, summary.k, axis)
    if summary.cosines:
        drawn["cosines"] = figures.cosines(results.comparisons, results.alignments, slugs)
    if summary.causal:
        drawn["doses"] = figures.dose_summary(results.effects)
        drawn["multiples"] = figures.dose_multiples(results.effects)
    return drawn


def _alike(ours: str, baseline: str) -> bool:
    """Whether the two are worth a comparison: a control with the same number of latents."""
    return baseline not in CONTROLS or baseline.endswith(" set") == (ours == "set")


def _here(summary: Summary, results: Results) -> list[Vector]:
    known = {c.name for c in results.concepts}
    return [
        v for v in results.vectors if is_at(v, summary.site, summary.pooling) and v.concept in known
    ]


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


def _concept_rows(results: Results, slugs: Mapping[str, str], k: int | None) -> list[ConceptRow]:
    named = {(n.site, n.latent): n for n in results.labels}
    best: dict[str, Score] = {}
    controls: dict[str, dict[str, Score]] = {}
    for score in results.scores:
        if score.set != "confirmation" or score.method in _OURS:
            continue
        if score.method in CONTROLS:
            controls.setdefault(score.concept, {})[score.method] = score
            continue
        held = best.get(score.concept)
        if held is None or score.auroc > held.auroc:
            best[score.concept] = score
    rows = []
    for row in sorted(results.alignments, key=_order):
        baseline = best.get(row.concept)
        rows.append(
            ConceptRow(
                slugs[row.concept],
                row,
                named.get((row.site, row.latent)),
                method_name(baseline.method, k) if baseline else "",
                baseline.auroc if baseline else None,
                controls.get(row.concept, {}),
            )
        )
    return rows


def _candidate_rows(results: Results, slugs: Mapping[str, str]) -> list[CandidateRow]:
    raised = {(row.concept, row.site, row.latent): row for row in results.outputs}
    return [
        CandidateRow(slugs[c.concept], c, raised.get((c.concept, c.site, c.latent)))
        for c in sorted(results.candidates, key=lambda c: (c.concept, c.rank))
    ]


def _sets(members: Sequence[SetMember]) -> dict[str, list[SetMember]]:
    sets: dict[str, list[SetMember]] = {}
    for member in sorted(members, key=lambda m: m.rank):
        sets.setdefault(member.concept, []).append(member)
    return dict(sorted(sets.items()))


def _mean_sets(summary: Summary) -> list[str]:
    """The sets of the table of means; of one corpus the cross-fitted figures stand for both."""
    sets = ("selection", "situations") if summary.crossfit else METHOD_SETS
    return [name for name in sets if any(key[0] == name for key in summary.auroc)]


def _means(summary: Summary) -> list[tuple[str, list[Mean | None]]]:
    """Method → its mean AUROC on each of `_mean_sets`."""
    sets = _mean_sets(summary)
    return [
        (method_name(m, summary.k), [summary.auroc.get((s, m)) for s in sets])
        for m in (*METHODS, *CONTROLS)
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

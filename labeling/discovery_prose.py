"""Controls, output side, texts, figures of discovery in words; `labeling.prose` has the rest.

Each sentence has a wording for either outcome, and is empty where nothing was measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from discovery.records import CurvePoint, Depth, TextSet
from labeling.results import Results
from labeling.summary import CONTROLS, Summary
from labeling.words import interval, join, method_name, number, plural

MEASURES = {
    "output_score": "output score of the latent's own tokens",
    "word_score": "rise of the concept's words",
}


def control_sentences(summary: Summary) -> str:
    """What latents reach that were not chosen, not trained, or read a model that was not."""
    text = ""
    keys = {m: ("confirmation", m) for m in CONTROLS}
    means = {m: summary.auroc[key] for m, key in keys.items() if key in summary.auroc}
    if means:
        listed = [f"{method_name(m, summary.k)} {interval(mean)}" for m, mean in means.items()]
        text = (
            "Controls, tested on the same texts (mean with its 95 % t interval over concepts): "
            f"{join(listed)}."
        )
    if summary.reverse and summary.reverse.tested:
        r = summary.reverse
        text += (
            f" In the reverse run (chosen on the confirmation set, tested on the selection set) "
            f"{r.passed} of the {plural(r.tested, 'concept')} found singly or as a set "
            f"{'passes' if r.passed == 1 else 'pass'} again."
        )
    if summary.cross:
        text += f" {cross_sentences(summary)}"
    return text.strip()


def cross_sentences(summary: Summary) -> str:
    """How far the chosen latents are specific to their concept."""
    c = summary.cross
    if c is None:
        return ""
    parts = [f"{number(c.own)} on the texts of its own concept"]
    if c.family is not None:
        parts.append(f"{number(c.family)} on those of others of its family")
    if c.others is not None:
        parts.append(f"{number(c.others)} on those of other families")
    return (
        f"A chosen latent has a mean AUROC of {join(parts)}; for {c.highest} of {c.n} no other "
        "concept scores higher than its own."
    )


def output_sentences(summary: Summary) -> str:
    """Whether raising a latent promotes the words of its concept, and whether the sides agree."""
    o = summary.outputs
    if o is None:
        return ""
    text = (
        f"Output side: raising the best latent lifts the words of its own concept above those of "
        f"every other for {o.first} of {plural(o.n, 'concept')}; the median rank of its own words "
        f"is {number(o.median_rank, 0)} of {summary.n} (by chance about "
        f"{number((summary.n + 1) / 2, 0)})."
    )
    if o.passed is not None:
        text += (
            f" For {o.passed} of {o.n} at most one random latent in twenty lifts them as much (by "
            f"chance {number(o.n / 20, 1)})."
        )
    if o.agreement:
        parts = [f"with the {MEASURES[a.measure]} {interval(a.tau, 2)}" for a in o.agreement]
        text += (
            " Kendall's tau-b of the input-side AUROC within a concept's candidates, mean with its "
            f"95 % t interval over concepts: {join(parts)}; candidates are the best on the input "
            "side, a narrow range, which lowers it."
        )
    return text


class Totals(NamedTuple):
    """Sums over the sources of all sets."""

    texts: int
    read: int
    unlabelled: int
    unreadable: int
    beyond_limit: int
    duplicates: int
    leaks: int
    cut: int
    chunked: int


def totals(sets: Sequence[TextSet]) -> Totals:
    """Texts kept, left out and marked, over all sets."""
    return Totals(*(sum(getattr(row, name) for row in sets) for name in Totals._fields))


def text_sentences(summary: Summary) -> str:
    """How many texts were used, left out, cut, or name their concept."""
    if not summary.sets:
        return ""
    t = totals(summary.sets)
    parts = _left_out(t)
    were = "was" if sum((t.unlabelled, t.duplicates, t.unreadable, t.beyond_limit)) == 1 else "were"
    left = f"; left out {were} {join(parts)}" if parts else "; none was left out"
    return (
        f"{t.texts:,} texts were used of {t.read:,} read{left}. Of those used, {t.leaks:,} outside "
        f"the lexical set {'names its' if t.leaks == 1 else 'name their'} concept or an "
        f"inflection; {t.cut:,} longer than the context {'was' if t.cut == 1 else 'were'} cut and "
        f"{t.chunked:,} read in several windows."
    )


def _left_out(t: Totals) -> list[str]:
    counts = {
        "without a label of these concepts": t.unlabelled,
        "near-duplicate" if t.duplicates == 1 else "near-duplicates": t.duplicates,
        "without text": t.unreadable,
        "beyond a source's limit": t.beyond_limit,
    }
    return [f"{n:,} {why}" for why, n in counts.items() if n]


def captions(summary: Summary, results: Results) -> dict[str, str]:
    """Captions of the three figures of discovery."""
    return {
        "cross": (
            f"A row a chosen latent, a column the texts of a concept, in the order of families; "
            f"{summary.auroc_words} on {summary.held_out}. Point at a row to read it. "
            f"{cross_sentences(summary)}"
        ),
        "curve": _curve_caption(results.curve, summary),
        "depth": _depth_caption(results.depth, summary),
    }


def _curve_caption(curve: Sequence[CurvePoint], summary: Summary) -> str:
    text = (
        f"Mean over concepts of the AUROC of sets of k latents, with its "
        f"{summary.curve_interval_words}; level lines are the means of the other methods on the "
        "same texts, dashed those of sets of an untrained SAE and a randomised model. No verdict "
        "rests on it."
    )
    known = [p for p in curve if math.isfinite(p.auroc)]
    rows = [p for p in known if p.set == "confirmation"] or known
    if rows:
        best = max(rows, key=lambda p: p.auroc)
        text += f" On the {rows[0].set} set it is highest at k = {best.k}: {number(best.auroc, 3)}."
    return text


def _depth_caption(rows: Sequence[Depth], summary: Summary) -> str:
    text = f"Mean AUROC over concepts at every captured site, {summary.curve_interval_words}"
    if summary.site:
        text += f"; the dotted line is {summary.site}, which the selection set chose"
    known = {row.set for row in rows}
    name = "confirmation" if "confirmation" in known else "selection"
    best: dict[str, list[str]] = {}
    for method in ("latent", "set", "vector", "probe"):
        top = _highest(rows, method, name)
        if top is not None:
            figure = f"{method_name(method, summary.k)} {number(top.auroc, 3)}"
            best.setdefault(top.site, []).append(figure)
    parts = [f"{join(names)} at {site}" for site, names in best.items()]
    return f"{text}. Highest on the {name} set: {'; '.join(parts)}." if parts else f"{text}."


def _highest(rows: Sequence[Depth], method: str, name: str) -> Depth | None:
    own = [
        row for row in rows if (row.method, row.set) == (method, name) and math.isfinite(row.auroc)
    ]
    return max(own, key=lambda row: row.auroc, default=None)


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The rows of the closing table that are about discovery."""
    rows: list[tuple[str, str]] = []
    if summary.reverse:
        r = summary.reverse
        rows.append(("found, and again in the reverse run", f"{r.passed} of {r.tested}"))
    if summary.outputs:
        o = summary.outputs
        rows.append(("raising the latent lifts its own words most", f"{o.first} of {o.n}"))
        rows += [
            (f"tau-b of AUROC and {a.measure.replace('_', ' ')}", interval(a.tau, 2, sign=True))
            for a in o.agreement
        ]
    if summary.sets:
        t = totals(summary.sets)
        rows += [
            ("texts", f"{t.texts:,} of {t.read:,} read"),
            ("left out", ", ".join(_left_out(t)) or "none"),
            ("texts that name their concept", f"{t.leaks:,}"),
            ("longer than the context", f"{t.cut:,} cut, {t.chunked:,} in several windows"),
        ]
    return rows

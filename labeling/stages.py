"""The stages of labeling: each reads files of the run folder and writes its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovery import captured, records
from discovery.captured import pick
from discovery.records import (
    Alignment,
    Comparison,
    Context,
    Control,
    Difference,
    Effect,
    Geometry,
    Label,
    PromotedToken,
    Sae,
    Score,
    SetMember,
    SiteChoice,
    Vector,
)
from discovery.settings import Texts
from labeling.catalog import FILE, Results, build
from labeling.settings import LabelConfig
from saes.errors import UserError
from saes.files import locate
from saes.sources import resolve
from saes.subject import Subject, SubjectConfig

RECORDS: dict[str, tuple[str, type]] = {
    "alignments": ("align", Alignment),
    "members": ("align", SetMember),
    "scores": ("align", Score),
    "differences": ("align", Difference),
    "controls": ("align", Control),
    "site_choices": ("align", SiteChoice),
    "vectors": ("contrast", Vector),
    "geometry": ("contrast", Geometry),
    "comparisons": ("compare", Comparison),
    "effects": ("causal", Effect),
    "labels": ("label", Label),
    "promoted": ("label", PromotedToken),
    "contexts": ("label", Context),
    "saes": ("label", Sae),
}
"""Kind of result: the stage that writes it, and its record type."""


def read_kind(run: Path, kind: str) -> list[Any]:
    """The rows of one kind of result of a run."""
    stage, record = RECORDS[kind]
    return records.read(run / stage / f"{kind}.parquet", record)


def label(out: Path, run: Path, subject: Subject, texts: Texts, config: LabelConfig) -> None:
    """Promoted tokens, top contexts and a name for every latent that a concept chose."""
    from labeling.evidence import contexts, promoted_tokens
    from labeling.explain import labels

    alignments: list[Alignment] = read_kind(run, "alignments")
    members: list[SetMember] = read_kind(run, "members")
    site = alignments[0].site
    read = captured.load(run / "capture")
    latents = sorted(
        {a.latent for a in alignments}
        | {a.lexical_latent for a in alignments}
        | {m.latent for m in members}
    )
    stories = np.concatenate([pick(read.texts, s, texts.names).rows for s in ("first", "hard")])
    fires = np.diff(read.latents[site][stories].tocsc().indptr)
    density = {(site, j): float(fires[j] / len(stories)) for j in latents}
    dictionary = subject.dictionary(site)
    promoted = promoted_tokens(subject.lm, dictionary, latents, config.promoted)
    # Evidence is on texts that did not choose the latent, and all of one kind: stories of the hard
    # set; for a latent that a mere word explains, mentions.
    words = {a.lexical_latent for a in alignments if a.verdict == "lexical only"}
    words -= {a.latent for a in alignments}
    everything, shown = texts.corpus.texts(), list[Context]()
    for kind, some in (("hard", set(latents) - words), ("mentions", words)):
        rows = pick(read.texts, kind, texts.names).rows
        own = [everything[i] for i in rows]
        pooled = read.latents[site][rows]
        shown += contexts(subject.lm, dictionary, pooled, own, sorted(some), config.contexts)
    names = labels(density, alignments, members, promoted, shown, texts.concepts)
    records.write(out / "labels.parquet", Label, names)
    records.write(out / "promoted.parquet", PromotedToken, promoted)
    records.write(out / "contexts.parquet", Context, shown)
    records.write(out / "saes.parquet", Sae, _saes(subject))


def _saes(subject: Subject) -> list[Sae]:
    """Where each SAE is from, and how it did on the model when it was loaded."""
    return [
        Sae(
            site=dictionary.site,
            latents=dictionary.d_sae,
            source=dictionary.origin.source if dictionary.origin else check.source,
            format=dictionary.origin.format if dictionary.origin else "",
            neuronpedia=dictionary.origin.neuronpedia if dictionary.origin else None,
            variance_explained=check.variance_explained,
            l0=check.l0,
        )
        for dictionary, check in zip(subject.dictionaries, subject.checks, strict=True)
    ]


def _results(run: Path, texts: Texts, config: SubjectConfig) -> Results:
    rows = {kind: read_kind(run, kind) for kind in RECORDS}
    return Results(facts=_facts(run, texts, config), concepts=texts.concepts, **rows)


def _facts(run: Path, texts: Texts, config: SubjectConfig) -> dict[str, str]:
    """What was run, in words: model, SAEs with their quality on held-out text, texts."""
    local = locate(config.model).is_dir() and not config.model.startswith("packaged/")
    facts = {"model": locate(config.model).resolve().name if local else config.model}
    for i, (name, sae) in enumerate(zip(config.saes, read_kind(run, "saes"), strict=True), start=1):
        facts[f"SAE {i}"] = f"{sae.source}: {_quality(name, sae)}"
    sizes = {kind: len(rows) for kind, rows in texts.corpus._asdict().items()}
    facts["concepts"] = str(len(texts.concepts))
    facts["texts"] = ", ".join(f"{kind} {n:,}" for kind, n in sizes.items())
    rows = records.read(run / "capture" / "texts.parquet", captured.TextRow)
    cut = sum(row.truncated for row in rows)
    facts["pooled"] = _pooling(rows)
    facts["cut to the context"] = f"{cut} of {sum(sizes.values()):,} texts"
    tokens = int((run / "causal" / "tokens.json").read_text())
    facts["tokens run for the causal tests"] = f"{tokens:,}"
    return facts


def _pooling(rows: Sequence[captured.TextRow]) -> str:
    """The tokens over which each set's activations were averaged."""
    from discovery.pooling import STORIES, first_position

    counts: dict[str, list[int]] = {}
    for row in rows:
        counts.setdefault("stories" if row.set in STORIES else row.set, []).append(row.tokens)
    starts = {name: first_position(own) for name, own in counts.items()}
    return "; ".join(
        f"{name}: {f'tokens from number {start + 1} on' if start else 'all content tokens'}"
        for name, start in starts.items()
    )


def _quality(name: str, sae: Sae) -> str:
    """What was measured on held-out text when it was trained here, or else on the check texts."""
    try:
        found = resolve(name).path
        folder = found if found.is_dir() else found.parent
        held_out = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["held_out"]
        return (
            f"L0 {held_out['l0']:.1f}, variance explained {held_out['variance_explained']:.3f}, "
            f"cross-entropy recovered {held_out['recovered_mean']:.3f} (against mean ablation), "
            f"dead latents {held_out['dead']:.1%}, on {held_out['tokens']:,} held-out tokens"
        )
    except (UserError, OSError, ValueError, KeyError, TypeError):  # none, or not all figures
        return f"L0 {sae.l0:.1f}, variance explained {sae.variance_explained:.3f}, on check texts"


def catalog(out: Path, run: Path, texts: Texts, config: SubjectConfig) -> None:
    """One SQLite file with every result."""
    build(out / Path(FILE).name, _results(run, texts, config))


def report(out: Path, run: Path, texts: Texts, config: SubjectConfig) -> None:
    """One HTML page with tables and figures."""
    from labeling.report import report as write_report

    results = _results(run, texts, config)
    unused = ("promoted", "contexts", "saes")
    rows = {kind: getattr(results, kind) for kind in RECORDS if kind not in unused}
    rows["sites"] = rows.pop("site_choices")
    write_report(out / "report.html", facts=results.facts, concepts=results.concepts, **rows)


def summary(run: Path) -> list[tuple[str, str]]:
    """The headline figures of a finished run, as (what, figure)."""
    from labeling.prose import summary_rows
    from labeling.summary import summarise

    kinds = ("alignments", "members", "scores", "differences", "controls", "geometry",
             "comparisons", "effects")  # fmt: skip
    rows = {kind: read_kind(run, kind) for kind in kinds}
    return summary_rows(summarise(sites=read_kind(run, "site_choices"), **rows))

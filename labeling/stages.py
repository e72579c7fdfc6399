"""The stages of labeling: each reads files of the run folder and writes its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovery import captured, records
from discovery.captured import pick
from discovery.records import Alignment, Context, Label, PromotedToken, Sae, SetMember
from discovery.settings import Texts
from labeling.catalog import FILE, build
from labeling.results import DISCOVERY, RECORDS, Results, read_kind, read_rows
from labeling.settings import LabelConfig
from labeling.summary import HELD_OUT
from saes.errors import UserError
from saes.files import locate
from saes.sources import resolve
from saes.subject import Subject, SubjectConfig
from saes.track import Scalar

TABLES = {
    "alignments": "alignments",
    "methods": "scores",
    "candidates": "candidates",
    "output": "outputs",
    "sets": "sets",
}
"""Tables that are tracked: their name, and the kind of result."""


def label(out: Path, run: Path, subject: Subject, texts: Texts, config: LabelConfig) -> None:
    """Promoted tokens, top contexts and a name for every latent that a concept chose."""
    from labeling.evidence import contexts, promoted_tokens
    from labeling.explain import labels

    alignments: list[Alignment] = read_kind(run, "alignments")
    members: list[SetMember] = read_kind(run, "members")
    site = alignments[0].site
    read = captured.load(run / "capture")
    pooled = read.latents[captured.view(site, alignments[0].pooling)]
    words = {a.lexical_latent for a in alignments if a.lexical_latent is not None}
    latents = sorted({a.latent for a in alignments} | words | {m.latent for m in members})
    rows = {
        name: pick(read.texts, name, texts.names).rows
        for name in ("selection", "confirmation", "lexical")
    }
    counted = np.concatenate([rows["selection"], rows["confirmation"]])
    fires = np.diff(pooled[counted].tocsc().indptr)
    density = {(site, j): float(fires[j] / len(counted)) for j in latents}
    dictionary = subject.dictionary(site)
    promoted = promoted_tokens(subject.lm, dictionary, latents, config.promoted)
    # Evidence is on texts that did not choose the latent, and all of one kind: the confirmation
    # set; for a latent that a mere word explains, mentions of the word.
    words &= {a.lexical_latent for a in alignments if a.verdict == "lexical only"}
    words -= {a.latent for a in alignments}
    crossfit = not len(rows["confirmation"])  # one corpus only
    if crossfit:
        rows["confirmation"] = rows["selection"]
    everything, shown = texts.corpus.texts(), list[Context]()
    for kind, some in (("confirmation", set(latents) - words), ("lexical", words)):
        if some:
            own = [everything[i] for i in rows[kind]]
            here = pooled[rows[kind]]
            long = "chunk" if any(read.texts[i].chunks > 1 for i in rows[kind]) else "cut"
            shown += contexts(
                subject.lm, dictionary, here, own, sorted(some), config.contexts, long
            )
    names = labels(
        density, alignments, members, promoted, shown, texts.concepts, HELD_OUT[crossfit]
    )
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


def _results(run: Path, texts: Texts, config: SubjectConfig, stages: Sequence[str] = ()) -> Results:
    rows = read_rows(run, stages=stages)
    facts = _facts(run, texts, config, rows["saes"])
    if (run / "causal").is_dir() and (not stages or "causal" in stages):
        tokens = int((run / "causal" / "tokens.json").read_text())
        facts["tokens run for the causal tests"] = f"{tokens:,}"
    return Results(facts=facts, concepts=texts.concepts, **rows)


def _facts(run: Path, texts: Texts, config: SubjectConfig, saes: Sequence[Sae]) -> dict[str, str]:
    """What was run, in words: model, SAEs with their quality on held-out text, texts."""
    local = locate(config.model).is_dir() and not config.model.startswith("packaged/")
    facts = {"model": locate(config.model).resolve().name if local else config.model}
    for i, name in enumerate(config.saes):
        sae = saes[i] if saes else None
        quality = _quality(name, sae)
        source = sae.source if sae else _source_name(name)
        facts[f"SAE {i + 1}"] = f"{source}: {quality}" if quality else source
    sizes = {kind: len(rows) for kind, rows in texts.corpus._asdict().items() if rows}
    facts["concepts"] = str(len(texts.concepts))
    facts["texts"] = ", ".join(f"{kind} {n:,}" for kind, n in sizes.items())
    languages = sorted({text.language for text in texts.corpus.texts()} - {"", "en"})
    if languages:
        facts["languages"] = ", ".join(languages)
    rows = records.read(run / "capture" / "texts.parquet", captured.TextRow)
    facts["pooled"] = _pooling(run / "capture" / "pooled.json")
    cut, chunked = sum(row.truncated for row in rows), sum(row.chunks > 1 for row in rows)
    facts["longer than the context"] = (
        f"{cut:,} cut and {chunked:,} read in several windows, of {len(rows):,} texts"
    )
    return facts


def _source_name(name: str) -> str:
    """An SAE's source without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _pooling(path: Path) -> str:
    """The tokens that the pooling `rule` means over, by set."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); delete its stage folder") from None
    by_words: dict[str, list[str]] = {}
    for name, text in words.items():
        by_words.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_words.items())


def _quality(name: str, sae: Sae | None) -> str:
    """What was measured on held-out text when it was trained here, or else on the check texts.

    Empty where neither is known.
    """
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
        if sae is None:
            return ""
        return f"L0 {sae.l0:.1f}, variance explained {sae.variance_explained:.3f}, on check texts"


def discovery(out: Path, run: Path, texts: Texts, config: SubjectConfig) -> None:
    """The report of the stages that `discover` runs: verdicts, scores, baselines and controls."""
    from labeling.report import report as write_report

    write_report(out / "report.html", _results(run, texts, config, DISCOVERY))


def catalog(out: Path, run: Path, texts: Texts, config: SubjectConfig) -> None:
    """One SQLite file with every result."""
    build(out / Path(FILE).name, _results(run, texts, config))


def report(out: Path, run: Path, texts: Texts, config: SubjectConfig) -> None:
    """One HTML page with tables and figures."""
    from labeling.report import report as write_report

    write_report(out / "report.html", _results(run, texts, config))


def summary(run: Path, stages: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The headline figures of a finished run or discovery, as (what, figure).

    Args:
        stages: those that were run, so that what an earlier run left is not read; empty: all that
            are there.
    """
    from labeling.prose import summary_rows
    from labeling.summary import summarise

    unused = ("candidates", "curve", "depth", "vectors", "labels", "promoted", "contexts", "saes")
    rows = read_rows(run, [kind for kind in RECORDS if kind not in unused], stages)
    return summary_rows(summarise(Results(facts={}, **rows)))


def tables(
    run: Path, stages: Sequence[str] = ()
) -> list[tuple[str, tuple[str, ...], list[tuple[Scalar, ...]]]]:
    """Tables for the tracker, as (name, columns, rows); those without rows are left out.

    Args:
        stages: as for `summary`.
    """
    found = []
    for name, kind in TABLES.items():
        rows = read_rows(run, [kind], stages)[kind]
        if rows:
            columns = tuple(vars(rows[0]))
            values = [tuple(_scalar(getattr(row, c)) for c in columns) for row in rows]
            found.append((name, columns, values))
    return found


def _scalar(value: Any) -> Scalar:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value

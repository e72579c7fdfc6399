"""The stages of discovery: each reads files of the run folder and writes its own.

The work is done by plain functions of the other modules; here are only the settings and the files.
Torch is imported by the stages that run the model.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int
from safetensors.numpy import load_file, save_file

from discovery import captured, records
from discovery.concepts import Concept, load_concepts
from discovery.corpora import CORPUS, Corpus, digest, load_corpus
from discovery.records import (
    Alignment,
    Comparison,
    Control,
    Difference,
    Effect,
    Geometry,
    Score,
    SetMember,
    SiteChoice,
    Vector,
)
from saes.commands import Subject
from saes.errors import UserError

if TYPE_CHECKING:
    from discovery.align import AlignResult
    from discovery.baselines import Results
    from discovery.selection import LabelledSet

EMBEDDING = "blocks.0.hook_resid_pre"
METHOD_SETS = ("first", "hard", "situations")


@dataclass(frozen=True)
class CaptureConfig:
    """The pass of the model over the corpus."""

    batch_tokens: int = 8192
    """Padded tokens in one forward pass."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, not {self.batch_tokens}")


@dataclass(frozen=True)
class ContrastConfig:
    """Contrastive vectors."""

    neutral_variance: float = 0.5
    """Share of the neutral variance whose principal components are projected out."""
    halves: int = 50
    """Random halves of the topics behind the split-half reliability."""

    def __post_init__(self) -> None:
        if not 0 <= self.neutral_variance < 1:
            raise ValueError(f"neutral_variance must be in [0, 1), not {self.neutral_variance}")
        if self.halves < 1:
            raise ValueError(f"halves must be at least 1, not {self.halves}")


@dataclass(frozen=True)
class AlignConfig:
    """The verdict protocol."""

    k: int = 16
    """Latents in a set."""
    q: float = 0.05
    """False-discovery rate of steps 5, 6 and 9."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(
                f"k must be at least 2, not {self.k}: a set of one is the single latent"
            )
        if not 0 < self.q < 1:
            raise ValueError(f"q must be between 0 and 1, not {self.q}")


@dataclass(frozen=True)
class CausalConfig:
    """Dose-response experiments."""

    concepts: int = 24
    """At most so many concepts: confirmed ones first, best first."""
    doses: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    """Norms of the edit as fractions of the mean residual norm."""
    prompts: int = 10
    """Openings of neutral texts."""
    prompt_tokens: int = 16
    """Most tokens of a prompt."""
    words: int = 2
    """Word forms read per concept."""
    controls: int = 5
    """Random latents of like firing density, shared by all concepts."""
    max_tokens: int = 300_000
    """A plan that needs more is refused."""

    def __post_init__(self) -> None:
        for name in ("concepts", "prompt_tokens", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("prompts", "controls"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, for an interval")
        if not self.doses or min(self.doses) <= 0:
            raise ValueError("doses must be positive fractions of the mean residual norm")


class Texts(NamedTuple):
    """The concepts of a run and the texts for them."""

    concepts: list[Concept]
    corpus: Corpus
    folder: Path

    @property
    def names(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    @property
    def families(self) -> list[str]:
        return [concept.family for concept in self.concepts]


def open_texts(corpus: str, concepts: Sequence[str]) -> Texts:
    """The concepts (all when none is named) and the packaged or a user's corpus.

    Raises:
        UserError: an unknown concept, too few concepts, or a corpus that does not fit.
    """
    chosen = load_concepts(concepts or None)
    if len(chosen) < 3:
        raise UserError(f"concepts names {len(chosen)}; a concept is judged against others: name 3")
    folder = CORPUS if corpus == "packaged" else Path(corpus)
    return Texts(chosen, load_corpus(folder, chosen), folder)


def texts_fingerprint(texts: Texts) -> str:
    """Identifies what `open_texts` gave."""
    return f"{digest(texts.folder)}:{','.join(texts.names)}"


class Sets(NamedTuple):
    """Where the sets of the corpus are in the captured arrays, and what their texts are labelled."""

    rows: Int[np.ndarray, " texts"]
    labels: Int[np.ndarray, " texts"]
    """Index of the concept; -1 for neutral texts."""
    topics: Int[np.ndarray, " texts"]
    writers: Int[np.ndarray, " texts"]


def pick(rows: Sequence[captured.TextRow], name: str, names: Sequence[str]) -> Sets:
    """The rows of one set; mentions and situations have as topic their number within the concept."""
    index = {concept: i for i, concept in enumerate(names)}
    at = [i for i, row in enumerate(rows) if row.set == name]
    seen: dict[str, int] = {}
    topics: list[str] = []
    for i in at:
        number = seen[rows[i].concept] = seen.get(rows[i].concept, -1) + 1
        topics.append(rows[i].topic or f"{number:06d}")
    return Sets(
        np.array(at, dtype=np.int64),
        np.array([index.get(rows[i].concept, -1) for i in at], dtype=np.int64),
        np.unique(topics, return_inverse=True)[1].astype(np.int64),
        np.unique([rows[i].writer for i in at], return_inverse=True)[1].astype(np.int64),
    )


def capture(out: Path, subject: Subject, texts: Texts, config: CaptureConfig) -> None:
    """Pooled residuals and latents of all texts."""
    from tqdm import tqdm

    from discovery.pooling import capture_texts

    everything = texts.corpus.texts()
    with tqdm(total=len(everything), desc="capture", unit="text", file=sys.stderr) as bar:
        captured.save(
            out,
            capture_texts(
                subject.lm,
                subject.dictionaries,
                everything,
                batch_tokens=config.batch_tokens,
                progress=bar.update,
            ),
        )


def contrast(out: Path, *, run: Path, texts: Texts, config: ContrastConfig, seed: int) -> None:
    """Contrastive vectors at every captured site, their reliability and their geometry."""
    from discovery.contrast import contrastive_vectors, split_half
    from discovery.geometry import (
        geometry_rows,
        human_norms,
        principal_components,
        vector_rows,
    )

    read = captured.load(run / "capture")
    first, neutral = (pick(read.texts, name, texts.names) for name in ("first", "neutral"))
    norms = human_norms(texts.concepts)
    arrays: dict[str, np.ndarray] = {}
    vectors: list[Vector] = []
    geometry: list[Geometry] = []
    for site, residuals in read.residuals.items():
        own = residuals[first.rows]
        result = contrastive_vectors(
            own, first.labels, len(texts.names), residuals[neutral.rows], config.neutral_variance
        )
        reliability = split_half(
            own,
            first.labels,
            first.topics,
            len(texts.names),
            result.neutral,
            halves=config.halves,
            seed=seed,
        )
        anchors = [norm.values for norm in norms[:2]]
        components = principal_components(result.vectors, anchors)
        arrays |= {f"vectors/{site}": result.vectors, f"neutral/{site}": result.neutral}
        vectors += vector_rows(
            site, texts.names, result.vectors, read.norms[site], reliability, components
        )
        geometry += geometry_rows(site, components, norms)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, out / "vectors.safetensors")
    records.write(out / "vectors.parquet", Vector, vectors)
    records.write(out / "geometry.parquet", Geometry, geometry)


def align(out: Path, *, run: Path, texts: Texts, config: AlignConfig, seed: int) -> None:
    """Verdicts, the methods beside them, and the whole procedure under shuffled labels."""
    from discovery.align import align as align_rows
    from discovery.align import shuffled, tally
    from discovery.baselines import difference_rows, score_rows
    from discovery.contrast import nearest

    read = captured.load(run / "capture")
    names = texts.names
    sets = {name: pick(read.texts, name, names) for name in (*METHOD_SETS, "neutral", "mentions")}
    first, hard, mentions = (_labelled(read, sets[n]) for n in ("first", "hard", "mentions"))
    arrays = load_file(run / "contrast" / "vectors.safetensors")
    near = {site: nearest(arrays[f"vectors/{site}"]) for site in read.latents}
    settings = {
        "nearest": near, "concepts": names, "families": texts.families,
        "k": config.k, "q": config.q,
    }  # fmt: skip
    result = align_rows(first, hard, mentions, **settings)
    rng = np.random.default_rng(seed)
    null = align_rows(*(shuffled(labelled, rng) for labelled in (first, hard, mentions)), **settings)
    controls = [tally("true", result), tally("shuffled within topic", null)]
    ours, others = _methods(read, sets, texts, result)
    records.write(out / "alignments.parquet", Alignment, result.alignments)
    records.write(out / "members.parquet", SetMember, result.members)
    records.write(out / "site_choices.parquet", SiteChoice, result.sites)
    records.write(out / "controls.parquet", Control, controls)
    scores = [row for method in (*ours, *others) for row in score_rows(method, names)]
    records.write(out / "scores.parquet", Score, scores)
    differences = [
        row for own in ours for other in others for row in difference_rows(own, other, names)
    ]
    records.write(out / "differences.parquet", Difference, differences)


def _labelled(read: captured.Captured, own: Sets) -> "LabelledSet":
    from discovery.selection import LabelledSet

    latents = {site: x[own.rows] for site, x in read.latents.items()}
    return LabelledSet(latents, own.labels, own.topics, own.writers)


def _methods(
    read: captured.Captured, sets: dict[str, Sets], texts: Texts, result: "AlignResult"
) -> tuple[list["Results"], list["Results"]]:
    """The single latent and the set; and what they are compared with, on the same texts."""
    from discovery import baselines, probes, selection

    site = result.alignments[0].site
    words = np.array([text.text for text in texts.corpus.texts()], dtype=object)
    singles, groups = selection.score(
        result.fit.selection, read.latents[site][sets["situations"].rows]
    )
    situations = sets["situations"].labels
    ours = [
        baselines.Results(
            name, first, confirmed.aurocs, baselines.situation_aurocs(values, situations)
        )
        for name, first, confirmed, values in (
            ("latent", result.fit.latent_aurocs, result.singles, singles),
            ("set", result.fit.set_aurocs, result.sets, groups),
        )
    ]
    neutral = read.residuals[site][sets["neutral"].rows]
    readers = (
        ("vector", probes.fit_vectors(neutral), read.residuals[site]),
        ("probe", probes.fit_probe, read.residuals[site]),
        ("embedding", probes.fit_difference, read.residuals[EMBEDDING]),
        ("tfidf", baselines.fit_tfidf, words),
    )
    labels = {
        name: probes.Labels(own.labels, own.topics, own.writers, len(texts.names))
        for name, own in sets.items()
    }
    others = [
        baselines.measure(
            name, fit, *((data[sets[part].rows], labels[part]) for part in METHOD_SETS)
        )
        for name, fit, data in readers
    ]
    return ours, others


def compare(out: Path, *, run: Path, subject: Subject, texts: Texts) -> None:
    """Feature directions against contrastive vectors."""
    from discovery.compare import Pick
    from discovery.compare import compare as compare_rows

    alignments = records.read(run / "align" / "alignments.parquet", Alignment)
    members = records.read(run / "align" / "members.parquet", SetMember)
    site = alignments[0].site
    ceilings = {
        v.concept: v.ceiling
        for v in records.read(run / "contrast" / "vectors.parquet", Vector)
        if v.site == site
    }
    arrays = load_file(run / "contrast" / "vectors.safetensors")
    picks = [
        Pick(
            a.concept,
            a.latent,
            [(m.latent, m.weight) for m in members if m.concept == a.concept],
            ceilings[a.concept],
        )
        for a in alignments
    ]
    rows = compare_rows(
        site,
        picks,
        arrays[f"vectors/{site}"],
        arrays[f"neutral/{site}"],
        subject.dictionary(site).W_dec.detach().cpu().float().numpy(),
    )
    records.write(out / "comparisons.parquet", Comparison, rows)


def causal(
    out: Path, *, run: Path, subject: Subject, texts: Texts, config: CausalConfig, seed: int
) -> None:
    """Dose-response of the best features, their vectors and random latents."""
    import torch

    from discovery.causal import Target, control_latents, dose_response, neutral_prompts

    alignments = records.read(run / "align" / "alignments.parquet", Alignment)
    site = alignments[0].site
    read = captured.load(run / "capture")
    vectors = load_file(run / "contrast" / "vectors.safetensors")[f"vectors/{site}"]
    forms = {c.name: c.inflections for c in texts.concepts}
    row = {a.concept: i for i, a in enumerate(alignments)}
    chosen = best(alignments, config.concepts)
    targets = [
        Target(
            a.concept,
            a.verdict,
            a.latent,
            torch.from_numpy(vectors[row[a.concept]]),
            forms[a.concept][: config.words],
        )
        for a in chosen
    ]
    stories = np.concatenate([pick(read.texts, s, texts.names).rows for s in ("first", "hard")])
    density = np.diff(read.latents[site][stories].tocsc().indptr) / len(stories)
    controls = control_latents(density, [a.latent for a in alignments], config.controls, seed)
    prompts = neutral_prompts(
        texts.corpus.neutral, subject.lm.tokenizer, config.prompts, config.prompt_tokens, seed
    )
    result = dose_response(
        subject.lm,
        subject.dictionary(site),
        targets,
        controls,
        prompts,
        doses=config.doses,
        mean_norm=read.norms[site],
        max_tokens=config.max_tokens,
    )
    records.write(out / "effects.parquet", Effect, result.effects)


def best(alignments: Sequence[Alignment], n: int) -> list[Alignment]:
    """At most `n` concepts to test causally: `found` first, then by the confirmation p-value.

    Concepts that share a latent count once: a clamp cannot tell them apart.
    """
    order = sorted(alignments, key=lambda a: (a.verdict != "found", a.p, a.concept))
    chosen: dict[int, Alignment] = {}
    for a in order:
        chosen.setdefault(a.latent, a)
    return list(chosen.values())[:n]

"""The stages of discovery: each reads files of the run folder and writes its own.

The work is done by plain functions of the other modules; here are only the files. Torch is imported
by the two stages that run the model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from discovery import baselines, captured, probes, records, selection
from discovery.align import AlignResult, shuffled, tally
from discovery.align import align as align_rows
from discovery.captured import EMBEDDING, Sets, pick
from discovery.compare import Pick
from discovery.compare import compare as compare_rows
from discovery.contrast import (
    contrastive_vectors,
    differences,
    nearest,
    project_out,
    split_half,
)
from discovery.geometry import geometry_rows, human_norms, principal_components, vector_rows
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
from discovery.selection import LabelledSet
from discovery.settings import AlignConfig, CaptureConfig, CausalConfig, ContrastConfig, Texts
from saes.errors import UserError
from saes.files import write_text
from saes.subject import Subject

METHOD_SETS = ("first", "hard", "situations")


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


def contrast(out: Path, run: Path, texts: Texts, config: ContrastConfig, seed: int) -> None:
    """Contrastive vectors at every captured site, their reliability and their geometry."""
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


def align(
    out: Path, run: Path, texts: Texts, config: AlignConfig, contrast: ContrastConfig, seed: int
) -> None:
    """Verdicts, the methods beside them, and the whole procedure under shuffled labels."""
    read = captured.load(run / "capture")
    names = texts.names
    sets = {name: pick(read.texts, name, names) for name in (*METHOD_SETS, "neutral", "mentions")}
    first, hard, mentions = (_labelled(read, sets[n]) for n in ("first", "hard", "mentions"))

    def run_protocol(first: LabelledSet, hard: LabelledSet, mentions: LabelledSet) -> AlignResult:
        near = {site: neighbours(site, first) for site in read.latents}
        return align_rows(first, hard, mentions, near, names, texts.families, config.k, config.q)

    def neighbours(site: str, own: LabelledSet) -> np.ndarray:
        stories, neutral = (read.residuals[site][sets[n].rows] for n in ("first", "neutral"))
        variance = contrast.neutral_variance
        fitted = contrastive_vectors(stories, own.labels, len(names), neutral, variance)
        return nearest(fitted.vectors)

    result = run_protocol(first, hard, mentions)
    rng = np.random.default_rng(seed)
    null = run_protocol(*(shuffled(labelled, rng) for labelled in (first, hard, mentions)))
    controls = [tally("true", result), tally("shuffled within topic", null)]
    ours, others = _methods(read, sets, texts, result, contrast.neutral_variance)
    records.write(out / "alignments.parquet", Alignment, result.alignments)
    records.write(out / "members.parquet", SetMember, result.members)
    records.write(out / "site_choices.parquet", SiteChoice, result.sites)
    records.write(out / "controls.parquet", Control, controls)
    scores = [row for method in (*ours, *others) for row in baselines.score_rows(method, names)]
    records.write(out / "scores.parquet", Score, scores)
    differences = [
        row
        for own in ours
        for other in others
        for row in baselines.difference_rows(own, other, names)
    ]
    records.write(out / "differences.parquet", Difference, differences)


def _labelled(read: captured.Captured, own: Sets) -> LabelledSet:
    latents = {site: x[own.rows] for site, x in read.latents.items()}
    return LabelledSet(latents, own.labels, own.topics, own.writers)


def _methods(
    read: captured.Captured,
    sets: dict[str, Sets],
    texts: Texts,
    result: AlignResult,
    neutral_variance: float,
) -> tuple[list[baselines.Results], list[baselines.Results]]:
    """The single latent and the set; and what they are compared with, on the same texts."""
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
        ("vector", probes.fit_vectors(neutral, neutral_variance), read.residuals[site]),
        ("probe", probes.fit_probe, read.residuals[site]),
        ("embedding", probes.fit_probe, read.residuals[EMBEDDING]),
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


def compare(
    out: Path, run: Path, subject: Subject, texts: Texts, config: ContrastConfig, seed: int
) -> None:
    """Feature directions against contrastive vectors of the hard set.

    Features were chosen on the first set, so vectors of the same stories would share its noise.
    """
    alignments = records.read(run / "align" / "alignments.parquet", Alignment)
    members = records.read(run / "align" / "members.parquet", SetMember)
    site = alignments[0].site
    read = captured.load(run / "capture")
    hard = pick(read.texts, "hard", texts.names)
    neutral = load_file(run / "contrast" / "vectors.safetensors")[f"neutral/{site}"]
    stories, n = read.residuals[site][hard.rows], len(texts.names)
    vectors = project_out(differences(stories, hard.labels, n), neutral)
    reliability = split_half(
        stories, hard.labels, hard.topics, n, neutral, halves=config.halves, seed=seed
    )
    picks = [
        Pick(
            a.concept,
            a.latent,
            [(m.latent, m.weight) for m in members if m.concept == a.concept],
            float(ceiling),
        )
        for a, ceiling in zip(alignments, reliability.ceiling, strict=True)
    ]
    decoder = subject.dictionary(site).W_dec.detach().cpu().float().numpy()
    records.write(
        out / "comparisons.parquet",
        Comparison,
        compare_rows(site, picks, vectors, neutral, decoder),
    )


def causal(
    out: Path, run: Path, subject: Subject, texts: Texts, config: CausalConfig, seed: int
) -> None:
    """Dose-response of the best features, their vectors and random latents."""
    import torch
    from tqdm import tqdm

    from discovery.causal import (
        Target,
        control_latents,
        dose_response,
        neutral_prompts,
        planned_tokens,
    )

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
    plan = planned_tokens(subject.lm, targets, controls, prompts, config.doses)
    with tqdm(total=plan, desc="causal", unit="token", unit_scale=True, file=sys.stderr) as bar:
        result = dose_response(
            subject.lm,
            subject.dictionary(site),
            targets,
            controls,
            prompts,
            doses=config.doses,
            mean_norm=read.norms[site],
            max_tokens=config.max_tokens,
            progress=bar.update,
        )
    records.write(out / "effects.parquet", Effect, result.effects)
    write_text(out / "tokens.json", f"{result.tokens}\n")


def check_causal(subject: Subject, texts: Texts, config: CausalConfig, seed: int) -> None:
    """Refuse now what the causal stage would refuse after the stages before it.

    Which concepts it will test is not known yet, so those whose words need most tokens stand in.

    Raises:
        UserError: too few neutral texts or latents, prompts that are too short or too long, or a
            plan above max_tokens.
    """
    import torch

    from discovery.causal import Target, check_design, neutral_prompts, planned_tokens

    lm, n = subject.lm, len(texts.concepts)
    for dictionary in subject.dictionaries:
        if config.controls > dictionary.d_sae - n:
            raise UserError(
                f"causal.controls is {config.controls}, but beside the latents of {n} concepts the "
                f"SAE at {dictionary.site} has {max(0, dictionary.d_sae - n)}; lower it"
            )
    prompts = neutral_prompts(
        texts.corpus.neutral, lm.tokenizer, config.prompts, config.prompt_tokens, seed
    )
    controls, nothing = range(config.controls), torch.zeros(0)
    costs = sorted(
        planned_tokens(
            lm,
            [Target(c.name, "", 0, nothing, c.inflections[: config.words])],
            controls,
            prompts,
            config.doses,
        )
        for c in texts.concepts
    )[-config.concepts :]
    check_design(
        len(costs), config.doses, config.prompts, config.controls, sum(costs), config.max_tokens
    )


def best(alignments: Sequence[Alignment], n: int) -> list[Alignment]:
    """At most `n` concepts to test causally: `found` first, then by the confirmation p-value.

    Concepts that share a latent count once: a clamp cannot tell them apart.
    """
    order = sorted(alignments, key=lambda a: (a.verdict != "found", a.p, a.concept))
    chosen: dict[int, Alignment] = {}
    for a in order:
        chosen.setdefault(a.latent, a)
    return list(chosen.values())[:n]

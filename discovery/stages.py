"""The stages of discovery: each reads files of the run folder and writes its own.

The work is done by plain functions of the other modules; here are only the files. Torch is imported
by the stages that run the model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from discovery import captured, records
from discovery.captured import TextRow, pick, site_of, view
from discovery.compare import Pick
from discovery.compare import compare as compare_rows
from discovery.contrast import contrastive_vectors, differences, project_out, split_half
from discovery.discover import counted, raise_candidates, read_texts
from discovery.evaluate import KINDS, evaluate
from discovery.geometry import geometry_rows, human_norms, principal_components, vector_rows
from discovery.records import (
    Alignment,
    Candidate,
    Comparison,
    Effect,
    Geometry,
    OutputScore,
    SetMember,
    TextSet,
    Vector,
)
from discovery.settings import (
    AlignConfig,
    CaptureConfig,
    CausalConfig,
    ContrastConfig,
    OutputConfig,
    Texts,
)
from saes.errors import UserError
from saes.files import write_text
from saes.subject import Subject


def capture(out: Path, subject: Subject, texts: Texts, config: CaptureConfig, seed: int) -> None:
    """Pooled residuals and latents of all texts, and what was read."""
    read = read_texts(subject.lm, subject.dictionaries, texts, config, seed)
    captured.save(out, read)
    records.write(out / "sets.parquet", TextSet, counted(texts.sets, read.texts))


def contrast(out: Path, run: Path, texts: Texts, config: ContrastConfig, seed: int) -> None:
    """Contrastive vectors at every captured view, their reliability and their geometry."""
    read = captured.load(run / "capture", controls=False)
    own, neutral = (pick(read.texts, name, texts.names) for name in ("selection", "neutral"))
    norms = human_norms(texts.concepts)
    arrays: dict[str, np.ndarray] = {}
    vectors: list[Vector] = []
    geometry: list[Geometry] = []
    for name, residuals in read.residuals.items():
        stories = residuals[own.rows]
        result = contrastive_vectors(
            stories, own.labels, residuals[neutral.rows], config.neutral_variance
        )
        reliability = split_half(
            stories, own.labels, result.neutral, halves=config.halves, seed=seed
        )
        anchors = [norm.values for norm in norms[:2]]
        components = principal_components(result.vectors, anchors)
        arrays |= {f"vectors/{name}": result.vectors, f"neutral/{name}": result.neutral}
        norm = read.norms[site_of(name)]
        vectors += vector_rows(name, texts.names, result.vectors, norm, reliability, components)
        geometry += geometry_rows(name, components, norms)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, out / "vectors.safetensors")
    records.write(out / "vectors.parquet", Vector, vectors)
    records.write(out / "geometry.parquet", Geometry, geometry)


def align(
    out: Path, run: Path, texts: Texts, config: AlignConfig, contrast: ContrastConfig, seed: int
) -> None:
    """Verdicts, the methods beside them, and the whole procedure under shuffled labels."""
    found = evaluate(captured.load(run / "capture"), texts, config, contrast, seed)
    for kind, record in KINDS.items():
        if kind not in ("outputs", "sets"):
            records.write(out / f"{kind}.parquet", record, getattr(found, kind))


def chosen_view(alignments: Sequence[Alignment]) -> tuple[str, str]:
    """The site that the selection chose, and its view there."""
    return alignments[0].site, view(alignments[0].site, alignments[0].pooling)


def held_out(rows: Sequence[TextRow]) -> str:
    """The set whose vectors features are compared with: of one corpus only, that corpus."""
    return "confirmation" if any(row.set == "confirmation" for row in rows) else "selection"


def output(
    out: Path, run: Path, subject: Subject, texts: Texts, config: OutputConfig, seed: int
) -> None:
    """Output-side scores of the best candidates of each concept."""
    candidates = records.read(run / "align" / "candidates.parquet", Candidate)
    alignments = records.read(run / "align" / "alignments.parquet", Alignment)
    site, chosen = chosen_view(alignments)
    density = captured.firing(captured.load(run / "capture", controls=False), chosen)
    dictionary = subject.dictionary(site)
    rows = raise_candidates(subject.lm, dictionary, candidates, density, texts, config, seed)
    records.write(out / "outputs.parquet", OutputScore, rows)


def compare(
    out: Path, run: Path, subject: Subject, texts: Texts, config: ContrastConfig, seed: int
) -> None:
    """Feature directions against contrastive vectors of the confirmation set.

    Features were chosen on the selection set: vectors of the same texts would share its noise.
    """
    alignments = records.read(run / "align" / "alignments.parquet", Alignment)
    members = records.read(run / "align" / "members.parquet", SetMember)
    site, chosen = chosen_view(alignments)
    read = captured.load(run / "capture", controls=False)
    own = pick(read.texts, held_out(read.texts), texts.names)
    neutral = load_file(run / "contrast" / "vectors.safetensors")[f"neutral/{chosen}"]
    stories = read.residuals[chosen][own.rows]
    vectors = project_out(differences(stories, own.labels), neutral)
    reliability = split_half(stories, own.labels, neutral, halves=config.halves, seed=seed)
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
    site, chosen_at = chosen_view(alignments)
    read = captured.load(run / "capture", controls=False)
    vectors = load_file(run / "contrast" / "vectors.safetensors")[f"vectors/{chosen_at}"]
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
    density = captured.firing(read, chosen_at)
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

"""Discovery as one call: which latents stand for which concepts, and how sure are we?

    from discovery.discover import discover

    found = discover("packaged/demo_lm", "packaged/demo_saes/blocks.5.hook_resid_post")
    print(found.summary())
    found.alignment("sad").verdict

`discovery.evaluate` is the part without the model. Torch is imported when it is needed.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Float

from discovery.captured import Captured, TextRow, firing, view
from discovery.corpora.source import Source
from discovery.evaluate import Discovery, check_texts, evaluate
from discovery.records import Candidate, OutputScore, TextSet
from discovery.settings import (
    AlignConfig,
    CaptureConfig,
    ConceptsConfig,
    ContrastConfig,
    OutputConfig,
    Texts,
    open_texts,
)
from saes.config import load
from saes.errors import UserError

_Corpus = Source | str | Path | Mapping[str, object]

if TYPE_CHECKING:
    from saes.latents import Dictionary
    from saes.lm.model import LM


def discover(
    model: "LM | str",
    dictionary: "Dictionary | str | Sequence[Dictionary | str]",
    corpora: "Sequence[_Corpus] | _Corpus" = "packaged",
    concepts: ConceptsConfig | Sequence[str] | str = "emotions171",
    *,
    capture: CaptureConfig | None = None,
    contrast: ContrastConfig | None = None,
    align: AlignConfig | None = None,
    output: OutputConfig | None = None,
    seed: int = 0,
) -> Discovery:
    """Find the latents of a model's SAEs that stand for concepts, with evidence held out.

    Runs the protocol of docs/statistics.md: everything is chosen on the selection texts and
    confirmed, once, on the confirmation texts; baselines, controls and a run on shuffled labels
    stand beside the verdicts. Nothing is written; a progress bar goes to standard error.

    Args:
        model: a loaded model, or what `saes.lm.model.load_lm` loads: a hub name, a folder, or
            packaged/NAME.
        dictionary: one SAE a site, loaded or by name (`saes.pretrained.load_checked`).
        corpora: sources of texts with their roles, as `Source` or as the mapping that a config has
            (docs/corpora.md); a name alone has every role, as `packaged`.
        concepts: a concept set by name or YAML file, names of the 171, or both in a
            `ConceptsConfig`.
        capture: of the pass over the texts; None, as for the others, is the default.
        contrast: of the vectors that say which concepts are near.
        align: of the protocol.
        output: of the output-side scores.
        seed: of splits, shuffles, random latents and bootstraps.

    Raises:
        UserError: a model, SAE, text or setting that does not fit; the message says what to do.
    """
    from saes.lm.model import LM, load_lm
    from saes.pretrained import load_checked

    named = dictionary if isinstance(dictionary, Sequence) else [dictionary]
    named = [named] if isinstance(named, str) else cast("Sequence[Dictionary | str]", named)
    if not named:
        raise UserError("there is no SAE to read with; name at least one SAE")
    texts = open_texts(_sources(corpora), _concepts(concepts), seed)
    check_texts(texts)
    lm = model if isinstance(model, LM) else load_lm(model)
    loaded = [load_checked(d, lm).dictionary if isinstance(d, str) else d for d in named]
    capture, align = capture or CaptureConfig(), align or AlignConfig()
    contrast, output = contrast or ContrastConfig(), output or OutputConfig()
    check_fit(lm, loaded, texts, capture, contrast, align, output, seed)
    read = read_texts(lm, loaded, texts, capture, seed)
    found = evaluate(read, texts, align, contrast, seed)
    chosen = found.alignments[0]
    (own,) = (d for d in loaded if d.site == chosen.site)
    density = firing(read, view(chosen.site, chosen.pooling))
    outputs = raise_candidates(lm, own, found.candidates, density, texts, output, seed)
    return replace(found, outputs=outputs, sets=counted(texts.sets, read.texts))


def _sources(corpora: Sequence[_Corpus] | _Corpus) -> tuple[Source, ...]:
    each = [corpora] if isinstance(corpora, str | Path | Source | Mapping) else corpora
    return tuple(_source(one, f"corpora[{i}]") for i, one in enumerate(each))


def _source(one: _Corpus, where: str) -> Source:
    if isinstance(one, Source):
        return one
    return load(Source, one if isinstance(one, Mapping) else {"source": str(one)}, where)


def _concepts(concepts: ConceptsConfig | Sequence[str] | str) -> ConceptsConfig:
    if isinstance(concepts, ConceptsConfig):
        return concepts
    if isinstance(concepts, str):
        return ConceptsConfig(set=concepts)
    return ConceptsConfig(names=tuple(concepts))


def check_fit(
    lm: "LM",
    dictionaries: "Sequence[Dictionary]",
    texts: Texts,
    capture: CaptureConfig,
    contrast: ContrastConfig,
    align: AlignConfig,
    output: OutputConfig,
    seed: int,
) -> None:
    """Refuse now what would be refused after the texts have been read.

    Raises:
        UserError: too few texts of a concept, too few shuffles for align.q, a site that the model
            lacks, two SAEs at one, a set of more latents than there are, candidates to raise that
            are not kept, neutral texts without variance or prompts, a text that a pooling cannot
            take, a tokenizer without character offsets, or weights that the controls cannot draw
            anew.
    """
    from discovery.controls import check_weights
    from discovery.windows import check_poolings

    check_texts(texts)
    if contrast.neutral_variance and len(texts.corpus.neutral) < 2:
        raise UserError(
            f"the variance of neutral texts is to be removed, and there are "
            f"{len(texts.corpus.neutral)}; give at least 2, or set contrast.neutral_variance to 0"
        )
    if not texts.corpus.confirmation and align.shuffles < (least := math.ceil(2 / align.q)):
        raise UserError(
            f"align.shuffles is {align.shuffles}, but an align.q of {align.q} takes at least "
            f"{least} with one corpus; raise it"
        )
    if not lm.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {lm.name} gives no character offsets; add a tokenizer.json"
        )
    for site in capture.sites:
        lm.site(site)
    sites = Counter(dictionary.site for dictionary in dictionaries)
    if len(sites) < len(dictionaries):
        site, n = sites.most_common(1)[0]
        raise UserError(f"{n} SAEs read {site}; take one SAE a site")
    for dictionary in dictionaries:
        if align.k > dictionary.d_sae:
            raise UserError(
                f"align.k is {align.k}, more than the {dictionary.d_sae} latents of the SAE at "
                f"{dictionary.site}; lower it"
            )
    if output.candidates > align.candidates:
        raise UserError(
            f"output.candidates is {output.candidates}, more than align.candidates, the "
            f"{align.candidates} that are kept; lower the one or raise the other"
        )
    output_prompts(lm, texts, output, seed)
    if capture.controls:
        check_weights(lm)
    check_poolings(lm, texts.corpus.texts(), capture.poolings, capture.long)


def read_texts(
    lm: "LM", dictionaries: "Sequence[Dictionary]", texts: Texts, config: CaptureConfig, seed: int
) -> Captured:
    """Pooled residuals and latents of all texts, and of the controls that run a model."""
    from tqdm import tqdm

    from discovery.controls import (
        UNTRAINED,
        Untrained,
        capture_controls,
        passes,
        untrained_extra,
    )
    from discovery.pooling import capture_texts

    everything = texts.corpus.texts()
    extra: Mapping[str, Sequence[Untrained]] = {}
    if config.controls:
        extra = untrained_extra(
            lm, dictionaries, everything, seed=seed, batch_tokens=config.batch_tokens
        )
    with tqdm(total=len(everything), desc="capture", unit="text", file=sys.stderr) as bar:
        read = capture_texts(
            lm,
            dictionaries,
            everything,
            sites=config.sites,
            poolings=config.poolings,
            long=config.long,
            batch_tokens=config.batch_tokens,
            progress=bar.update,
            extra=extra,
        )
    if not config.controls:
        return read
    total = passes(everything, read)
    with tqdm(total=total, desc="randomised model", unit="text", file=sys.stderr) as bar:
        return capture_controls(
            lm,
            dictionaries,
            everything,
            read,
            beside=extra[UNTRAINED],
            seed=seed,
            poolings=config.poolings,
            long=config.long,
            batch_tokens=config.batch_tokens,
            progress=bar.update,
        )


def counted(sets: Sequence[TextSet], rows: Sequence[TextRow]) -> list[TextSet]:
    """The sets with how many of their texts were longer than the context."""

    def key(row: TextSet | TextRow) -> tuple[str, str, str]:
        return row.set, row.source, row.language

    cut = Counter(key(row) for row in rows if row.truncated)
    chunked = Counter(key(row) for row in rows if row.chunks > 1)
    return [replace(own, cut=cut[key(own)], chunked=chunked[key(own)]) for own in sets]


def output_prompts(lm: "LM", texts: Texts, config: OutputConfig, seed: int) -> list[str]:
    """Openings of neutral texts, at whose ends latents are raised."""
    from discovery.causal import neutral_prompts

    return neutral_prompts(
        texts.corpus.neutral, lm.tokenizer, config.prompts, config.prompt_tokens, seed
    )


def raise_candidates(
    lm: "LM",
    dictionary: "Dictionary",
    candidates: Sequence[Candidate],
    density: Float[np.ndarray, " d_sae"],
    texts: Texts,
    config: OutputConfig,
    seed: int,
) -> list[OutputScore]:
    """Output-side scores of the best candidates of each concept, beside random latents.

    Args:
        density: share of the texts in which each latent fires; random ones fire about as often as
            the candidates. Of a narrow SAE there may be fewer of them than asked for.
    """
    from tqdm import tqdm

    from discovery.causal import control_latents
    from discovery.output_score import output_scores, passes

    some = [row for row in candidates if row.rank <= config.candidates]
    latents = {row.latent for row in some}
    free = np.count_nonzero(density) - np.count_nonzero(density[list(latents)])
    n = min(config.controls, int(free))
    controls = control_latents(density, [row.latent for row in some], n, seed) if n else []
    prompts = output_prompts(lm, texts, config, seed)
    total = passes(some, controls, prompts)
    with tqdm(total=total, desc="output", unit="latent", file=sys.stderr) as bar:
        return output_scores(
            lm, dictionary, some, texts.concepts, prompts, controls=controls, progress=bar.update
        )

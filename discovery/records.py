"""Typed rows of every result, and their parquet schema. No torch.

Each stage writes lists of these records; the catalog, the report and notebooks read them back as
the same types. The schema is derived from the dataclass, so a file that does not fit is refused.
"""

import types
import typing
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from saes.errors import UserError

Verdict = Literal["found", "found as a set", "found for the family", "lexical only", "not found"]
VERDICTS: tuple[Verdict, ...] = typing.get_args(Verdict)


@dataclass(frozen=True)
class Alignment:
    """The verdict on one concept and the figures behind it (protocol steps in `discovery.align`).

    AUROCs are within topics. `auroc_selection` and `set_auroc_selection` are cross-fitted over
    units on the selection set; `auroc` and `set_auroc` are on the confirmation set, with a 95 %
    interval.
    The lexical figures are None where no lexical control was run.
    """

    concept: str
    family: str
    verdict: str
    also_lexical: bool
    site: str
    pooling: str
    latent: int
    firing: float  # share of confirmation texts in which the latent is non-zero
    auroc_selection: float
    auroc: float
    auroc_low: float
    auroc_high: float
    p: float
    q: float
    specific_auroc: float  # among the concept and its five nearest concepts
    specific_p: float
    specific_q: float | None  # None where step 5 did not reject
    set_auroc_selection: float
    set_auroc: float
    set_auroc_low: float
    set_auroc_high: float
    set_p: float
    set_q: float
    set_specific_auroc: float
    set_specific_p: float
    set_specific_q: float | None
    nearest: tuple[str, ...]
    positives: int  # confirmation texts of the concept
    auroc_pooled: float  # all confirmation texts together, topics ignored
    delong_low: float  # 95 % interval of `auroc` by DeLong, within topics
    delong_high: float
    bootstrap_low: float  # 95 % interval by the bootstrap over units
    bootstrap_high: float
    family_auroc: float | None  # among the other confirmation texts of its family
    neutral_auroc: float | None  # against neutral texts
    set_auroc_pooled: float
    set_delong_low: float
    set_delong_high: float
    set_bootstrap_low: float
    set_bootstrap_high: float
    set_family_auroc: float | None
    set_neutral_auroc: float | None
    reverse_latent: int | None  # step 13: chosen on the confirmation set; None where it was not run
    reverse_auroc: float | None  # and tested on the selection set
    reverse_q: float | None
    reverse_set_auroc: float | None
    reverse_set_q: float | None
    lexical_latent: int | None
    lexical_auroc: float | None
    lexical_p: float | None
    lexical_q: float | None
    latent_lexical_p: (
        float | None
    )  # the latent itself on the test half of the lexical texts (`also_lexical`)
    detectable_auroc: float  # what the data would have shown with 80 % power (`align.detectable`)


@dataclass(frozen=True)
class SetMember:
    """One latent of a concept's set of k latents, with its discriminant weight."""

    concept: str
    site: str
    rank: int
    latent: int
    weight: float


@dataclass(frozen=True)
class Score:
    """AUROC of one method within topics, for one concept on one set, with a 95 % interval.

    Of random latents low and high are the range over the latents.

    `method`: latent, set, vector, probe, embedding, tfidf; and as controls random (latents of the
    chosen one's density), untrained and untrained set (an SAE of random weights), randomised and
    randomised set (a model of random weights). `set`: selection (cross-fitted over units),
    confirmation (trained or chosen on the selection set), situations (no topics: pooled).
    """

    concept: str
    method: str
    set: str
    auroc: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """AUROC of the latent or the set less that of a baseline on the confirmation set, paired.

    Intervals are over topics, or DeLong's where topics are few. `concept` is empty for the mean
    over concepts.
    """

    concept: str
    ours: str
    baseline: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Control:
    """Verdict counts of the whole procedure under true labels, or shuffled within topic."""

    labels: str
    found: int
    found_as_a_set: int
    found_for_the_family: int
    lexical_only: int
    not_found: int
    rejected: int  # of the 2 x concepts tests of step 5


@dataclass(frozen=True)
class Sae:
    """An SAE of the run: where it is from, and how it did on the model when it was loaded."""

    site: str
    latents: int
    source: str  # as given in the config; no path of a machine
    format: str
    neuronpedia: str | None  # its id there: MODEL/SAE
    variance_explained: float  # of the residuals of the check texts
    l0: float


@dataclass(frozen=True)
class SiteChoice:
    """Mean cross-fitted AUROCs on the selection set at a view (a site and a pooling).

    The best figure of sets chooses the view.
    """

    site: str
    pooling: str
    latent_auroc_selection: float
    set_auroc_selection: float
    chosen: bool


@dataclass(frozen=True)
class Candidate:
    """One of the best latents of a concept on the selection set, with every measure of the pair.

    `p` and `q` are over all latents and concepts of the selection set, which chose the latent: they
    rank, and prove nothing.
    """

    concept: str
    site: str
    rank: int  # 1 is the best
    latent: int
    auroc: float  # within topics
    auroc_pooled: float
    se: float  # of `auroc`, Hanley and McNeil
    mean_difference: float  # of pooled activations, positives less others
    cohens_d: float
    firing_ratio: float  # share of positives in which it fires over that of the others
    mutual_information: float  # bits, between firing and label
    p: float  # Mann-Whitney, within topics
    q: float  # Benjamini-Hochberg over all pairs
    confirmation_auroc: float


@dataclass(frozen=True)
class OutputScore:
    """What raising a candidate latent does to the words of its concept (after Arad et al. 2025)."""

    concept: str
    site: str
    latent: int
    rank: int  # of the candidate on the input side, 1 is the best
    input_auroc: float  # on the selection set
    output_score: float  # of Arad et al.: do its own promoted tokens rise when it is raised?
    word_score: float  # nats: rise of the concept's words over that of the other concepts' words
    word_rank: int  # of the concept among all concepts by that rise, 1 is the best
    word_p: float | None = None  # share of random latents, itself counted in, that reach word_score


@dataclass(frozen=True)
class Cross:
    """AUROC of the latent that was chosen for `concept`, for the texts of `other`."""

    concept: str
    other: str
    auroc: float  # within topics, on the confirmation set


@dataclass(frozen=True)
class CurvePoint:
    """Mean over concepts of the AUROC of sets of k latents; step 13: no verdict rests on it."""

    k: int
    set: str  # selection (cross-fitted over units), confirmation
    auroc: float
    low: float  # 95 % interval
    high: float


@dataclass(frozen=True)
class Depth:
    """Mean AUROC over concepts of one method at one view (a site and a pooling)."""

    site: str
    pooling: str
    method: str  # latent, set, vector, probe
    set: str  # selection, confirmation
    auroc: float
    low: float
    high: float


@dataclass(frozen=True)
class TextSet:
    """What one source gave to one set, and what was left out and why.

    `read` is the sum of `texts` and of all that was left out. Rows of a source that is split are
    counted with the selection set until they are split.
    """

    set: str
    source: str
    language: str
    texts: int
    concepts: int
    topics: int
    units: int
    read: int  # rows before anything was left out
    unlabelled: int  # left out: no label that the mapping knows as a concept of the run
    duplicates: int  # left out: near-duplicates of another text
    leaks: int  # kept: texts that name their concept
    cut: int  # kept: texts longer than the context, cut
    chunked: int  # kept: texts longer than the context, read in several windows
    unreadable: int = 0  # left out: rows without the columns or without text
    beyond_limit: int = 0  # left out: the source's limit


@dataclass(frozen=True)
class Vector:
    """A concept's contrastive vector at a site: its reliability and its place in the PCA plane."""

    concept: str
    site: str
    pooling: str
    norm: float  # as a fraction of the mean residual norm at the site
    reliability: float  # Spearman-Brown corrected split-half cosine; NaN of texts of one unit
    ceiling: float  # sqrt(reliability): the largest cosine that can be expected with anything
    pc1: float
    pc2: float


@dataclass(frozen=True)
class Geometry:
    """Pearson r between a principal component of the concept vectors and a human norm."""

    site: str
    pooling: str
    norm: str  # valence, arousal, dominance
    source: str  # glasgow, vader
    component: int  # 1 or 2
    r: float
    low: float
    high: float
    n: int
    variance: float  # share of variance of the component


@dataclass(frozen=True)
class Comparison:
    """Cosine of a concept's feature direction with its contrastive vector, and its null."""

    concept: str
    site: str
    latent: int
    cosine: float
    percentile: float  # of `cosine` among the cosines of all decoder rows with the same vector
    null_mean: float
    null_low: float  # 2.5 % and 97.5 % quantiles over all decoder rows
    null_high: float
    set_cosine: float  # of the set's weighted decoder direction
    nearest_latent: int  # decoder row with the largest cosine
    nearest_cosine: float
    ceiling: float


@dataclass(frozen=True)
class Effect:
    """What one intervention at one dose did to a concept's words, averaged over neutral prompts."""

    concept: str
    verdict: str
    condition: str  # feature, vector, random
    site: str
    latent: int  # -1 where no single latent is meant
    dose: float  # norm of the edit as a fraction of the mean residual norm
    delta_logprob: float  # nats, mean over prompts and the concept's words
    low: float  # 95 % t interval over prompts; for random, the range over the control latents
    high: float
    kl: float  # nats, clean to edited next-token distribution
    n: int  # prompts (feature, vector), or control latents (random)


@dataclass(frozen=True)
class Label:
    """The name of a feature, how sure it is, and why."""

    site: str
    latent: int
    name: str
    confidence: float  # 0 to 1
    level: str  # high, medium, low, none
    reason: str
    concepts: tuple[str, ...]  # concepts for which the latent is the best single one
    density: float  # share of the labelled texts in which it fires


@dataclass(frozen=True)
class PromotedToken:
    """A token that the feature's decoder row raises (+) or lowers (-) most, by logit lens."""

    site: str
    latent: int
    sign: int
    rank: int
    token: str
    logit: float


@dataclass(frozen=True)
class Context:
    """A text in which the feature fires most, with its activation at every token."""

    site: str
    latent: int
    rank: int
    text_id: str
    set: str
    concepts: tuple[str, ...]
    topic: str
    peak: float
    tokens: tuple[str, ...]
    activations: tuple[float, ...]


Record = TypeVar("Record")

_SCALARS = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_field(name: str, kind: Any) -> Any:
    nullable = False
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = [a for a in typing.get_args(kind) if a is not type(None)]
        nullable = True
    if typing.get_origin(kind) is tuple:
        return pa.field(name, pa.list_(_SCALARS[typing.get_args(kind)[0]]), nullable)
    return pa.field(name, _SCALARS[kind], nullable)


def schema(record: type) -> pa.Schema:
    """The parquet schema of a record type."""
    hints = typing.get_type_hints(record)
    return pa.schema([_arrow_field(f.name, hints[f.name]) for f in fields(record)])


def write(path: Path, record: type[Record], rows: Iterable[Record]) -> None:
    """Write `rows` of one record type to a parquet file; the same rows give the same bytes."""
    columns = list(zip(*(astuple(typing.cast(Any, r)) for r in rows), strict=True))
    kind = schema(record)
    arrays: list[Any] = [
        pa.array(list(columns[i]) if columns else [], type=t) for i, t in enumerate(kind.types)
    ]
    table = pa.Table.from_arrays(arrays, schema=kind)
    pq.write_table(table, path, compression="zstd")  # pyright: ignore[reportUnknownMemberType]


def read(path: Path, record: type[Record]) -> list[Record]:
    """Read the rows back.

    Raises:
        UserError: the file is missing, damaged, or has other columns than `record`.
    """
    try:
        table = pq.read_table(path)  # pyright: ignore[reportUnknownMemberType]
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from None
    kind = schema(record)
    if table.schema.names != kind.names:
        raise UserError(
            f"{path} holds columns {table.schema.names}, expected those of "
            f"{record.__name__}: {kind.names}; delete its stage folder to make it anew"
        )
    lists = {name for name, t in zip(kind.names, kind.types, strict=True) if pa.types.is_list(t)}
    return [
        record(**{k: tuple(v) if k in lists else v for k, v in row.items()})
        for row in table.to_pylist()
    ]

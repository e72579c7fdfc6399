"""All results of a run as typed rows, read from the files of its stages. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from discovery import records
from discovery.concepts import Concept
from discovery.records import (
    Alignment,
    Candidate,
    Comparison,
    Context,
    Control,
    Cross,
    CurvePoint,
    Depth,
    Difference,
    Effect,
    Geometry,
    Label,
    OutputScore,
    PromotedToken,
    Sae,
    Score,
    SetMember,
    SiteChoice,
    TextSet,
    Vector,
)

RECORDS: dict[str, tuple[str, type]] = {
    "sets": ("capture", TextSet),
    "vectors": ("contrast", Vector),
    "geometry": ("contrast", Geometry),
    "alignments": ("align", Alignment),
    "members": ("align", SetMember),
    "site_choices": ("align", SiteChoice),
    "controls": ("align", Control),
    "scores": ("align", Score),
    "differences": ("align", Difference),
    "candidates": ("align", Candidate),
    "cross": ("align", Cross),
    "curve": ("align", CurvePoint),
    "depth": ("align", Depth),
    "outputs": ("output", OutputScore),
    "comparisons": ("compare", Comparison),
    "effects": ("causal", Effect),
    "labels": ("label", Label),
    "promoted": ("label", PromotedToken),
    "contexts": ("label", Context),
    "saes": ("label", Sae),
}
"""Kind of result (its file is KIND.parquet): the stage that writes it, and its record type."""
DISCOVERY = ("capture", "contrast", "align", "output")  # the stages that `discover` runs


@dataclass(frozen=True)
class Results:
    """All that a run found; rows are kept in the order given, and what was not run is empty."""

    alignments: Sequence[Alignment]
    concepts: Sequence[Concept] = ()
    facts: Mapping[str, str] = field(default_factory=dict)  # in the order they are to be shown
    sets: Sequence[TextSet] = ()
    members: Sequence[SetMember] = ()
    scores: Sequence[Score] = ()
    differences: Sequence[Difference] = ()
    controls: Sequence[Control] = ()
    site_choices: Sequence[SiteChoice] = ()
    candidates: Sequence[Candidate] = ()
    cross: Sequence[Cross] = ()
    curve: Sequence[CurvePoint] = ()
    depth: Sequence[Depth] = ()
    outputs: Sequence[OutputScore] = ()
    vectors: Sequence[Vector] = ()
    geometry: Sequence[Geometry] = ()
    comparisons: Sequence[Comparison] = ()
    effects: Sequence[Effect] = ()
    labels: Sequence[Label] = ()
    promoted: Sequence[PromotedToken] = ()
    contexts: Sequence[Context] = ()
    saes: Sequence[Sae] = ()


def read_kind(run: Path, kind: str) -> list[Any]:
    """The rows of one kind of result of a run.

    Raises:
        UserError: the file is missing or does not fit.
    """
    stage, record = RECORDS[kind]
    return records.read(run / stage / f"{kind}.parquet", record)


def read_rows(
    run: Path, kinds: Iterable[str] = RECORDS, stages: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """By kind, the rows that are there: a stage without a folder was not run, and gives none.

    Args:
        kinds: kinds of results to read.
        stages: read these stages alone; all where empty.

    Raises:
        UserError: a stage was run, but a file of it is missing or does not fit.
    """
    rows: dict[str, list[Any]] = {}
    for kind in kinds:
        stage, _ = RECORDS[kind]
        wanted = stage in (stages or (stage,)) and (run / stage).is_dir()
        rows[kind] = read_kind(run, kind) if wanted else []
    return rows

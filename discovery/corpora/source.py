"""Where texts are from and what they are used for: what a config says of each source."""

from dataclasses import dataclass
from typing import Literal

SourceRole = Literal[
    "all",
    "selection",
    "confirmation",
    "split",
    "crossfit",
    "situations",
    "neutral",
    "lexical",
]


@dataclass(frozen=True)
class Source:
    """One source of texts, and what they are used for."""

    source: str
    """`packaged`, a folder of the same five files, a CSV, TSV, JSONL or Parquet file (also .gz;
    with `*` several), or a dataset of the hub."""
    role: SourceRole = "all"
    """What its texts are for. all: as the source says of each text (a folder of the five files, or
    a file with `set_column`); selection: to choose on; confirmation: to confirm on; split: halves,
    by group and writer, for these two; crossfit: the only corpus, chosen and judged by
    cross-fitting; situations: a further format; neutral: without feeling; lexical: the concept's
    word without the feeling."""
    mapping: str | None = None
    """How its labels become concepts: a shipped name or a YAML file. Without one, labels are the
    names of concepts."""
    text_column: str | None = None
    """Where it is not as the mapping says; without a mapping, `text`."""
    label_column: str | None = None
    """Where it is not as the mapping says; without a mapping, `label`."""
    group_column: str | None = None
    """The topic, conversation or document of a text: texts are compared within it, and it is never
    split."""
    writer_column: str | None = None
    """Who wrote a text; the texts of a writer are never split."""
    id_column: str | None = None
    """A name of the text that no other text of the source has; without one, its line."""
    set_column: str | None = None
    """The role of each text (selection, confirmation, ...), with `role: all`."""
    span_columns: tuple[str, ...] = ()
    """Two columns: the first character that the label is about, and the one after the last."""
    language: str | None = None
    """Code of the language, as `de`, where it is not as the mapping says."""
    hub_config: str | None = None
    """Configuration of a hub dataset."""
    hub_split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    limit: int | None = None
    """At most so many texts: whole groups, drawn by the hash of their names."""
    near_duplicates: float = 0.8
    """A text of this source is left out where its overlap (Jaccard, of runs of five characters)
    with a text of another role is at least this; 1 leaves out equal texts only."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("source is empty; name packaged, a file, a folder or a hub dataset")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        if not 0.6 <= self.near_duplicates <= 1:  # below, too many pairs would be missed
            raise ValueError(f"near_duplicates must be in [0.6, 1], not {self.near_duplicates}")
        if self.span_columns and len(self.span_columns) != 2:
            raise ValueError(f"span_columns must be two, first and last: {self.span_columns}")
        if self.set_column is not None and self.role != "all":
            raise ValueError(
                f"set_column gives texts their roles; with it role is all: {self.role}"
            )

"""The catalog of a run: one SQLite file with every result and a search index. No torch.

Each record type of `discovery.records` is a table with the columns of its fields; tuples are JSON.
Contexts are split into the text (tokens once) and, for each feature, its activations as float16
shares of the peak. The same records give the same bytes.
"""

import functools
import json
import math
import re
import sqlite3
import struct
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from discovery.concepts import Concept
from discovery.records import (
    VERDICTS,
    Alignment,
    Candidate,
    Comparison,
    Context,
    Control,
    Cross,
    Difference,
    Effect,
    Label,
    OutputScore,
    PromotedToken,
    Sae,
    Score,
    SetMember,
    TextSet,
    Vector,
)
from labeling.results import RECORDS, Results
from saes.errors import UserError

APPLICATION = 0x454D4154  # "EMAT", in the file's header
VERSION = 3  # of the tables below
FILE = "catalog/catalog.sqlite"  # inside a run folder

Record = TypeVar("Record")


class ConceptRow(NamedTuple):
    """A line of the concept list: the concept, its verdict, its best single latent's label."""

    concept: Concept
    alignment: Alignment
    label: Label | None


class ConceptPage(NamedTuple):
    """Everything about one concept."""

    row: ConceptRow
    nearest: list[ConceptRow]
    members: list[tuple[SetMember, Label | None, list[str]]]  # with the tokens each raises most
    candidates: list[tuple[Candidate, Label | None, OutputScore | None]]
    cross: list[tuple[Cross, ConceptRow]]  # other concepts that its latent recognises best
    scores: list[Score]
    differences: list[Difference]
    vectors: list[Vector]
    comparisons: list[Comparison]
    effects: list[Effect]


class FeaturePage(NamedTuple):
    """Everything about one feature."""

    label: Label
    raised: list[PromotedToken]
    lowered: list[PromotedToken]
    contexts: list[Context]
    concepts: list[ConceptRow]  # for which it is the best single latent
    sets: list[tuple[SetMember, ConceptRow]]  # of which it is a member
    words: list[ConceptRow]  # on whose bare word it fires, confirmed
    comparisons: list[Comparison]
    effects: list[Effect]  # of every condition, for the concepts it was clamped for
    sae: Sae | None


class Hit(NamedTuple):
    """A search result; `key` is a concept's slug or "site/latent"."""

    kind: str  # concept, feature
    key: str
    title: str
    detail: str


# ---- layout ------------------------------------------------------------------------------------


def _name(record: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", record.__name__).lower()


class Column(NamedTuple):
    """A field of a record as it is stored."""

    name: str
    kind: type  # str, int, float, bool or tuple
    optional: bool  # may be None


@functools.cache
def _columns(record: type) -> tuple[Column, ...]:
    columns: list[Column] = []
    for name, hint in typing.get_type_hints(record).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = [option for option in options if option is not types.NoneType]
        columns.append(Column(name, typing.get_origin(kind) or kind, types.NoneType in options))
    return tuple(columns)


_SQL = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL", tuple: "TEXT"}
_INDICES = (("concept",), ("site", "latent"))


def _put(db: sqlite3.Connection, record: type, rows: Iterable[Any]) -> None:
    """Create the table of a record type and fill it."""
    columns, table = _columns(record), _name(record)
    layout = ", ".join(f'"{column.name}" {_SQL[column.kind]}' for column in columns)
    db.execute(f'CREATE TABLE "{table}" ({layout}) STRICT')
    db.executemany(
        f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(columns))})',
        ([_store(column, getattr(row, column.name)) for column in columns] for row in rows),
    )
    for names in _INDICES:
        if {*names} <= {column.name for column in columns}:
            db.execute(f'CREATE INDEX {table}_{names[-1]} ON "{table}" ({", ".join(names)})')


def _store(column: Column, value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if column.kind is tuple else value


def _restore(column: Column, stored: Any) -> Any:
    if column.kind is tuple:
        return tuple(json.loads(stored))
    if column.kind is bool:
        return bool(stored)
    if stored is None and not column.optional:
        return math.nan  # SQLite stores nan as NULL
    return stored


def _put_contexts(db: sqlite3.Connection, contexts: Iterable[Context]) -> None:
    db.execute('CREATE TABLE text (id TEXT PRIMARY KEY, "set", concepts, topic, tokens TEXT)')
    db.execute("CREATE TABLE context (site, latent, rank, text_id, peak REAL, shares BLOB)")
    db.execute("CREATE INDEX context_latent ON context (site, latent)")
    for c in contexts:
        tokens, concepts = (json.dumps(x, ensure_ascii=False) for x in (c.tokens, c.concepts))
        text = (c.text_id, c.set, concepts, c.topic, tokens)
        db.execute("INSERT OR IGNORE INTO text VALUES (?, ?, ?, ?, ?)", text)
        shares = struct.pack(f"<{len(c.activations)}e", *(a / (c.peak or 1) for a in c.activations))
        row = (c.site, c.latent, c.rank, c.text_id, c.peak, shares)
        db.execute("INSERT INTO context VALUES (?, ?, ?, ?, ?, ?)", row)


def _put_search(db: sqlite3.Connection, results: Results) -> None:
    db.execute(
        "CREATE VIRTUAL TABLE search USING fts5(kind UNINDEXED, key UNINDEXED, detail UNINDEXED,"
        " title, body, tokenize = 'unicode61 remove_diacritics 2')"
    )
    verdicts = {a.concept: a.verdict for a in results.alignments}
    tokens: dict[tuple[str, int], list[str]] = {}
    for p in results.promoted:
        if p.sign > 0 and p.token.strip():
            tokens.setdefault((p.site, p.latent), []).append(p.token.strip())
    rows = [
        ("concept", c.slug, verdicts[c.name], c.name, " ".join((c.family, *c.inflections)))
        for c in results.concepts
    ]
    for f in results.labels:
        raised = tokens.get((f.site, f.latent), [])
        body = " ".join((*raised, *f.concepts, str(f.latent)))
        detail = f"confidence {f.level}; raises {', '.join(raised[:5]) or 'nothing shown'}"
        rows.append(("feature", f"{f.site}/{f.latent}", detail, f.name, body))
    db.executemany("INSERT INTO search VALUES (?, ?, ?, ?, ?)", rows)
    db.execute("INSERT INTO search (search) VALUES ('optimize')")


def build(path: Path, results: Results) -> None:
    """Write the catalog to `path`, whole or not at all; equal results give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    db = sqlite3.connect(temporary, isolation_level=None)
    try:
        db.execute("PRAGMA page_size = 4096")
        db.execute("PRAGMA journal_mode = OFF")
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("BEGIN")
        db.execute("CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT) STRICT")
        db.executemany("INSERT INTO fact VALUES (?, ?)", results.facts.items())
        for record, rows in _records(results):
            _put(db, record, rows)
        _put_contexts(db, results.contexts)
        _put_search(db, results)
        db.execute("COMMIT")
        db.execute("VACUUM")
        db.close()
        temporary.replace(path)
    finally:
        db.close()
        temporary.unlink(missing_ok=True)


def _records(results: Results) -> list[tuple[type, Sequence[Any]]]:
    """The tables of record types; contexts are kept otherwise."""
    kinds = ((record, getattr(results, kind)) for kind, (_, record) in RECORDS.items())
    return [(Concept, results.concepts), *(pair for pair in kinds if pair[0] is not Context)]


# ---- reading -----------------------------------------------------------------------------------

SORTS: dict[str, Callable[[ConceptRow], Any]] = {
    "name": lambda r: r.concept.name,
    "family": lambda r: r.concept.family,
    "verdict": lambda r: (
        VERDICTS.index(typing.cast(Any, r.alignment.verdict)),
        -max(r.alignment.auroc, r.alignment.set_auroc),
    ),
    "auroc": lambda r: -r.alignment.auroc,
    "set": lambda r: -r.alignment.set_auroc,
    "q": lambda r: min(r.alignment.q, r.alignment.set_q),
}


class Catalog:
    """A catalog opened for reading. All methods are fast enough to be called for each page."""

    def __init__(self, path: Path) -> None:
        """Open and check the file.

        Raises:
            UserError: it is missing, damaged, no catalog, or of another version.
        """
        if not path.is_file():
            raise UserError(f"no catalog at {path}; run the stages of this run folder first")
        self.path = path
        self._db = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False
        )
        try:
            self._check()
        except BaseException:
            self._db.close()
            raise

    def _check(self) -> None:
        try:
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (health,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path} is damaged or no catalog ({error}); delete it and run again"
            ) from None
        if application != APPLICATION:
            raise UserError(f"{self.path} is an SQLite file but no Emotion Atlas catalog")
        if version != VERSION:
            raise UserError(
                f"{self.path} is a catalog of version {version}, this program reads {VERSION}; "
                "delete it and run again"
            )
        if health != "ok":
            raise UserError(f"{self.path} is damaged ({health}); delete it and run again")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _rows(self, record: type[Record], where: str = "1", *values: object) -> list[Record]:
        columns = _columns(record)
        sql = f'SELECT * FROM "{_name(record)}" WHERE {where} ORDER BY rowid'
        return [
            record(**{c.name: _restore(c, v) for c, v in zip(columns, row, strict=True)})
            for row in self._db.execute(sql, values)
        ]

    def facts(self) -> dict[str, str]:
        """The facts of the run, in the order they were given."""
        return dict(self._db.execute("SELECT name, value FROM fact ORDER BY rowid"))

    def controls(self) -> list[Control]:
        """Verdict counts under the true and the shuffled labels."""
        return self._rows(Control)

    def text_sets(self) -> list[TextSet]:
        """What each source gave to each set of texts."""
        return self._rows(TextSet)

    @functools.cached_property
    def _concepts(self) -> dict[str, ConceptRow]:
        alignments = {a.concept: a for a in self._rows(Alignment)}
        labels = {(f.site, f.latent): f for f in self._rows(Label)}
        rows: dict[str, ConceptRow] = {}
        for c in self._rows(Concept):
            a = alignments[c.name]
            rows[c.name] = ConceptRow(c, a, labels.get((a.site, a.latent)))
        return rows

    def verdict_counts(self) -> dict[str, int]:
        """Number of concepts with each verdict, the strongest verdict first."""
        counts = Counter(row.alignment.verdict for row in self._concepts.values())
        return {verdict: counts[verdict] for verdict in VERDICTS}

    def families(self) -> list[str]:
        """The families, sorted."""
        return sorted({row.concept.family for row in self._concepts.values()})

    def concepts(
        self,
        verdict: str = "",
        family: str = "",
        text: str = "",
        sort: str = "name",
        reverse: bool = False,
    ) -> list[ConceptRow]:
        """The concepts that fit every filter that is not empty.

        Args:
            text: part of a concept's name, family or inflection, or of its feature's name.
            sort: one of `SORTS`; the best first for figures, then by name.
        """
        wanted = text.strip().lower()

        def fits(row: ConceptRow) -> bool:
            words = (row.concept.name, row.concept.family, *row.concept.inflections)
            words = (*words, row.label.name) if row.label else words
            return (
                verdict in ("", row.alignment.verdict)
                and family in ("", row.concept.family)
                and any(wanted in word.lower() for word in words)
            )

        rows = sorted(filter(fits, self._concepts.values()), key=SORTS["name"])
        return sorted(rows, key=SORTS[sort], reverse=reverse)

    def concept(self, slug: str) -> ConceptPage | None:
        """All about the concept with this slug, None if there is none."""
        row = next((r for r in self._concepts.values() if r.concept.slug == slug), None)
        if row is None:
            return None
        name = row.concept.name
        return ConceptPage(
            row=row,
            nearest=[self._concepts[n] for n in row.alignment.nearest if n in self._concepts],
            members=[
                (m, self._label(m.site, m.latent), self._raised(m.site, m.latent, 4))
                for m in self._rows(SetMember, "concept = ?", name)
            ],
            candidates=self._candidates(name),
            cross=self._cross(name),
            scores=self._rows(Score, "concept = ?", name),
            differences=self._rows(Difference, "concept = ?", name),
            vectors=self._rows(Vector, "concept = ?", name),
            comparisons=self._rows(Comparison, "concept = ?", name),
            effects=self._rows(Effect, "concept = ?", name),
        )

    def _candidates(self, name: str) -> list[tuple[Candidate, Label | None, OutputScore | None]]:
        rows = self._rows(OutputScore, "concept = ?", name)
        raised = {(row.site, row.latent): row for row in rows}
        return [
            (c, self._label(c.site, c.latent), raised.get((c.site, c.latent)))
            for c in self._rows(Candidate, "concept = ?", name)
        ]

    def _cross(self, name: str, most: int = 8) -> list[tuple[Cross, ConceptRow]]:
        rows = self._rows(Cross, "concept = ? AND other != ? AND auroc IS NOT NULL", name, name)
        best = sorted(rows, key=lambda row: -row.auroc)[:most]
        return [(row, self._concepts[row.other]) for row in best if row.other in self._concepts]

    def _label(self, site: str, latent: int) -> Label | None:
        return next(iter(self._rows(Label, "site = ? AND latent = ?", site, latent)), None)

    def _raised(self, site: str, latent: int, n: int) -> list[str]:
        here = ("site = ? AND latent = ? AND sign > 0", site, latent)
        words = (p.token.strip() for p in self._rows(PromotedToken, *here))
        return [word for word in words if word][:n]

    def feature(self, site: str, latent: int) -> FeaturePage | None:
        """All about a feature, None if the catalog does not show it."""
        label = self._label(site, latent)
        if label is None:
            return None
        here = ("site = ? AND latent = ?", site, latent)
        tokens = self._rows(PromotedToken, *here)
        aligned = [r for r in self.concepts() if r.alignment.site == site]
        return FeaturePage(
            label=label,
            raised=[p for p in tokens if p.sign > 0],
            lowered=[p for p in tokens if p.sign < 0],
            contexts=self._contexts(site, latent),
            concepts=[r for r in aligned if r.alignment.latent == latent],
            sets=[(m, self._concepts[m.concept]) for m in self._rows(SetMember, *here)],
            words=[
                r
                for r in aligned
                if r.alignment.verdict == "lexical only" and r.alignment.lexical_latent == latent
            ],
            comparisons=self._rows(Comparison, *here),
            effects=self._rows(
                Effect,
                "concept IN (SELECT concept FROM effect WHERE site = ? AND latent = ?)",
                site,
                latent,
            ),
            sae=next(iter(self._rows(Sae, "site = ?", site)), None),
        )

    def _contexts(self, site: str, latent: int) -> list[Context]:
        sql = """
            SELECT rank, text_id, "set", concepts, topic, peak, tokens, shares
            FROM context JOIN text ON text.id = text_id
            WHERE site = ? AND latent = ? ORDER BY context.rowid"""
        contexts: list[Context] = []
        for row in self._db.execute(sql, (site, latent)):
            rank, text_id, kind, concepts, topic, peak, tokens, shares = row
            activations = [s * peak for s in struct.unpack(f"<{len(shares) // 2}e", shares)]
            contexts.append(
                Context(
                    site=site,
                    latent=latent,
                    rank=rank,
                    text_id=text_id,
                    set=kind,
                    concepts=tuple(json.loads(concepts)),
                    topic=topic,
                    peak=peak,
                    tokens=tuple(json.loads(tokens)),
                    activations=tuple(activations),
                )
            )
        return contexts

    def search(self, query: str, limit: int = 50) -> list[Hit]:
        """Concepts and features with every word of the query (as a prefix), titles first."""
        words = re.findall(r"\w+", query)
        if not words:
            return []
        sql = """
            SELECT kind, key, title, detail FROM search WHERE search MATCH ?
            ORDER BY bm25(search, 0, 0, 0, 10, 1), rowid LIMIT ?"""
        match = " ".join(f'"{word}"*' for word in words)
        return [Hit(*row) for row in self._db.execute(sql, (match, limit))]

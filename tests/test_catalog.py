"""The catalog gives back what was put in, byte for byte the same file, and says what is wrong."""

import math
import sqlite3
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from discovery import records
from discovery.concepts import load_concepts
from discovery.records import (
    Alignment,
    Candidate,
    Comparison,
    Context,
    Control,
    Cross,
    CurvePoint,
    Depth,
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
from labeling import catalog
from labeling.catalog import Catalog, build
from labeling.results import RECORDS, Results
from saes.errors import UserError

SITE = "blocks.1.hook_resid_post"


def row(record: type, **values: Any) -> Any:
    """A record with these values, and plain ones elsewhere."""
    plain = {str: "", int: 0, float: 0.5, bool: False}
    filled = {
        name: values.get(name, plain.get(kind, () if typing.get_origin(kind) is tuple else None))
        for name, kind in typing.get_type_hints(record).items()
    }
    return record(**filled)


def results() -> Results:
    named = {c.name: c for c in load_concepts()}
    concepts = [named[name] for name in ("sad", "calm", "at ease", "proud")]
    verdicts = ("found", "not found", "found as a set", "lexical only")
    alignments = [
        row(
            Alignment,
            concept=c.name,
            family=c.family,
            verdict=verdict,
            site=SITE,
            latent=i,
            auroc=0.6 + i / 10,
            q=0.01 * (4 - i),
            set_q=0.5,
            nearest=("calm", "sad"),
            lexical_latent=7,
            specific_q=None if i else 0.02,
        )
        for i, (c, verdict) in enumerate(zip(concepts, verdicts, strict=True))
    ]
    return Results(
        facts={"model": "tiny", "a": "b"},
        concepts=concepts,
        alignments=alignments,
        sets=[row(TextSet, set="confirmation", source="mine", language="de", texts=9, topics=3)],
        candidates=[
            row(Candidate, concept="sad", site=SITE, rank=1, latent=7, auroc=0.8),
            row(Candidate, concept="sad", site=SITE, rank=2, latent=9, firing_ratio=math.inf),
        ],
        outputs=[row(OutputScore, concept="sad", site=SITE, latent=7, rank=1, word_rank=3)],
        cross=[
            row(Cross, concept="sad", other=other, auroc=auroc)
            for other, auroc in (("sad", 0.9), ("calm", 0.4), ("proud", 0.6), ("at ease", math.nan))
        ],
        curve=[row(CurvePoint, k=16, set="selection")],
        depth=[row(Depth, site=SITE, pooling="rule", method="latent", set="selection")],
        members=[row(SetMember, concept="sad", site=SITE, latent=7, rank=1, weight=-0.25)],
        scores=[row(Score, concept="sad", method="tfidf", set="confirmation", auroc=math.nan)],
        controls=[row(Control, labels="true", found=1)],
        vectors=[row(Vector, concept="sad", site=SITE)],
        comparisons=[row(Comparison, concept="sad", site=SITE, latent=0, cosine=-0.1)],
        effects=[
            row(Effect, concept="sad", condition="feature", site=SITE, latent=0, dose=0.1),
            row(Effect, concept="sad", condition="random", site=SITE, latent=-1, dose=0.1),
            row(Effect, concept="calm", condition="random", site=SITE, latent=-1, dose=0.1),
        ],
        labels=[
            row(Label, site=SITE, latent=0, name="sad", level="high", concepts=("sad",)),
            row(Label, site=SITE, latent=7, name="in the set for sad", level="none"),
        ],
        promoted=[
            row(PromotedToken, site=SITE, latent=0, sign=1, rank=1, token=" grief"),
            row(PromotedToken, site=SITE, latent=0, sign=-1, rank=1, token=" cheer"),
            row(PromotedToken, site=SITE, latent=7, sign=1, rank=1, token=" grieving"),
        ],
        contexts=[
            context(0, 3.5, (0.0, 3.5, 0.001, 1.0, 0.0)),
            context(7, 9e5, (9e5, 0.0, 0.0, 0.0, 0.0)),
        ],
        saes=[row(Sae, site=SITE, latents=128, source="packaged/sae", neuronpedia=None)],
    )


def context(latent: int, peak: float, activations: tuple[float, ...]) -> Context:
    tokens = ("Once", " naïve", " 🙂", "", "\n")
    about = ("sad", "at ease")
    return Context(SITE, latent, 1, "t1", "confirmation", about, "sea", peak, tokens, activations)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    build(tmp_path / "catalog.sqlite", results())
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def store(path: Path) -> typing.Iterator[Catalog]:
    store = Catalog(path)
    yield store
    store.close()


def test_equal_results_give_equal_bytes(path: Path) -> None:
    again = path.with_name("again.sqlite")
    build(again, results())
    assert again.read_bytes() == path.read_bytes()
    build(path, results())
    assert again.read_bytes() == path.read_bytes()
    build(path, replace(results(), facts={"model": "another"}))
    assert again.read_bytes() != path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.sqlite", "catalog.sqlite"]


def test_a_failed_build_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyError):
        build(path, replace(results(), alignments=[]))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["catalog.sqlite"]


def test_a_leftover_of_a_killed_build_does_no_harm(path: Path) -> None:
    before = path.read_bytes()
    path.with_name("catalog.sqlite.part").write_bytes(b"SQLite format 3\0half")
    build(path, results())
    assert path.read_bytes() == before


def test_every_result_comes_back(store: Catalog) -> None:
    made = results()
    page = store.concept("sad")
    assert page is not None
    assert page.row.concept == made.concepts[0]
    assert page.row.alignment == made.alignments[0]
    assert page.row.label == made.labels[0]
    assert [r.concept.name for r in page.nearest] == ["calm", "sad"]
    assert page.members == [(made.members[0], made.labels[1], ["grieving"])]
    assert page.candidates == [
        (made.candidates[0], made.labels[1], made.outputs[0]),
        (made.candidates[1], None, None),
    ]
    assert [(c.other, c.auroc, r.concept.name) for c, r in page.cross] == [
        ("proud", 0.6, "proud"),
        ("calm", 0.4, "calm"),
    ]
    assert store.text_sets() == made.sets
    assert page.vectors == made.vectors
    assert page.comparisons == made.comparisons
    assert page.effects == made.effects[:2]
    assert len(page.scores) == 1
    assert math.isnan(page.scores[0].auroc)
    assert store.facts() == made.facts
    assert list(store.facts()) == ["model", "a"]
    assert store.controls() == made.controls
    assert store.concept("no-such") is None


def test_the_page_of_a_feature(store: Catalog) -> None:
    made = results()
    page = store.feature(SITE, 0)
    assert page is not None
    assert page.label == made.labels[0]
    assert page.raised == [made.promoted[0]]
    assert page.lowered == [made.promoted[1]]
    assert [r.concept.name for r in page.concepts] == ["sad"]
    assert page.effects == made.effects[:2]  # the controls beside the feature itself
    (context,) = page.contexts
    assert context.tokens == made.contexts[0].tokens
    assert context.concepts == ("sad", "at ease")
    assert context.activations == pytest.approx(made.contexts[0].activations, rel=1e-3)
    member = store.feature(SITE, 7)
    assert member is not None
    assert [(m.weight, r.concept.name) for m, r in member.sets] == [(-0.25, "sad")]
    assert [r.concept.name for r in member.words] == ["proud"]
    assert member.contexts[0].peak == 9e5  # too large for float16
    assert member.contexts[0].activations[0] == 9e5
    assert store.feature(SITE, 99) is None
    assert store.feature("blocks.9.hook_resid_post", 0) is None


def test_the_list_is_filtered_and_sorted(store: Catalog) -> None:
    def names(**options: Any) -> list[str]:
        return [r.concept.name for r in store.concepts(**options)]

    assert names() == ["at ease", "calm", "proud", "sad"]
    assert names(reverse=True) == ["sad", "proud", "calm", "at ease"]
    assert names(sort="auroc") == ["proud", "at ease", "calm", "sad"]
    assert names(sort="verdict") == ["sad", "at ease", "proud", "calm"]
    assert names(sort="q") == ["proud", "at ease", "calm", "sad"]
    assert names(verdict="not found") == ["calm"]
    assert names(family="Peaceful Contentment") == ["at ease", "calm"]
    assert names(text="SADNESS") == ["sad"]
    assert names(text="in the set for") == []  # the label of a member is not the concept's own
    assert names(verdict="found", family="Peaceful Contentment") == []
    assert store.verdict_counts() == {
        "found": 1,
        "found as a set": 1,
        "found for the family": 0,
        "lexical only": 1,
        "not found": 1,
    }
    assert store.families() == sorted({c.family for c in results().concepts})


def test_search_finds_names_word_forms_and_tokens(store: Catalog) -> None:
    assert [(h.kind, h.key) for h in store.search("sadness")] == [("concept", "sad")]
    assert {h.key for h in store.search("griev")} == {f"{SITE}/7"}
    assert {h.key for h in store.search("grie")} == {f"{SITE}/0", f"{SITE}/7"}
    assert store.search("sad")[0].title == "sad"
    assert store.search("at ease")[0].key == "at-ease"
    assert store.search("cheer") == []  # lowered, not raised
    assert len(store.search("grie", limit=1)) == 1


@pytest.mark.parametrize("query", ["", "  ", '"', "*", "NEAR(", "a AND", "title:x", "-", "');--"])
def test_search_takes_any_text(store: Catalog, query: str) -> None:
    assert isinstance(store.search(query), list)


def test_the_catalog_cannot_be_written(store: Catalog, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._db.execute("DELETE FROM concept")
    assert path.read_bytes() == before


def test_what_is_wrong_with_a_file_is_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no catalog at .*missing"):
        Catalog(tmp_path / "missing.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("no database" * 500)
    with pytest.raises(UserError, match="damaged or no catalog"):
        Catalog(text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE x (y)")
    db.close()
    with pytest.raises(UserError, match="no Emotion Atlas catalog"):
        Catalog(foreign)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match=f"version 99, this program reads {catalog.VERSION}"):
        Catalog(path)


def test_a_damaged_catalog_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Catalog(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:8192] + b"\xa5" * 8192 + whole[16384:])
    with pytest.raises(UserError, match="damaged"):
        Catalog(path)
    assert middle > 16384


def test_every_record_type_has_a_table() -> None:
    stored = {r for r, _ in catalog._records(results())} | {Context}
    every = {
        value
        for value in vars(records).values()
        if isinstance(value, type) and value.__module__ == "discovery.records"
    }
    assert every <= stored
    assert every == {record for _, record in RECORDS.values()}

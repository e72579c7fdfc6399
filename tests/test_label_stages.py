"""`labeling.stages`: labels, reports and tables of a run folder, whatever part of it is there."""

import json
import shutil
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array, random_array

from discovery import captured, records
from discovery.captured import Captured, TextRow, view
from discovery.concepts import load_concepts
from discovery.corpora.rows import Text, by_role
from discovery.records import (
    Alignment,
    Candidate,
    Context,
    Label,
    OutputScore,
    Sae,
    Score,
    SetMember,
    TextSet,
)
from discovery.settings import Texts
from labeling import stages
from labeling.catalog import Catalog
from labeling.results import DISCOVERY
from labeling.settings import LabelConfig
from labeling.stages import _quality
from saes.errors import UserError
from saes.subject import Subject, SubjectConfig

SITE = "blocks.1.hook_resid_post"
SAE = Sae(SITE, 128, "mine", "sae-lens", None, variance_explained=0.71, l0=8.0)
FIGURES = {
    "l0": 7.5,
    "variance_explained": 0.8,
    "recovered_mean": 0.9,
    "dead": 0.25,
    "tokens": 1234,
}
MEASURED = (
    "L0 7.5, variance explained 0.800, cross-entropy recovered 0.900 (against mean ablation), "
    "dead latents 25.0%, on 1,234 held-out tokens"
)
CHECKED = "L0 8.0, variance explained 0.710, on check texts"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_sae_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_sae_folder, tmp_path / "mine")


def test_figures_of_training_are_quoted(folder: Path) -> None:
    (folder / "quality.json").write_text(json.dumps({"held_out": FIGURES}))
    assert _quality(str(folder), SAE) == MEASURED
    assert _quality(str(folder / "sae_weights.safetensors"), SAE) == MEASURED


@pytest.mark.parametrize(
    "record",
    [
        {"held_out": {**FIGURES, "recovered_mean": None}},  # NaN, as JSON has it
        {"held_out": {"l0": 7.5}},
        {"held_out": {**FIGURES, "tokens": "many"}},
        {"held_out": None},
        {"held_out": [1]},
        [],
        None,
    ],
)
def test_figures_that_are_not_whole_do_not_stop_a_run(folder: Path, record: object) -> None:
    (folder / "quality.json").write_text(json.dumps(record))
    assert _quality(str(folder), SAE) == CHECKED


def test_without_figures_those_of_the_check_are_given(folder: Path, tmp_path: Path) -> None:
    assert _quality(str(folder), SAE) == CHECKED
    (folder / "quality.json").write_text("{")
    assert _quality(str(folder), SAE) == CHECKED
    assert _quality(str(tmp_path / "gone"), SAE) == CHECKED
    assert _quality("nobody/nothing/here", SAE) == CHECKED  # the hub is off


def test_figures_of_a_hub_repository(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "cache" / "models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (folder / "quality.json").write_text(json.dumps({"held_out": FIGURES}))
    shutil.copytree(folder, repo / "snapshots" / COMMIT / SITE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert _quality(f"me/mine/{SITE}", SAE) == MEASURED


# ---------------------------------------------------------------------------------- a run folder

NAMES = ("sad", "calm", "proud")
CONFIG = SubjectConfig("packaged/tiny", ("nobody/nothing/here",))


def row(record: type, **values: Any) -> Any:
    """A record with these values, and plain ones elsewhere."""
    plain = {str: "", int: 0, float: 0.5, bool: False}
    filled = {
        name: values.get(name, plain.get(kind, () if typing.get_origin(kind) is tuple else None))
        for name, kind in typing.get_type_hints(record).items()
    }
    return record(**filled)


def texts_of(sets: tuple[str, ...] = ("selection", "confirmation", "neutral")) -> Texts:
    """Six texts a set; the second of each has two concepts."""
    concepts = {c.name: c for c in load_concepts()}
    rows = [
        Text(
            f"{name}{i}", f"The door stood open, and nobody came; {i} {name}.",
            () if name == "neutral" else (NAMES[i % 3], NAMES[2])[: 2 if i == 1 else 1],
            name, topic=f"t{i % 2}", language="de" if i else "en",
        )
        for name in sets
        for i in range(6)
    ]  # fmt: skip
    own = [row(TextSet, set=name, source="mine", texts=6, topics=2, cut=1) for name in sets]
    return Texts([concepts[n] for n in NAMES], by_role(rows), own, "")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What capture, align and output leave, without a lexical control."""
    return run_of(tmp_path, texts_of())


def run_of(folder: Path, texts: Texts) -> Path:
    rng = np.random.default_rng(0)
    everything = texts.corpus.texts()
    rows = [
        TextRow(t.id, t.set, t.concepts, t.topic, "", "", t.language, 9, 1 + (i == 2), i == 3)
        for i, t in enumerate(everything)
    ]
    latents = {
        view(SITE, pooling): csr_array(
            random_array((len(rows), 128), density=0.5, rng=rng, dtype=np.float32)
        )
        for pooling in ("rule", "max")
    }
    residuals = {name: rng.normal(size=(len(rows), 32)).astype(np.float32) for name in latents}
    pooled = {name: "all content tokens" for name in sorted({t.set for t in everything})}
    for stage in ("capture", "align", "output", "label"):
        (folder / stage).mkdir()
    captured.save(folder / "capture", Captured(rows, residuals, latents, {SITE: 1.0}, pooled))
    records.write(folder / "capture" / "sets.parquet", TextSet, texts.sets)
    kinds = {kind: [] for kind, (stage, _) in stages.RECORDS.items() if stage == "align"}
    kinds["alignments"] = [
        row(Alignment, concept=c, family="all", verdict="found", site=SITE, pooling="max",
            latent=i, nearest=NAMES[:2], detectable_auroc=0.8)
        for i, c in enumerate(NAMES)
    ]  # fmt: skip
    kinds["members"] = [row(SetMember, concept="sad", site=SITE, latent=j) for j in (0, 9)]
    kinds["scores"] = [Score(c, "latent", "confirmation", 0.7, 0.6, 0.8) for c in NAMES]
    kinds["candidates"] = [row(Candidate, concept="sad", site=SITE, latent=3, rank=1)]
    for kind, rows in kinds.items():
        records.write(folder / "align" / f"{kind}.parquet", stages.RECORDS[kind][1], rows)
    outputs = [row(OutputScore, concept="sad", site=SITE, latent=3, rank=1, word_rank=2)]
    records.write(folder / "output" / "outputs.parquet", OutputScore, outputs)
    return folder


@pytest.fixture
def subject(tiny_lm: Any, tiny_sae_folder: Path) -> Subject:
    from saes.pretrained import load_checked

    loaded = load_checked(str(tiny_sae_folder), tiny_lm, trust=True)
    return Subject(tiny_lm, (loaded.dictionary,), (loaded.check,))


@pytest.mark.parametrize("alone", [False, True], ids=["two sets", "one corpus"])
def test_latents_are_named_from_texts_held_out(
    tmp_path: Path, subject: Subject, alone: bool
) -> None:
    texts = texts_of(("selection", "neutral")) if alone else texts_of()
    run = run_of(tmp_path, texts)
    stages.label(run / "label", run, subject, texts, LabelConfig(contexts=6, promoted=3))
    names = records.read(run / "label" / "labels.parquet", Label)
    assert [n.latent for n in names] == [0, 1, 2, 9]
    assert names[0].name == "sad"
    held_out = "the folds left out" if alone else "the confirmation set"
    assert names[0].reason.startswith(f"Confirmed for sad on {held_out}")
    pooled = captured.load(run / "capture").latents[view(SITE, "max")]
    labelled = [i for i, t in enumerate(texts.corpus.texts()) if t.set != "neutral"]
    fires = (pooled[labelled].toarray() > 0).mean(0)
    assert [n.density for n in names] == pytest.approx(fires[[0, 1, 2, 9]])
    shown = records.read(run / "label" / "contexts.parquet", Context)
    assert {c.set for c in shown} == {"selection" if alone else "confirmation"}
    assert {c.concepts for c in shown if c.text_id.endswith("1")} == {("calm", "proud")}


def test_discovery_writes_its_report_before_anything_else_is_there(run: Path) -> None:
    shutil.rmtree(run / "label")
    (run / "discovery").mkdir()
    stages.discovery(run / "discovery", run, texts_of(), CONFIG)
    page = (run / "discovery" / "report.html").read_text()
    assert "Emotion concepts in the SAE latents of packaged/tiny" in page
    assert "<dt>SAE 1</dt><dd>nobody/nothing/here</dd>" in page
    assert "confirmation, neutral, selection: all content tokens" in page
    assert "1 cut and 1 read in several windows, of 18 texts" in page
    assert "<dt>languages</dt><dd>de</dd>" in page
    assert "No lexical control was run" in page
    assert "Candidates: the best latents" in page


def test_discovery_reads_no_later_stage(run: Path) -> None:
    (run / "causal").mkdir()  # of an interrupted run: its files are not read
    stages.discovery(run / "capture", run, texts_of(), CONFIG)
    with pytest.raises(UserError, match=r"cannot read .*causal"):
        stages.report(run / "capture", run, texts_of(), CONFIG)
    assert stages.summary(run, DISCOVERY)
    assert [name for name, _, _ in stages.tables(run, ("align",))][:2] == ["alignments", "methods"]
    assert "sets" not in [name for name, _, _ in stages.tables(run, ("align",))]
    with pytest.raises(UserError, match=r"cannot read .*causal"):
        stages.summary(run)


def test_catalog_report_and_summary_take_what_is_there(run: Path) -> None:
    shutil.rmtree(run / "label")
    shutil.rmtree(run / "output")
    stages.catalog(run / "align", run, texts_of(), CONFIG)
    stages.report(run / "align", run, texts_of(), CONFIG)
    store = Catalog(run / "align" / "catalog.sqlite")
    assert len(store.concepts()) == 3
    assert [t.topics for t in store.text_sets()] == [2, 2, 2]
    store.close()
    rows = dict(stages.summary(run))
    assert rows["found"] == "3"
    assert rows["site, pooling"] == f"{SITE}, max"
    assert rows["longer than the context"].startswith("3 cut, ")
    assert "raising the latent lifts its own words most" not in rows


def test_tables_hold_every_field_as_a_scalar(run: Path) -> None:
    found = {name: (columns, rows) for name, columns, rows in stages.tables(run)}
    assert list(found) == ["alignments", "methods", "candidates", "output", "sets"]
    columns, rows = found["alignments"]
    first = dict(zip(columns, rows[0], strict=True))
    assert first["nearest"] == "sad, calm"
    assert first["lexical_auroc"] is None
    assert len(rows) == 3
    kinds = (str, int, float, bool, type(None))
    assert all(isinstance(v, kinds) for _, rows in found.values() for r in rows for v in r)
    shutil.rmtree(run / "output")
    assert "output" not in [name for name, _, _ in stages.tables(run)]


def test_an_sae_without_any_figures_is_only_named(tmp_path: Path) -> None:
    assert _quality("nobody/nothing/here", None) == ""
    facts = stages._facts(run_of(tmp_path, texts_of()), texts_of(),
                          replace(CONFIG, saes=(str(tmp_path / "mine"),)), [])  # fmt: skip
    assert facts["SAE 1"] == "mine"
    assert str(tmp_path) not in "".join(facts.values())

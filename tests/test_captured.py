"""What the capture stage writes comes back as it was, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.sparse import csr_array, random_array

from discovery.captured import (
    EMBEDDING,
    Captured,
    TextRow,
    load,
    pick,
    pooling_of,
    save,
    site_of,
    view,
)
from saes.errors import UserError

SITE = "blocks.3.hook_resid_post"
VIEWS = (view(SITE, "rule"), view(SITE, "max"))


def example(texts: int = 5) -> Captured:
    rng = np.random.default_rng(0)
    latents = random_array((texts, 40), density=0.2, rng=rng, dtype=np.float32, format="csr")
    return Captured(
        texts=[
            row(f"t{i}", "selection", ("at ease",), "station", tokens=120 + i, truncated=i == 1)
            for i in range(texts)
        ],
        residuals={
            name: rng.normal(size=(texts, 8)).astype(np.float32)
            for name in (view(EMBEDDING, "rule"), *VIEWS)
        },
        latents={name: csr_array(latents * (i + 1)) for i, name in enumerate(VIEWS)},
        norms={EMBEDDING: 1.25, SITE: 1 / 3},
        pooled={"selection": "mean of the tokens from number 50 on"},
        controls={f"untrained/{VIEWS[0]}": csr_array(latents[:, :7])},
    )


def row(
    name: str,
    kind: str,
    concepts: tuple[str, ...],
    topic: str = "",
    *,
    writer: str = "",
    tokens: int = 30,
    truncated: bool = False,
) -> TextRow:
    return TextRow(
        name, kind, concepts, topic, writer, "packaged", "en", tokens, 1, truncated=truncated
    )


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    before = example()
    save(tmp_path, before)
    after = load(tmp_path)
    assert after.texts == before.texts
    assert after.norms == before.norms
    assert after.residuals.keys() == before.residuals.keys()
    for site, residual in before.residuals.items():
        np.testing.assert_array_equal(after.residuals[site], residual, strict=True)
    assert after.pooled == before.pooled
    assert after.latents.keys() == set(VIEWS)
    assert after.latents[VIEWS[0]].shape == (5, 40)
    assert after.controls.keys() == before.controls.keys()
    for old, new in ((before.latents, after.latents), (before.controls, after.controls)):
        for name, latents in old.items():
            np.testing.assert_array_equal(new[name].toarray(), latents.toarray(), strict=True)
    assert not load(tmp_path, controls=False).controls


def test_a_capture_without_controls(tmp_path: Path) -> None:
    before = example()
    save(tmp_path, Captured(before.texts, before.residuals, before.latents, before.norms))
    after = load(tmp_path)
    assert not after.controls
    assert not after.pooled


def test_the_parts_of_a_view() -> None:
    assert (site_of(VIEWS[1]), pooling_of(VIEWS[1])) == (SITE, "max")


def test_pick_compares_texts_by_topic_and_numbered_ones_by_number() -> None:
    rows = [
        row("a", "selection", ("calm", "at ease"), "sea", writer="x"),
        row("b", "lexical", ("calm",)),
        row("c", "selection", (), "inn", writer="y"),
        row("d", "lexical", ("at ease",)),
        row("e", "lexical", ("calm",)),
        row("f", "selection", ("unknown", "calm"), "sea", writer="y"),
    ]
    names = ["at ease", "calm"]
    selection = pick(rows, "selection", names)
    assert selection.rows.tolist() == [0, 2, 5]
    assert selection.labels.dense().tolist() == [[True, True], [False, False], [False, True]]
    assert selection.labels.topics[0] == selection.labels.topics[2] != selection.labels.topics[1]
    assert len(set(selection.labels.units.tolist())) == 1  # sea has both writers
    lexical = pick(rows, "lexical", names)
    assert lexical.rows.tolist() == [1, 3, 4]
    assert lexical.labels.topics.tolist() == [0, 0, 1]
    assert lexical.labels.counts.tolist() == [1, 2]
    nothing = pick(rows, "situations", names)
    assert len(nothing.rows) == 0
    assert nothing.labels.concepts.shape == (0, 2)


def test_a_set_without_topics_is_one_topic() -> None:
    rows = [row(str(i), "selection", ("calm",)) for i in range(3)]
    labels = pick(rows, "selection", ["calm"]).labels
    assert len(set(labels.topics.tolist())) == 1
    assert len(set(labels.units.tolist())) == 3


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, example())
        paths = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        files.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in paths])
    assert files[0] == files[1]
    assert [str(name) for name, _ in files[0]] == [
        f"controls/untrained/{VIEWS[0]}.safetensors",
        f"latents/{VIEWS[1]}.safetensors",
        f"latents/{VIEWS[0]}.safetensors",
        "norms.json",
        "pooled.json",
        "residuals.safetensors",
        "texts.parquet",
    ]


def test_loading_needs_no_torch(tmp_path: Path) -> None:
    save(tmp_path, example())
    code = (
        "import sys; from pathlib import Path; from discovery.captured import load; "
        f"load(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "texts.parquet",
        "residuals.safetensors",
        "norms.json",
        "pooled.json",
        f"latents/{VIEWS[0]}.safetensors",
    ],
)
def test_a_cut_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path, example())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(tmp_path)
    (tmp_path / name).unlink()
    if not name.startswith("latents"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load(tmp_path)


def test_a_csr_that_is_none(tmp_path: Path) -> None:
    save(tmp_path, example())
    path = tmp_path / "latents" / f"{VIEWS[0]}.safetensors"
    arrays = {
        "data": np.ones(2, np.float32),
        "indices": np.array([3, 40], np.int32),
        "indptr": np.array([0, 1, 1, 1, 1, 2], np.int32),
    }
    save_file(arrays, path, {"shape": "[5, 40]"})
    with pytest.raises(UserError, match="indices must be < 40"):
        load(tmp_path)
    save_file(arrays, path)
    with pytest.raises(UserError, match="shape"):
        load(tmp_path)


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    save(tmp_path, example())
    (tmp_path / "norms.json").write_text(json.dumps({EMBEDDING: 1.0}))
    with pytest.raises(UserError, match="do not belong together"):
        load(tmp_path)
    save(tmp_path, example())
    save_file(example(4).residuals, tmp_path / "residuals.safetensors")
    with pytest.raises(UserError, match="do not belong together"):
        load(tmp_path)

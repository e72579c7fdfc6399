"""What the capture stage writes comes back as it was, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.sparse import csr_array, random_array

from discovery.captured import Captured, TextRow, load, save
from saes.errors import UserError

EMBEDDING, SITE = "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"


def example(texts: int = 5) -> Captured:
    rng = np.random.default_rng(0)
    latents = random_array((texts, 40), density=0.2, rng=rng, dtype=np.float32, format="csr")
    return Captured(
        texts=[
            TextRow(f"t{i}", "first", "at ease", "station", "a", 120 + i, i == 1)
            for i in range(texts)
        ],
        residuals={
            site: rng.normal(size=(texts, 8)).astype(np.float32) for site in (EMBEDDING, SITE)
        },
        latents={SITE: csr_array(latents)},
        norms={EMBEDDING: 1.25, SITE: 1 / 3},
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
    assert after.latents.keys() == {SITE}
    assert after.latents[SITE].shape == (5, 40)
    np.testing.assert_array_equal(
        after.latents[SITE].toarray(), before.latents[SITE].toarray(), strict=True
    )


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, example())
        paths = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        files.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in paths])
    assert files[0] == files[1]
    assert [str(name) for name, _ in files[0]] == [
        f"latents/{SITE}.safetensors",
        "norms.json",
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
    ["texts.parquet", "residuals.safetensors", "norms.json", f"latents/{SITE}.safetensors"],
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
    path = tmp_path / "latents" / f"{SITE}.safetensors"
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

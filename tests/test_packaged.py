"""The packaged demo model and SAEs are what their cards say, and load in plain libraries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from discovery.corpora.packaged import load_corpus
from saes.files import locate
from saes.lm.model import LM, load_lm
from saes.lm.tokens import tokenize
from saes.pretrained import load_sae
from saes.quality import Quality, quality

MIB = 2**20
SAES = sorted(path.name for path in locate("packaged/demo_saes").iterdir() if path.is_dir())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_lm("packaged/demo_lm")


@pytest.fixture(scope="module")
def rows(lm: LM) -> np.ndarray:
    """BOS and 127 tokens of 24 packaged stories, which neither the model nor the SAEs have seen."""
    stories = load_corpus().confirmation[::90][:24]
    return np.array([ids[:128] for ids in tokenize(lm, [text.text for text in stories]).ids])


def test_the_model_loads_in_plain_transformers_and_predicts_text(rows: np.ndarray) -> None:
    folder = locate("packaged/demo_lm")
    assert size(folder) <= 26 * MIB
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer("“It’s”").input_ids == tokenizer('"It\'s"').input_ids  # quotes are folded
    with torch.no_grad():
        loss = model(input_ids=torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss
    assert float(loss) < 5.0  # a uniform guess is ln 8192 = 9.0


@pytest.mark.parametrize("site", SAES)
def test_an_sae_loads_in_plain_sae_lens_and_reconstructs(
    site: str, lm: LM, rows: np.ndarray
) -> None:
    from sae_lens import SAE

    folder = locate(f"packaged/demo_saes/{site}")
    assert size(folder) <= 7 * MIB
    plain = SAE.load_from_disk(folder, dtype="float32")
    assert plain.cfg.metadata.hook_name == site
    measured = quality(lm, load_sae(folder, d_model=lm.d_model), rows)
    card = json.loads((folder / "quality.json").read_text())["held_out"]
    assert set(card) == set(Quality._fields)
    assert measured.l0 == pytest.approx(32, abs=0.01)
    assert measured.variance_explained == pytest.approx(card["variance_explained"], abs=0.05)
    assert measured.recovered_mean > 0.9


def test_there_are_two_sites() -> None:
    assert SAES == ["blocks.3.hook_resid_post", "blocks.5.hook_resid_post"]

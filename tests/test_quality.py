"""`saes.quality` against planted dictionaries and figures computed in other ways."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import pad
from saes.pretrained import load_sae
from saes.quality import quality

SITE = "blocks.1.hook_resid_post"
ROWS = np.random.default_rng(0).integers(5, 290, (12, 20)).astype(np.uint16)
ROWS[:, 0] = 1
ROWS[3, 7] = 2  # a special token in the middle


@dataclass(frozen=True)
class Planted:
    """Latents are the positive and negative parts of x; `keep` = 0 makes it output a constant."""

    keep: float
    constant: torch.Tensor
    site: str = SITE
    d_in: int = 32
    d_sae: int = 64

    @property
    def W_dec(self) -> torch.Tensor:
        return torch.cat([torch.eye(32), -torch.eye(32)])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.keep * torch.cat([x.relu(), (-x).relu()], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.W_dec + self.constant


def content(lm: LM) -> torch.Tensor:
    batch = pad(lm, ROWS.astype(np.int64))
    return capture(lm, batch, [SITE])[SITE][batch.content]


def test_a_perfect_dictionary(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS)
    assert q.tokens == 12 * 19 - 1
    assert q.variance_explained == pytest.approx(1, abs=1e-6)
    assert q.variance_explained_per_token == pytest.approx(1, abs=1e-6)
    assert q.ce_sae == pytest.approx(q.ce_clean, abs=1e-6)
    assert q.recovered_mean == pytest.approx(1, abs=1e-3)
    assert q.recovered_zero == pytest.approx(1, abs=1e-3)
    assert q.l0 == pytest.approx(32)
    assert (q.dead, q.dense) == (0, pytest.approx(1, abs=0.1))


def test_a_dictionary_that_says_the_mean(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(0.0, content(tiny_lm).mean(0)), ROWS)
    assert q.variance_explained == pytest.approx(0, abs=1e-6)
    assert q.ce_sae == pytest.approx(q.ce_mean, abs=1e-6)
    assert q.recovered_mean == pytest.approx(0, abs=1e-4)
    assert (q.l0, q.dead, q.dense) == (0, 1, 0)


def test_a_dictionary_that_says_zero(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(0.0, torch.zeros(32)), ROWS)
    assert q.ce_sae == pytest.approx(q.ce_zero, abs=1e-9)
    assert q.recovered_zero == pytest.approx(0, abs=1e-9)
    assert abs(q.ce_zero - q.ce_mean) > 1e-4


def test_clean_cross_entropy_is_hugging_faces_loss(tiny_lm: LM) -> None:
    ids = torch.from_numpy(ROWS.astype(np.int64))
    labels = ids.clone()
    labels[:, 1] = -100  # predicted from BOS
    labels[3, 8] = -100  # predicted from </s>
    expected = float(tiny_lm.model(input_ids=ids, labels=labels).loss)
    q = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS, pass_rows=5)
    assert q.ce_clean == pytest.approx(expected, abs=1e-5)


def test_figures_of_a_real_sae(tiny_lm: LM, tiny_sae_folder: Path) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    q = quality(tiny_lm, dictionary, ROWS, pass_rows=5)
    x = content(tiny_lm)
    z = dictionary.encode(x)
    out = dictionary.decode(z)
    expected = r2_score(x.numpy(), out.numpy(), multioutput="variance_weighted")
    assert q.variance_explained == pytest.approx(expected, abs=1e-5)
    ratio = (x - out).square().sum(1) / (x - x.mean(0)).square().sum(1)
    assert q.variance_explained_per_token == pytest.approx(float(1 - ratio.mean()), abs=1e-4)
    assert q.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    rate = (z > 0).double().mean(0)
    assert q.dead == pytest.approx(float((rate == 0).double().mean()))
    assert q.dense == pytest.approx(float((rate > 0.1).double().mean()))
    assert 0 < q.dense < 1


def test_batching_does_not_matter(tiny_lm: LM, tiny_sae_folder: Path) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    one = quality(tiny_lm, dictionary, ROWS, pass_rows=3)
    assert quality(tiny_lm, dictionary, ROWS, pass_rows=12) == pytest.approx(one, abs=1e-4)

"""`saes.activations`: every content token once an epoch, and exact resume from anywhere.

At `blocks.0.hook_resid_pre` a residual is its token's embedding, so batches can be read as tokens.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from saes.activations import ActivationStream, StreamConfig, rows_of
from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import pad

EMBED, POST = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
CONFIG = StreamConfig(batch=16, chunk_rows=4, pass_rows=3, seed=5)


def tokens(rows: int = 10, width: int = 11) -> np.ndarray:
    flat = np.random.default_rng(0).permutation(rows * width) % 290 + 5
    flat[::13] = 2  # </s>: special, never content
    return flat.astype(np.uint16)


def stream(lm: LM, config: StreamConfig = CONFIG, sites: tuple[str, ...] = (EMBED,)) -> Any:
    return ActivationStream(lm, rows_of(tokens(), 11), sites, config, bos=1)


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def read(lm: LM, batch: torch.Tensor) -> list[int]:
    """The tokens whose embeddings these are."""
    table = lm.model.get_input_embeddings().weight
    distance, token = distances(batch, table).min(dim=1)
    assert distance.max() < 1e-4
    return token.tolist()


def test_an_epoch_has_each_content_token_once_but_for_what_fills_no_batch(tiny_lm: LM) -> None:
    config = replace(CONFIG, batch=10, chunk_rows=10)
    batches = stream(tiny_lm, config)
    content = Counter(int(t) for t in tokens() if t != 2)
    n = content.total()
    found = Counter(t for _ in range(n // 10) for t in read(tiny_lm, next(batches)[EMBED]))
    assert found <= content
    assert found.total() == n - n % 10
    assert batches.epoch == 0
    next(batches)
    assert batches.epoch == 1


def test_batches_mix_rows(tiny_lm: LM) -> None:
    whole = rows_of(tokens(), 11)
    first = read(tiny_lm, next(stream(tiny_lm))[EMBED])
    rows = {int(np.argwhere(whole == t)[0, 0]) for t in first}
    assert len(first) == 16
    assert len(rows) == CONFIG.chunk_rows


def test_the_seed_decides_the_order(tiny_lm: LM) -> None:
    def some(seed: int) -> torch.Tensor:
        batches = stream(tiny_lm, replace(CONFIG, seed=seed))
        return torch.cat([next(batches)[EMBED] for _ in range(12)])

    assert torch.equal(some(1), some(1))
    assert not torch.equal(some(1), some(2))


def test_epochs_have_different_orders(tiny_lm: LM) -> None:
    batches = stream(tiny_lm)
    orders: dict[int, list[int]] = {0: [], 1: []}
    while True:
        batch = next(batches)
        if batches.epoch == 2:
            break
        orders[batches.epoch] += read(tiny_lm, batch[EMBED])
    assert len(orders[0]) == len(orders[1]) > 50
    assert orders[0] != orders[1]


def test_resuming_gives_the_same_bytes(tiny_lm: LM) -> None:
    """Across the ends of chunks and epochs, in a fresh stream and in one that is elsewhere."""
    whole = stream(tiny_lm)
    states, batches = [], []
    for _ in range(18):
        states.append(whole.state_dict())
        batches.append(next(whole)[EMBED])
    assert whole.epoch >= 2
    elsewhere = stream(tiny_lm)
    for i in (0, 1, 2, 6, 7, 8, 13, 15, 4):
        for again in (stream(tiny_lm), elsewhere):
            again.load_state_dict(states[i])
            assert torch.equal(next(again)[EMBED], batches[i])
            assert torch.equal(next(again)[EMBED], batches[i + 1])
            assert again.state_dict() == states[i + 2]


def test_sites_of_a_batch_are_of_the_same_tokens_and_equal_capture(tiny_lm: LM) -> None:
    batch = next(stream(tiny_lm, sites=(POST, EMBED)))
    assert list(batch) == [POST, EMBED]
    rows = np.concatenate([np.ones((10, 1), np.int64), rows_of(tokens(), 11)], axis=1)
    padded = pad(tiny_lm, rows)
    whole = capture(tiny_lm, padded, [EMBED, POST])
    pairs = torch.cat([whole[EMBED][padded.content], whole[POST][padded.content]], dim=1)
    found = torch.cat([batch[EMBED], batch[POST]], dim=1)
    assert distances(found, pairs).min(dim=1).values.max() < 1e-4


def test_rows_with_their_own_bos(tiny_lm: LM) -> None:
    rows = np.concatenate([np.ones((10, 1), np.uint16), rows_of(tokens(), 11)], axis=1)
    own = ActivationStream(tiny_lm, rows, (EMBED,), CONFIG, bos=None)
    assert torch.equal(next(own)[EMBED], next(stream(tiny_lm))[EMBED])


def test_autocast_is_close_and_gives_float32(tiny_lm: LM) -> None:
    exact = next(stream(tiny_lm, sites=(POST,)))[POST]
    half = next(stream(tiny_lm, replace(CONFIG, autocast=True), (POST,)))[POST]
    assert half.dtype == torch.float32
    error = (half - exact).norm() / exact.norm()
    assert 1e-6 < error < 0.05


def test_rows_of_is_a_view() -> None:
    flat = np.arange(25, dtype=np.uint16)
    rows = rows_of(flat, 10)
    assert rows.tolist() == [list(range(10)), list(range(10, 20))]
    assert np.shares_memory(rows, flat)
    with pytest.raises(UserError, match="25 tokens"):
        rows_of(flat, 26)


def test_bad_input(tiny_lm: LM) -> None:
    rows = rows_of(tokens(), 11)
    with pytest.raises(UserError, match="out of range"):
        ActivationStream(tiny_lm, rows, ("blocks.9.hook_resid_post",), CONFIG, bos=1)
    with pytest.raises(UserError, match=r"257 tokens exceed .* 256"):
        ActivationStream(tiny_lm, np.full((2, 256), 9), (EMBED,), CONFIG, bos=1)
    with pytest.raises(UserError, match="token 300 is outside"):
        next(ActivationStream(tiny_lm, np.full((2, 8), 300), (EMBED,), CONFIG, bos=1))
    with pytest.raises(UserError, match="fewer than a batch"):
        next(ActivationStream(tiny_lm, rows[:1], (EMBED,), CONFIG, bos=1))

"""`saes.stream.activations`: each content token once an epoch, and exact resume from anywhere.

At `blocks.0.hook_resid_pre` a residual is its token's embedding, so batches can be read as tokens.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.model import LM, load_lm
from saes.lm.tokens import pad
from saes.stream.activations import (
    ActivationStream,
    Runs,
    ShuffledStream,
    StreamConfig,
    rows_of,
)
from saes.stream.rows import check_finite
from saes.training.budget import Shape

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


@pytest.mark.parametrize("chunk_rows", [2, 3, 10, 50])
@pytest.mark.parametrize("own_bos", [False, True])
def test_every_epoch_has_each_content_token_once(
    tiny_lm: LM, chunk_rows: int, own_bos: bool
) -> None:
    """Nothing is dropped, at the end of neither chunks nor epochs."""
    config, rows = replace(CONFIG, batch=10, chunk_rows=chunk_rows), rows_of(tokens(), 11)
    if own_bos:
        rows = np.concatenate([np.ones((10, 1), np.uint16), rows], axis=1)
    batches = ActivationStream(tiny_lm, rows, (EMBED,), config, bos=None if own_bos else 1)
    content = Counter(int(t) for t in tokens() if t != 2)
    n = content.total()
    assert (batches.tokens_per_epoch, n % 10) == (n, 1)
    assert batches.buffer_tokens % 10 == 0
    assert batches.buffer_tokens <= min(n, chunk_rows * 11)
    flat = [t for _ in range(n) for t in read(tiny_lm, next(batches)[EMBED])]
    assert batches.epoch == 10
    for epoch in range(10):
        assert Counter(flat[epoch * n : (epoch + 1) * n]) == content


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda x: sum(x) > 0),
    first=st.integers(0, 200),
    count=st.integers(1, 60),
    seed=st.integers(0, 3),
)
def test_runs_are_a_part_of_the_endless_sequence(
    lengths: list[int], first: int, count: int, seed: int
) -> None:
    """Reference: the whole sequence, token by token."""

    class Blocks(ShuffledStream):
        def _read(self, runs: Runs) -> Any:
            raise NotImplementedError

    found = Blocks(("a",), lengths=np.array(lengths), together=1, batch=1, seed=seed)
    whole = [
        (int(block), i)
        for epoch in range((first + count) // sum(lengths) + 1)
        for block in np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for i in range(lengths[block])
    ]
    runs = found._runs(first, count)
    listed = [
        (int(block), int(start) + i)
        for part in runs
        for block, start, length in zip(*part, strict=True)
        for i in range(length)
    ]
    assert listed == whole[first : first + count]


def test_batches_mix_rows(tiny_lm: LM) -> None:
    whole = rows_of(tokens(), 11)
    first = read(tiny_lm, next(stream(tiny_lm))[EMBED])
    rows = {int(np.argwhere(whole == t)[0, 0]) for t in first}
    assert len(first) == 16
    assert len(rows) >= CONFIG.chunk_rows


def test_the_seed_decides_the_order(tiny_lm: LM) -> None:
    def some(seed: int) -> torch.Tensor:
        batches = stream(tiny_lm, replace(CONFIG, seed=seed))
        return torch.cat([next(batches)[EMBED] for _ in range(12)])

    assert torch.equal(some(1), some(1))
    assert not torch.equal(some(1), some(2))


def test_epochs_have_different_orders(tiny_lm: LM) -> None:
    batches = stream(tiny_lm, replace(CONFIG, batch=101, chunk_rows=10))
    assert batches.tokens_per_epoch == 101
    first, second = (read(tiny_lm, next(batches)[EMBED]) for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


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


@settings(max_examples=8)
@given(
    skip=st.integers(0, 25),
    elsewhere=st.integers(0, 25),
    config=st.builds(
        StreamConfig,
        batch=st.integers(1, 16),
        chunk_rows=st.integers(2, 12),
        pass_rows=st.integers(1, 12),
        seed=st.integers(0, 3),
    ),
)
def test_resuming_anywhere_gives_the_same_bytes(
    tiny_lm: LM, skip: int, elsewhere: int, config: StreamConfig
) -> None:
    whole, again = stream(tiny_lm, config), stream(tiny_lm, config)
    for _ in range(skip):
        next(whole)
    for _ in range(elsewhere):
        next(again)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(3):
        assert torch.equal(next(again)[EMBED], next(whole)[EMBED])
        assert again.state_dict() == whole.state_dict()


def test_a_chunk_holds_a_batch_at_least(tiny_lm: LM) -> None:
    """A chunk of one row would hold 10 tokens of a batch of 16."""
    batches = stream(tiny_lm, replace(CONFIG, chunk_rows=1))
    assert batches.buffer_tokens == 16
    assert len(next(batches)[EMBED]) == 16


def test_a_batch_is_the_callers_to_keep(tiny_lm: LM) -> None:
    batches = stream(tiny_lm)
    first = next(batches)[EMBED]
    copy = first.clone()
    for _ in range(10):
        next(batches)[EMBED].zero_()
    assert torch.equal(first, copy)
    assert torch.equal(next(stream(tiny_lm))[EMBED], copy)


def test_what_a_stream_says_of_itself(tiny_lm: LM, tiny_lm_folder: Path) -> None:
    batches = ActivationStream(tiny_lm, rows_of(tokens(), 11), (EMBED,), CONFIG, bos=1, text="made")
    assert batches.about == ("tiny_lm", 12, True, "made")
    assert (batches.sites, batches.batch, batches.d_model) == ((EMBED,), 16, 32)
    assert (batches.tokens_per_epoch, batches.buffer_tokens) == (101, 32)
    assert isinstance(batches, Shape)
    assert batches.device == torch.device("cpu")
    identity = json.loads(json.dumps(batches.identity()))
    assert identity == stream(tiny_lm).identity()  # where the text is from does not matter
    other_rows = rows_of(tokens(), 11).copy()
    other_rows[5, 5] += 1
    other_lm = load_lm(tiny_lm_folder)
    with torch.no_grad():
        other_lm.model.get_input_embeddings().weight.mul_(1.01)
    others = (
        stream(tiny_lm, replace(CONFIG, seed=6)),
        stream(tiny_lm, sites=(POST,)),
        stream(other_lm),
        ActivationStream(tiny_lm, other_rows, (EMBED,), CONFIG, bos=1),
    )
    assert all(other.identity() != identity for other in others)


def test_a_residual_that_is_not_finite(tiny_lm_folder: Path) -> None:
    """The site and the chunk are named, and the state is that before the chunk."""
    lm = load_lm(tiny_lm_folder)
    batches = stream(lm, sites=(EMBED, POST))
    while batches.chunk != 1:
        next(batches)
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.inf
    match = rf"{POST} is not finite \(epoch 0, chunk 2\)"
    with pytest.raises(UserError, match=match):
        read_on(batches)
    assert batches.state_dict() == {"chunk": 2, "taken": 0}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_enough(bad: float, dtype: torch.dtype) -> None:
    x = torch.full((50, 20), 3.4e38 if dtype == torch.float32 else 3e38, dtype=dtype)
    check_finite({POST: x}, "here")  # though their sum is infinite
    x[:, ::2] *= -1
    check_finite({POST: x}, "here")
    x[31, 7] = bad
    with pytest.raises(UserError, match=rf"{POST} is not finite \(here\)"):
        check_finite({EMBED: torch.zeros(3, 3), POST: x}, "here")


def read_on(batches: Any) -> None:
    for _ in range(20):
        next(batches)


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
    late = np.full((2000, 11), 9)
    late[1999, 10] = 300
    with pytest.raises(UserError, match="token 300 is outside"):  # before anything is read
        ActivationStream(tiny_lm, late, (EMBED,), CONFIG, bos=1)
    with pytest.raises(UserError, match="at least one site"):
        ActivationStream(tiny_lm, rows, (), CONFIG, bos=1)
    with pytest.raises(UserError, match="pass_rows = 0 must be"):
        StreamConfig(pass_rows=0)
    with pytest.raises(UserError, match="10 content tokens are fewer than a batch of 16"):
        ActivationStream(tiny_lm, rows[:1], (EMBED,), CONFIG, bos=1)

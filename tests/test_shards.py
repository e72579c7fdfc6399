"""What is harvested, interruptions, damage, and the order in which it comes back."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from saes.errors import UserError
from saes.files import locked
from saes.lm.capture import capture
from saes.lm.model import LM, load_lm
from saes.lm.tokens import pad
from saes.stream import shard_files, shards
from saes.stream.shard_files import ShardWriter, read_manifest
from saes.stream.shards import (
    HarvestConfig,
    ShardStream,
    ShardStreamConfig,
    estimate,
    harvest,
)

EMBED, POST = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
SITES = (EMBED, POST)
HARVEST = HarvestConfig(shard_rows=6, pass_rows=4)
STREAM = ShardStreamConfig(batch=16, buffer=64, block=4, seed=3)


@cache
def rows() -> np.ndarray:
    ids = np.random.default_rng(0).integers(5, 299, (20, 11)).astype(np.uint16)
    ids[::3, 4] = 2  # </s>: special, never content
    return ids


@pytest.fixture(scope="module")
def folder(tiny_lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of two sites, float32. Read only."""
    out = tmp_path_factory.mktemp("shards") / "out"
    harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    return out


def everything(lm: LM) -> dict[str, Tensor]:
    """Residuals of all content tokens, in the order of the rows, by one plain pass."""
    batch = pad(lm, np.concatenate([np.ones((20, 1), np.int64), rows().astype(np.int64)], axis=1))
    return {site: x[batch.content] for site, x in capture(lm, batch, SITES).items()}


def stored(out: Path, site: str) -> list[Tensor]:
    """The tensors of a site's shards, read by the safetensors library."""
    found = []
    for path in sorted((out / site).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert list(file.keys()) == ["residuals"]
            found.append(file.get_tensor("residuals"))
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------------- writing


def test_shards_hold_the_residuals_of_content_tokens(tiny_lm: LM, folder: Path) -> None:
    expected = everything(tiny_lm)
    for site in SITES:
        parts = stored(folder, site)
        assert len(parts) == 4
        torch.testing.assert_close(torch.cat(parts), expected[site], rtol=1e-5, atol=1e-5)
    manifest = read_manifest(folder)
    assert [s.tokens for s in manifest.shards if s] == [len(p) for p in stored(folder, EMBED)]
    assert (manifest.model, manifest.text, manifest.context) == ("tiny_lm", "made up", 12)


def test_the_estimate_is_exact_and_told(
    tiny_lm: LM, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(tiny_lm, rows(), (POST,), tmp_path / "out", HARVEST, bos=1)
    told = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"harvesting takes 2\d\.\d KiB of disk: 21\d tokens .* 4 shards, .*", told)
    found = estimate(tiny_lm, rows(), SITES, HARVEST, bos=1)
    assert found.bytes == sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    assert sum(found.tokens) == len(everything(tiny_lm)[EMBED])


def test_dtypes(tiny_lm_folder: Path, tiny_lm: LM, tmp_path: Path) -> None:
    """bf16 of a bf16 model is kept as it is; another dtype is a plain conversion."""
    half = load_lm(tiny_lm_folder, dtype="bfloat16")
    harvest(half, rows(), SITES, tmp_path / "a", HARVEST, bos=1)
    assert stored(tmp_path / "a", POST)[0].dtype == torch.bfloat16
    found = torch.cat(stored(tmp_path / "a", POST)).float()
    error = (found - everything(tiny_lm)[POST]).norm() / found.norm()
    assert 1e-4 < error < 0.05
    config = replace(HARVEST, dtype="float16")
    harvest(tiny_lm, rows(), SITES, tmp_path / "b", config, bos=1)
    converted = torch.cat(stored(tmp_path / "b", EMBED))
    assert torch.equal(converted, everything(tiny_lm)[EMBED].half())
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float16)):
        stream = ShardStream(tmp_path / name, STREAM)
        batch = next(stream)[POST]
        assert batch.dtype == torch.float32
        assert torch.equal(batch, batch.to(dtype).float())


def test_rows_with_their_own_bos(tiny_lm: LM, folder: Path, tmp_path: Path) -> None:
    whole = np.concatenate([np.ones((20, 1), np.uint16), rows()], axis=1)
    harvest(tiny_lm, whole, SITES, tmp_path / "out", HARVEST, bos=None)
    for site in SITES:
        for a, b in zip(stored(tmp_path / "out", site), stored(folder, site), strict=True):
            assert torch.equal(a, b)
    assert read_manifest(tmp_path / "out").prepend_bos


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7])
def test_an_interrupted_harvest_goes_on_at_the_shard(
    tiny_lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped before pass `stop` (two passes a shard, the last one has one)."""
    out, read = tmp_path / "out", shards.read_rows
    passes = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        if passes == stop:
            passes += 1
            raise KeyboardInterrupt
        passes += 1
        return read(*args, **kwargs)

    monkeypatch.setattr(shards, "read_rows", interrupted)
    if stop < 7:
        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
        assert not list(out.rglob(".*.part"))
    done = stop // 2
    if 0 < stop < 7:
        with (
            pytest.raises(UserError, match=f"is not finished: {done} of 4")
            if done
            else (pytest.raises(UserError, match="holds no shards"))
        ):
            ShardStream(out, STREAM)
    passes = 100
    harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    assert passes - 100 == 7 - 2 * done if stop < 7 else 7
    assert contents(out) == contents(folder)


def test_a_killed_harvest_goes_on(
    tiny_lm: LM, tiny_lm_folder: Path, folder: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of a shard."""
    np.save(tmp_path / "rows.npy", rows())
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        import numpy as np
        from saes.stream import shards
        from saes.lm.model import load_lm
        read = shards.read_rows
        def slowly(*args, **kwargs):
            time.sleep(0.2)
            return read(*args, **kwargs)
        shards.read_rows = slowly
        shards.harvest(
            load_lm({str(tiny_lm_folder)!r}), np.load({str(tmp_path / "rows.npy")!r}), {SITES!r},
            Path({str(tmp_path / "out")!r}), shards.{HARVEST!r}, bos=1, text="made up",
        )
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL
    )
    out, deadline = tmp_path / "out", time.monotonic() + 120
    while not (out / POST / ".00002.safetensors.part").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    manifest = read_manifest(out)
    assert [shard is not None for shard in manifest.shards] == [True, True, False, False]
    times = {p: p.stat().st_mtime_ns for p in out.rglob("0000[01].safetensors")}
    harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    assert contents(out) == contents(folder)
    assert len(times) == 4
    assert all(p.stat().st_mtime_ns == when for p, when in times.items())


def test_a_damaged_shard_is_made_again(tiny_lm: LM, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    flip(out / POST / "00001.safetensors")
    (out / EMBED / "00002.safetensors").unlink()
    harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    assert contents(out) == contents(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_shards_of_something_else_are_kept(tiny_lm: LM, folder: Path) -> None:
    before = contents(folder)
    others: list[dict[str, Any]] = [
        {"rows": rows()[:-1]},
        {"sites": (POST, "blocks.2.hook_resid_post")},
        {"config": replace(HARVEST, autocast=True)},
        {"config": replace(HARVEST, dtype="bfloat16")},
        {"bos": None},
    ]
    for other in others:
        call: dict[str, Any] = {"rows": rows(), "sites": SITES, "config": HARVEST, "bos": 1}
        call |= other
        with pytest.raises(UserError, match="shards of another model, text, sites or settings"):
            harvest(tiny_lm, out=folder, **call)
    assert contents(folder) == before


def test_a_whole_harvest_serves_others(
    tiny_lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its sites, or other cuts into shards and passes; nothing is read from the model."""
    before = contents(folder)
    hashed: list[str] = []
    fault = shard_files.fault

    def counted(folder: Path, file: shard_files.File) -> str | None:
        hashed.append(file.name)
        return fault(folder, file)

    monkeypatch.setattr(shard_files, "fault", counted)
    monkeypatch.setattr(shards, "read_rows", lambda *_, **__: pytest.fail("read the model"))
    for sites, config in (
        ((POST,), HARVEST),
        (SITES, HarvestConfig(shard_rows=5, pass_rows=1)),
        ((POST, EMBED), replace(HARVEST, pass_rows=2)),
    ):
        hashed.clear()
        found = harvest(tiny_lm, rows(), sites, folder, config, bos=1)
        stream = ShardStream(folder, STREAM, sites=sites, lm=tiny_lm, checked=found)
        assert sorted(hashed) == sorted(f"{s}/0000{i}.safetensors" for s in sites for i in range(4))
        expected = next(ShardStream(folder, STREAM, sites=sites))
        assert all(torch.equal(x, expected[site]) for site, x in next(stream).items())
    assert contents(folder) == before
    shutil.copytree(folder, tmp_path / "out")
    flip(tmp_path / "out" / EMBED / "00001.safetensors")
    harvest(tiny_lm, rows(), (POST,), tmp_path / "out", HARVEST, bos=1)  # the other site is sound
    with pytest.raises(UserError, match=r"00001\.safetensors was altered.* with other settings"):
        harvest(tiny_lm, rows(), (EMBED,), tmp_path / "out", HARVEST, bos=1)


def test_two_cannot_harvest_to_one_folder(tiny_lm: LM, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    with locked(folder):  # of what is whole, only readers are left
        harvest(tiny_lm, rows(), SITES, folder, HARVEST, bos=1)
    (out / POST / "00001.safetensors").unlink()
    with locked(out), pytest.raises(UserError, match="another process is writing"):
        harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    assert contents(out) == contents(folder)


def test_a_limit_on_the_size_of_files(tiny_lm: LM, tmp_path: Path) -> None:
    """The system itself refuses, in the middle of a shard."""
    import resource

    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(UserError, match=r"00000\.safetensors could not be .*too large"):
            harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.rglob("*.safetensors*"))
    assert not list(out.rglob(".*.part"))


def test_a_disk_that_is_too_small_is_refused(
    tiny_lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate counts; what is there already does not."""
    need = estimate(tiny_lm, rows(), SITES, HARVEST, bos=1).bytes
    usage = SimpleNamespace(free=(1 << 28) + need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"harvesting \d+ tokens needs .* KiB and .* free"):
        harvest(tiny_lm, rows(), SITES, tmp_path / "out", HARVEST, bos=1)
    assert not (tmp_path / "out").exists()
    shutil.copytree(folder, tmp_path / "out")
    flip(tmp_path / "out" / POST / "00001.safetensors")
    usage.free = (1 << 28) + need // 2
    harvest(tiny_lm, rows(), SITES, tmp_path / "out", HARVEST, bos=1, text="made up")


def test_a_disk_that_fills_up(
    tiny_lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, adds = tmp_path / "out", 0
    add = ShardWriter.add

    def full(self: ShardWriter, x: Tensor) -> None:
        nonlocal adds
        adds += 1
        if adds == 6:  # of shard 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, x)

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(UserError, match=r"disk is full: .*00001\.safetensors could not be"):
        harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    assert sorted(p.name for p in out.rglob("[!.]*.*") if p.is_file()) == [
        "00000.safetensors",
        "00000.safetensors",
        "manifest.json",
    ]
    harvest(tiny_lm, rows(), SITES, out, HARVEST, bos=1, text="made up")
    assert contents(out) == contents(folder)


def test_a_residual_that_is_not_finite(tiny_lm_folder: Path, tmp_path: Path) -> None:
    """float16 overflows at a token whose embedding is huge; shard and site are named."""
    lm = load_lm(tiny_lm_folder)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[int(rows()[13, 2])] = 1e6
    out, config = tmp_path / "out", replace(HARVEST, dtype="float16")
    match = rf"{EMBED} is not finite \(rows of shard \d\)"
    with pytest.raises(UserError, match=match):
        harvest(lm, rows(), SITES, out, config, bos=1)
    harvest(lm, rows(), SITES, tmp_path / "wide", HARVEST, bos=1)


def test_bad_settings(tiny_lm: LM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        HarvestConfig(dtype="int8")
    with pytest.raises(UserError, match="shard_rows = 0"):
        HarvestConfig(shard_rows=0)
    with pytest.raises(UserError, match=r"batch = 100 .* buffer = 64"):
        ShardStreamConfig(batch=100, buffer=64)
    with pytest.raises(UserError, match="out of range"):
        harvest(tiny_lm, rows(), ("blocks.9.hook_resid_post",), tmp_path, HARVEST, bos=1)
    special = np.full((3, 5), 2, np.uint16)
    with pytest.raises(UserError, match="no content token"):
        harvest(tiny_lm, special, SITES, tmp_path, HARVEST, bos=1)


# --------------------------------------------------------------------------------- reading back


def read(stream: ShardStream, batches: int = 20) -> None:
    """Read on; in `pytest.raises`, one statement."""
    for _ in range(batches):
        next(stream)


@pytest.mark.parametrize("buffer", [24, 90, 1000])
def test_every_epoch_has_each_token_once(folder: Path, buffer: int) -> None:
    """Nothing is dropped, at the end of neither chunks nor epochs."""
    stream = ShardStream(folder, replace(STREAM, batch=8, buffer=buffer))
    expected = Counter(map(tuple, torch.cat(stored(folder, POST)).tolist()))
    n = expected.total()
    assert (stream.tokens_per_epoch, n % 8) == (n, 5)
    assert stream.buffer_tokens == min(buffer, n) // 8 * 8
    flat = [tuple(x) for _ in range(n) for x in next(stream)[POST].tolist()]
    assert stream.epoch == 8
    for epoch in range(8):
        assert Counter(flat[epoch * n : (epoch + 1) * n]) == expected


def test_sites_of_a_batch_are_of_the_same_tokens(folder: Path) -> None:
    whole = torch.cat([torch.cat(stored(folder, site)) for site in SITES], dim=1)
    stream = ShardStream(folder, STREAM, sites=(POST, EMBED))
    pairs = {tuple(x) for x in whole.tolist()}
    for _ in range(30):
        batch = next(stream)
        assert list(batch) == [POST, EMBED]
        both = torch.cat([batch[EMBED], batch[POST]], dim=1)
        assert all(tuple(x) in pairs for x in both.tolist())


def test_batches_mix_all_shards(folder: Path) -> None:
    """Of the first batch, about as many tokens are of each shard as the shards have."""
    home = {tuple(x): i for i, part in enumerate(stored(folder, POST)) for x in part.tolist()}
    stream = ShardStream(folder, replace(STREAM, batch=32, buffer=128, block=1))
    counts = Counter(home[tuple(x)] for x in next(stream)[POST].tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 20


def test_seeds_and_epochs_give_different_orders(folder: Path) -> None:
    def some(seed: int, skip: int = 0) -> Tensor:
        stream = ShardStream(folder, replace(STREAM, seed=seed, buffer=1000))
        for _ in range(skip):
            next(stream)
        return torch.cat([next(stream)[POST] for _ in range(3)])

    assert torch.equal(some(1), some(1))
    assert not torch.equal(some(1), some(2))
    per_epoch = len(torch.cat(stored(folder, POST))) // 16
    assert not torch.equal(some(1), some(1, per_epoch))


@settings(max_examples=12)
@given(
    skip=st.integers(0, 30),
    elsewhere=st.integers(0, 30),
    batch=st.integers(1, 30),
    buffer=st.integers(60, 300),
    block=st.integers(2, 30),
)
def test_resuming_gives_the_same_bytes(
    folder: Path, skip: int, elsewhere: int, batch: int, buffer: int, block: int
) -> None:
    config = ShardStreamConfig(batch, buffer, block, seed=skip)
    whole = ShardStream(folder, config)
    for _ in range(skip):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    fresh, used = ShardStream(folder, config), ShardStream(folder, config)
    for _ in range(elsewhere):
        next(used)
    for again in (fresh, used):
        again.load_state_dict(state)
    for _ in range(3):
        expected = next(whole)
        for again in (fresh, used):
            found = next(again)
            assert all(torch.equal(found[site], expected[site]) for site in SITES)
            assert again.state_dict() == whole.state_dict()


def test_what_a_stream_says_of_itself(tiny_lm: LM, folder: Path) -> None:
    stream = ShardStream(folder, STREAM, lm=tiny_lm)
    assert stream.sites == SITES
    assert (stream.batch, stream.d_model, stream.device) == (16, 32, torch.device("cpu"))
    assert stream.about == ("tiny_lm", 12, True, "made up")
    identity = json.loads(json.dumps(stream.identity()))
    assert identity == ShardStream(folder, STREAM).identity()
    others = (
        ShardStream(folder, replace(STREAM, seed=9)),
        ShardStream(folder, STREAM, sites=(POST,)),
    )
    assert all(other.identity() != identity for other in others)


def test_a_batch_is_the_callers_to_keep(folder: Path) -> None:
    stream = ShardStream(folder, STREAM)
    first = next(stream)[POST]
    copy = first.clone()
    for _ in range(20):
        next(stream)[POST].zero_()
    assert torch.equal(first, copy)
    again = ShardStream(folder, STREAM)
    assert torch.equal(next(again)[POST], copy)


@pytest.mark.parametrize("damage", ["altered", "cut off", "missing"])
def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    path = out / POST / "00002.safetensors"
    if damage == "altered":
        flip(path)
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{POST}/00002\.safetensors .*{damage}"):
        ShardStream(out, STREAM)
    ShardStream(out, STREAM, sites=(EMBED,))  # the other site is sound


@pytest.mark.parametrize("left", [200, 3, 0, None])
def test_a_shard_that_is_cut_or_deleted_while_it_is_read(
    folder: Path, tmp_path: Path, left: int | None
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    stream = ShardStream(out, STREAM)
    path = out / POST / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    if left is None:
        path.unlink()
    said = "missing" if left is None else "cut off"
    with pytest.raises(UserError, match=rf"00000\.safetensors is {said}"):
        read(stream)


def test_what_does_not_fit(folder: Path, tiny_lm_folder: Path, tiny_lm: LM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no residuals of blocks.2.*; there are: {EMBED}, {POST}"):
        ShardStream(folder, STREAM, sites=("blocks.2.hook_resid_post",))
    other = load_lm(tiny_lm_folder)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(UserError, match="weights are not those of"):
        ShardStream(folder, STREAM, lm=other)
    shutil.copytree(folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["d_model"] = 64
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="are 64 wide, those of tiny_lm 32"):
        ShardStream(tmp_path / "out", STREAM, lm=tiny_lm)
    (tmp_path / "out/manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        ShardStream(tmp_path / "out", STREAM)
    with pytest.raises(UserError, match="holds no shards"):
        ShardStream(tmp_path / "nothing", STREAM)


def test_a_stored_value_that_is_not_finite(folder: Path, tmp_path: Path) -> None:
    """A shard that was written so, with a hash that agrees."""
    import hashlib

    out = tmp_path / "out"
    shutil.copytree(folder, out)
    path = out / EMBED / "00001.safetensors"
    data = path.read_bytes()[:-4] + np.float32(np.nan).tobytes()
    path.write_bytes(data)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1]["files"][EMBED]["sha256"] = hashlib.sha256(data).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    stream = ShardStream(out, STREAM)
    with pytest.raises(UserError, match=rf"{EMBED} is not finite \(shard {EMBED}/00001"):
        read(stream)

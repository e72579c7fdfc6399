"""`saes.training.checkpoint`: whole or refused, two kept, and signals between steps."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saes.errors import UserError
from saes.training.checkpoint import (
    Interrupts,
    Stopped,
    read_checkpoint,
    steps_of,
    write_checkpoint,
)


def state(step: int) -> dict[str, object]:
    return {"weights": torch.full((100,), float(step)), "step": step}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20."""
    for step in (5, 10, 20):
        write_checkpoint(tmp_path, step, state(step))
    return tmp_path


def test_the_last_two_are_kept_and_the_newest_is_read(folder: Path) -> None:
    assert steps_of(folder) == [10, 20]
    assert sorted(p.name for p in folder.iterdir()) == [
        "step_00000010.json", "step_00000010.pt", "step_00000020.json", "step_00000020.pt",
    ]  # fmt: skip
    found = read_checkpoint(folder)
    assert found is not None
    assert found.step == 20
    assert torch.equal(found.state["weights"], torch.full((100,), 20.0))


def test_none_yet(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None


def test_what_a_kill_leaves_counts_for_nothing(folder: Path) -> None:
    (folder / ".step_00000030.pt.part").write_bytes(b"half")
    (folder / "step_00000030.pt").write_bytes(b"whole, but without its checksum")
    found = read_checkpoint(folder)
    assert found is not None
    assert found.step == 20
    assert not (folder / ".step_00000030.pt.part").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def spoil_note(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def swap(path: Path) -> None:
    """Bytes and checksum agree, but torch.save did not write them."""
    import hashlib

    path.write_bytes(b"x" * 50)
    note = {"sha256": hashlib.sha256(b"x" * 50).hexdigest(), "size": 50}
    path.with_suffix(".json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"bytes instead of \d+"),
        (flip, "SHA-256"),
        (Path.unlink, "No such file"),
        (spoil_note, "json is unreadable"),
        (swap, "something else than tensors"),
    ],
)
def test_damage_is_named(
    damage: "object", said: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    damage(folder / "step_00000020.pt")
    found = read_checkpoint(folder)
    assert found is not None
    assert found.step == 10
    (record,) = caplog.records
    assert "step_00000020.pt is damaged" in record.getMessage()
    flip(folder / "step_00000010.pt")
    with pytest.raises(UserError, match=rf"step_00000020\.pt is damaged.*{said}.*start anew"):
        read_checkpoint(folder)


def test_a_damaged_newer_one_is_not_among_those_kept(folder: Path) -> None:
    flip(folder / "step_00000020.pt")
    write_checkpoint(folder, 12, state(12))  # having gone on from 10
    assert steps_of(folder) == [10, 12]
    assert not (folder / "step_00000020.pt").exists()
    flip(folder / "step_00000012.pt")
    found = read_checkpoint(folder)
    assert found is not None
    assert found.step == 10


def test_code_in_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    import hashlib

    class Evil:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path}/ran",)

    path = folder / "step_00000020.pt"
    torch.save({"weights": Evil()}, path)
    data = path.read_bytes()
    note = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.with_suffix(".json").write_text(json.dumps(note))
    found = read_checkpoint(folder)
    assert found is not None
    assert found.step == 10
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as inside:
        yield inside
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_is_not_cut(interrupts: Interrupts, number: signal.Signals) -> None:
    done = []

    def train() -> None:
        for step in range(3):
            os.kill(os.getpid(), number)
            done.append(step)
            interrupts.check()

    with pytest.raises(Stopped):
        train()
    assert done == [0]
    with pytest.raises(Stopped), interrupts.waiting():
        raise AssertionError("unreachable")
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as caught:
        interrupts.leave()
    assert getattr(caught.value, "code", 143) == 143


def test_waiting_is_cut_at_once(interrupts: Interrupts) -> None:
    def read() -> None:
        with interrupts.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("unreachable")

    with pytest.raises(Stopped):
        read()


def test_a_second_signal_does_not_wait(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.caught == signal.SIGTERM

"""Checkpoints that are whole or refused, and signals that come between two steps.

    FOLDER/step_00000200.pt      what torch.save wrote; read with weights_only, so no code runs
    FOLDER/step_00000200.json    its SHA-256 and size, written last

A kill while writing leaves at most a file without checksum, which counts for nothing. Two
checkpoints are kept, so that damage to the newest costs the steps since the one before.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from saes.errors import UserError
from saes.files import sha256, sync_folder, write_text

KEEP = 2
log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: dict[str, Any]


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after `step`, and delete all checkpoints but it and the one before.

    Later ones too: they are damaged, or there would be no going on from before them.

    Raises:
        UserError: the disk is full or cannot be written; the earlier checkpoints stay.
    """
    import torch

    path = folder / f"step_{step:08d}.pt"
    part = folder / f".{path.name}.part"
    try:
        with part.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(state, hashing)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        note = {"sha256": hashing.sha256.hexdigest(), "size": hashing.size}
        write_text(path.with_suffix(".json"), json.dumps(note) + "\n")
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch turns some write errors into RuntimeErrors
        part.unlink(missing_ok=True)
        kept = ", ".join(str(s) for s in steps_of(folder) if s < step) or "none"
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(
            f"cannot write checkpoint {path}: {reason}; make room and start again "
            f"(checkpoints kept: {kept})"
        ) from None
    steps = steps_of(folder)
    keep = [s for s in steps if s <= step][-KEEP:]
    for old in set(steps) - set(keep):
        (folder / f"step_{old:08d}.json").unlink(missing_ok=True)
        (folder / f"step_{old:08d}.pt").unlink(missing_ok=True)
    return path


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints that have a checksum, rising."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.json"))


def read_checkpoint(folder: Path, device: Any = "cpu") -> Checkpoint | None:
    """The newest whole checkpoint, or None if none was ever written.

    A damaged newest one is warned about by name, and the one before it is taken.

    Raises:
        UserError: all of them are damaged; the message names each and what is wrong.
    """
    for leftover in folder.glob(".step_*.part"):
        leftover.unlink()
    damaged: list[str] = []
    for step in reversed(steps_of(folder)):
        path = folder / f"step_{step:08d}.pt"
        found = _read(path, device)
        if isinstance(found, dict):
            if damaged:
                log.warning("%s; going on from the one of step %d", "; ".join(damaged), step)
            return Checkpoint(step, found)
        damaged.append(f"checkpoint {path} is damaged ({found})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; delete {folder} to start anew")
    return None


def _read(path: Path, device: Any) -> dict[str, Any] | str:
    """The state, or what is wrong with the file."""
    import torch

    try:
        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size, expected = note["size"], note["sha256"]
        if path.stat().st_size != size:
            return f"{path.stat().st_size} bytes instead of {size}"
        actual = sha256(path)
    except OSError as error:
        return str(error.strerror)
    except (ValueError, KeyError, TypeError):
        return f"{path.with_suffix('.json').name} is unreadable"
    if actual != expected:
        return f"SHA-256 {actual[:12]} instead of {str(expected)[:12]}"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises many types, and advises to read the file with pickle
        return "it holds something else than tensors and plain values"


_COUNTS = (
    "n_training_steps",
    "n_training_samples",
    "act_freq_scores",
    "n_forward_passes_since_fired",
    "n_frac_active_samples",
)


def trainer_state(trainer: Any) -> dict[str, Any]:
    """All that changes of sae-lens's SAETrainer: weights, optimizer, schedules, counts."""
    schedulers = trainer.coefficient_schedulers
    return {
        "sae": trainer.sae.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {k: s.state_dict() for k, s in schedulers.items()},
        "scaling_factor": trainer.activation_scaler.scaling_factor,
        "counts": {count: getattr(trainer, count) for count in _COUNTS},
    }


def load_trainer_state(trainer: Any, state: dict[str, Any]) -> None:
    """Put a trainer where another with the same settings was."""
    trainer.sae.load_state_dict(state["sae"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for key, scheduler in trainer.coefficient_schedulers.items():
        scheduler.load_state_dict(state["coefficients"][key])
    trainer.activation_scaler.scaling_factor = state["scaling_factor"]
    for count, value in state["counts"].items():
        setattr(trainer, count, value)


class Stopped(BaseException):
    """A signal asked to stop; state is that after the last whole step."""


class Interrupts:
    """Within it, SIGTERM and Ctrl-C stop training between two steps, not inside one.

    While `waiting()` holds (activations are read, which may take long) they raise `Stopped` at
    once; else `check()` does so. A second one raises KeyboardInterrupt, for those in a hurry.
    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._waiting = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        if self._waiting:
            raise Stopped

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A part of the loop that changes no state which is not restored."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Stop here if a signal came.

        Raises:
            Stopped: one came.
        """
        if self.caught is not None:
            raise Stopped

    def leave(self) -> NoReturn:
        """End as the signal asks: like Ctrl-C, or with the exit code 143 of SIGTERM."""
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

"""Stages of a run: done once, skipped when nothing they depend on changed, safe to kill.

A stage writes into `RUN/.<name>.part`; `done.json` with the hashes of its files comes last, and
then the folder is renamed to `RUN/<name>`. So a kill at any moment leaves the old state, or a part
that the next start removes.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

from saes.config import digest, load, to_dict
from saes.errors import UserError
from saes.files import relative_files, sha256, sync_folder, write_text
from saes.run import Run

DONE = "done.json"


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    write: Callable[[Path], None]
    """Writes the stage's files into the empty folder it is given; same inputs, same bytes."""
    config: object = None
    """The part of the config that the stage depends on: a dataclass or plain data."""
    inputs: tuple[str, ...] = ()
    """Names of the earlier stages whose files it reads."""
    external: Mapping[str, str] = field(default_factory=dict[str, str])
    """Hashes of what it reads from outside the run folder (model, SAEs, corpus), by name."""
    version: int = 1
    """Raised when a change of the code changes what the stage writes."""


class Event(NamedTuple):
    """Progress of a stage: `started`, then `finished`; or `kept`, when it was done before."""

    stage: str
    state: Literal["started", "finished", "kept"]
    seconds: float  # finished: now; kept: when it was made; started: 0


@dataclass(frozen=True)
class _File:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class _Done:
    """What done.json holds."""

    key: str
    files: dict[str, _File]
    digest: str  # of key and files, so that damage to done.json itself is told apart


def run_stages(
    run: Run, stages: Sequence[Stage], on_event: Callable[[Event], None] = lambda _: None
) -> list[Event]:
    """Run the stages in order, keeping those that are done and whose inputs are unchanged.

    All kept files are verified before any work starts.

    Returns:
        the last event (`finished` or `kept`) of every stage.

    Raises:
        UserError: a file of a done stage is missing or altered, or what a stage raised; the
            unfinished stage leaves nothing behind, and the finished ones stay.
    """
    for leftover in (*run.folder.glob(".*.part"), *run.folder.glob(".*.old")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    keys = stage_keys(stages)
    kept = {stage.name for stage in stages if is_done(run.folder / stage.name, keys[stage.name])}
    times = run.manifest().seconds
    events: list[Event] = []
    for stage in stages:
        if stage.name in kept:
            event = Event(stage.name, "kept", times.get(stage.name, 0.0))
        else:
            on_event(Event(stage.name, "started", 0.0))
            event = Event(stage.name, "finished", _make(run, stage, keys[stage.name]))
        events.append(event)
        on_event(event)
    return events


def stage_keys(stages: Sequence[Stage]) -> dict[str, str]:
    """A hash for each stage of everything its files depend on: config, code version, inputs."""
    keys: dict[str, str] = {}
    for stage in stages:
        assert stage.name.isidentifier(), f"stage name {stage.name!r}"
        assert stage.name not in keys, f"two stages {stage.name!r}"
        keys[stage.name] = digest(
            {
                "name": stage.name,
                "version": stage.version,
                "config": stage.config,
                "external": stage.external,
                "inputs": {name: keys[name] for name in stage.inputs},
            }
        )
    return keys


def is_done(folder: Path, key: str) -> bool:
    """Whether the stage folder holds the finished stage of this key, all files intact.

    Raises:
        UserError: one of its files is missing, truncated or altered; the message names it.
    """
    if not folder.exists():
        return False
    done = _read_done(folder)
    if done.key != key:
        return False
    for name, expected in done.files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, folder, "missing")
        if path.stat().st_size != expected.size:
            raise _damaged(path, folder, f"{path.stat().st_size} bytes instead of {expected.size}")
        if sha256(path) != expected.sha256:
            raise _damaged(path, folder, "altered")
    return True


def _read_done(folder: Path) -> _Done:
    path = folder / DONE
    try:
        tree: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise _damaged(path, folder, "missing") from None
    except ValueError:
        raise _damaged(path, folder, "not JSON") from None
    try:
        done = load(_Done, cast(Mapping[str, object], tree if isinstance(tree, dict) else {}))
    except UserError as error:
        raise _damaged(path, folder, str(error)) from None
    if done.digest != digest([done.key, done.files]):
        raise _damaged(path, folder, "altered")
    return done


def _damaged(path: Path, folder: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}); delete {folder} to make this stage anew")


def _make(run: Run, stage: Stage, key: str) -> float:
    """Write the stage and put it in place; seconds taken."""
    start = time.perf_counter()
    final = run.folder / stage.name
    part, old = run.folder / f".{stage.name}.part", run.folder / f".{stage.name}.old"
    part.mkdir()
    try:
        stage.write(part)
        files = {
            n: _File(sha256(part / n), (part / n).stat().st_size) for n in relative_files(part)
        }
        assert DONE not in files, f"stage {stage.name!r} wrote a file {DONE}"
        done = _Done(key, files, digest([key, files]))
        write_text(part / DONE, json.dumps(to_dict(done), indent=1) + "\n")
    except BaseException:
        shutil.rmtree(part)
        raise
    seconds = time.perf_counter() - start
    run.record(seconds={stage.name: seconds})
    if final.exists():
        final.rename(old)
    part.rename(final)
    sync_folder(run.folder)
    shutil.rmtree(old, ignore_errors=True)
    return seconds

"""The run folder: one configuration, a manifest of what made it, and a lock.

    RUN/config.yaml     the configuration; written last, so that it marks a run folder
    RUN/manifest.json   versions, commit, seeds, input hashes, times (`Manifest`)
    RUN/.lock           held by the process that writes the run, with its pid

Nothing of the environment's variables is stored.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from saes.config import Dataclass, digest, dump, load, read, to_dict
from saes.errors import UserError
from saes.files import write_text

PROJECT = "emotion-atlas"
CONFIG, MANIFEST, LOCK = "config.yaml", "manifest.json", ".lock"
FREE = ("run", "track")  # fields that decide no result
_NAMED, _LONG = 3, 60  # differences of two configs that an error names; characters of a value
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sae-lens",
    "transformer-lens",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "pyarrow",
    "wandb",
)


@dataclass(frozen=True)
class Environment:
    """What ran: the project and its commit (None outside a checkout), Python, main packages."""

    version: str
    commit: str | None
    changed: bool  # tracked files of the checkout differ from the commit
    python: str
    platform: str
    packages: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """How a run was made. Times are UTC; `environments` grows when a run goes on in another one."""

    id: str  # random, 8 hex digits; names the run in trackers
    config: str  # digest of config.yaml
    created: str
    seeds: dict[str, int]  # every field of the config that is called `seed`, by its place
    environments: tuple[Environment, ...]
    inputs: dict[str, str] = field(
        default_factory=dict[str, str]
    )  # name to hash: model, SAEs, corpus
    seconds: dict[str, float] = field(
        default_factory=dict[str, float]
    )  # per stage, when it was made
    finished: str | None = None


@dataclass(frozen=True)
class Run:
    """A run folder that this process holds; `with open_run(...) as run` lets it go at the end."""

    folder: Path
    lock: int  # file descriptor

    def manifest(self) -> Manifest:
        """The manifest as it is on disk."""
        return read_manifest(self.folder)

    def record(
        self, *, inputs: Mapping[str, str] | None = None, seconds: Mapping[str, float] | None = None
    ) -> None:
        """Add input hashes or seconds of stages to the manifest; the run is then not finished."""
        old = self.manifest()
        new = replace(
            old, inputs={**old.inputs, **(inputs or {})}, seconds={**old.seconds, **(seconds or {})}
        )
        if new != old:
            _write_manifest(self.folder, replace(new, finished=None))

    def finish(self) -> None:
        """Note the time at which the run became complete."""
        manifest = self.manifest()
        if manifest.finished is None:
            _write_manifest(self.folder, replace(manifest, finished=_now()))

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self.lock)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(folder: Path, config: Dataclass) -> Run:
    """Make the run folder of `config`, or open the one that is there, and lock it.

    Raises:
        UserError: the folder cannot be written, is held by another process, or is refused by
            `check_run`. Nothing is left behind in these cases.
    """
    with contextlib.ExitStack() as undo, _readable_errors(folder):
        _check_kind(folder)
        undo.callback(_remove_empty, [p for p in (folder, *folder.parents) if not p.exists()])
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        undo.callback(os.close, lock)
        if (folder / CONFIG).exists() and _check_same(folder, to_dict(config)):
            _add_environment(folder)
        elif (folder / CONFIG).exists():
            _create(folder, config)
        else:
            undo.callback(_remove_files, folder)
            _create(folder, config)
        undo.pop_all()
        return Run(folder, lock)
    raise AssertionError("unreachable")


def check_run(folder: Path, config: Dataclass) -> None:
    """Look only: may the folder hold a run of `config`?

    Where a run is kept and tracked decides no result, so the fields `run` and `track` may differ;
    and so may all others as long as no stage is finished, for then nothing is lost.

    Raises:
        UserError: the folder is no run folder, is that of another config, or is damaged.
    """
    with _readable_errors(folder):
        _check_kind(folder)
        if (folder / CONFIG).exists():
            _check_same(folder, to_dict(config))


def without_folders(tree: Mapping[str, object]) -> dict[str, object]:
    """A config for others to see: of an absolute path only the last two parts are left.

    >>> without_folders({"saes": ["/home/me/data/saes/blocks.5"], "model": "packaged/demo_lm"})
    {'saes': ['saes/blocks.5'], 'model': 'packaged/demo_lm'}
    """
    return {key: _short_path(value) for key, value in tree.items()}


def _short_path(value: object) -> object:
    if isinstance(value, Mapping):
        return without_folders(cast(Mapping[str, object], value))
    if isinstance(value, list):
        return [_short_path(item) for item in cast(list[object], value)]
    if isinstance(value, str) and (path := Path(value)).is_absolute():
        return "/".join(path.parts[1:][-2:])
    return value


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run folder.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        tree: object = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(tree, dict), "not an object"
        return load(Manifest, cast(dict[str, object], tree), "manifest")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {folder} is not a whole run folder") from None
    except (ValueError, AssertionError) as error:
        raise _damaged(path, error) from None


def _create(folder: Path, config: Dataclass) -> None:
    tree = to_dict(config)
    manifest = Manifest(
        id=uuid.uuid4().hex[:8],
        config=digest(tree),
        created=_now(),
        seeds=dict(_seeds(tree)),
        environments=(_environment(),),
    )
    _write_manifest(folder, manifest)
    write_text(folder / CONFIG, dump(config))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    with _readable_errors(folder):
        text = json.dumps(to_dict(manifest), indent=2, ensure_ascii=False)
        write_text(folder / MANIFEST, text + "\n")


def _add_environment(folder: Path) -> None:
    manifest, now = read_manifest(folder), _environment()
    if manifest.environments[-1] != now:
        _write_manifest(folder, replace(manifest, environments=(*manifest.environments, now)))


def _check_kind(folder: Path) -> None:
    """Refuse a folder that holds something else than a run; look only, change nothing."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; choose another --run folder")
    names = {entry.name for entry in folder.iterdir()}
    begun = names <= {LOCK, MANIFEST, f".{MANIFEST}.part", f".{CONFIG}.part"} and LOCK in names
    if CONFIG not in names and names and not begun:
        raise UserError(
            f"{folder} is not empty and not a run folder (it has no {CONFIG}); "
            "choose another --run folder"
        )
    if CONFIG in names and MANIFEST not in names:
        raise UserError(
            f"{folder} is no whole run folder: {MANIFEST} is missing; choose another --run folder"
        )


def _check_same(folder: Path, wanted: Mapping[str, object]) -> bool:
    """Whether the run there is one of this config; False if it is another's that has no result."""
    path = folder / CONFIG
    try:
        stored = read(path)
    except UserError as error:
        raise _damaged(path, error) from None
    if digest(stored) != read_manifest(folder).config:
        raise _damaged(path, "it was changed after the run began")
    there, here = (
        {key: value for key, value in tree.items() if key not in FREE} for tree in (stored, wanted)
    )
    found = list(_differences(there, here))
    if not found:
        return True
    if not any(folder.glob("*/done.json")):  # what `saes.stage` leaves
        return False
    words = [f"{place} is {old} there and {new} now" for place, old, new in found[:_NAMED]]
    rest = f"; {len(found) - _NAMED} more settings differ" if len(found) > _NAMED else ""
    raise UserError(
        f"{folder} holds a run of another config: {', '.join(words)}{rest}; to go on with that "
        f"run, give its own config, {path}; for this config choose another --run folder"
    )


def _differences(
    there: Mapping[str, object], here: Mapping[str, object], where: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Places at which two configs differ, with both values in words; items of lists of sections
    are counted from 0, as in `--set`."""
    for key in (*here, *(k for k in there if k not in here)):
        if key in there and key in here and there[key] == here[key]:
            continue
        a, b = there.get(key), here.get(key)
        old, new = _section(a), _section(b)
        if old and new and type(a) is type(b) and (isinstance(a, dict) or len(old) == len(new)):
            yield from _differences(old, new, f"{where}{key}.")
        else:
            yield where + key, _in_words(there, key), _in_words(here, key)


def _section(value: object) -> dict[str, object] | None:
    """A section, or a list of them by number; None for plain values."""
    if isinstance(value, list):
        items = cast(list[object], value)
        sections = all(isinstance(item, dict) for item in items)
        return {str(i): item for i, item in enumerate(items)} if sections else None
    return cast(dict[str, object], value) if isinstance(value, dict) else None


def _in_words(section: Mapping[str, object], key: str) -> str:
    if key not in section:
        return "absent"
    text = json.dumps(section[key], ensure_ascii=False)
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."


def _lock(folder: Path) -> int:
    """Lock RUN/.lock for this process; however it ends, the system lets go of the lock."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise UserError(
            f"{folder} is in use by process {holder or 'unknown'}; "
            "wait until it ends, or choose another --run folder"
        ) from None
    return descriptor


@contextlib.contextmanager
def _readable_errors(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder}: {error.strerror or error}; "
            "choose another --run folder"
        ) from None


def _remove_files(folder: Path) -> None:
    for name in (CONFIG, MANIFEST, LOCK):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is damaged ({why}); delete the run folder or choose another one")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _seeds(tree: Mapping[str, object], where: str = "") -> Iterator[tuple[str, int]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _seeds(cast(Mapping[str, object], value), f"{where}{key}.")
        elif key == "seed" and isinstance(value, int):
            yield where + key, value


def _environment() -> Environment:
    commit, changed = _commit(Path(__file__).resolve().parents[1])
    versions = {name: _version(name) for name in _PACKAGES}
    return Environment(
        version=_version(PROJECT) or "not installed",
        commit=commit,
        changed=changed,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: version for name, version in versions.items() if version},
    )


def _version(package: str) -> str | None:
    from importlib import metadata  # 20 ms

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> tuple[str | None, bool]:
    """Commit of the project's checkout, and whether its files differ from it; None if none."""
    if not (root / ".git").exists():
        return None, False
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        lines = [
            subprocess.run(
                ["git", "-C", str(root), *command],
                env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None, False
    return lines[0], bool(lines[1])

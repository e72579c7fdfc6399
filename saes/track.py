"""Where a run's metrics go: a JSONL file, Weights & Biases if asked for. wandb is only here.

Tracking never stops a run: the first failure of wandb or of the file (a full disk) is warned about,
once, and the run goes on without it.
"""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from saes.files import relative_files

Number = int | float
Scalar = str | int | float | bool | None

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics go."""

    backend: Literal["wandb", "jsonl", "none"] = "jsonl"
    """wandb: RUN/metrics.jsonl and Weights & Biases; jsonl: only the file; none: nowhere."""
    mode: Literal["offline", "online"] = "offline"
    """Of wandb: offline writes RUN/wandb, to be sent later by `wandb sync`; online needs a key."""
    project: str = "emotion-atlas"
    """wandb project."""
    entity: str | None = None
    """wandb user or team; null for your default one."""
    group: str | None = None
    """wandb group, for runs that belong together."""
    name: str | None = None
    """Name of the run in wandb; null for the run folder's name."""
    tags: tuple[str, ...] = ()
    """wandb tags."""


@runtime_checkable
class Tracker(Protocol):
    """What the stages know of tracking."""

    @property
    def places(self) -> tuple[str, ...]:
        """Files or addresses at which to look."""
        ...

    def log(self, metrics: Mapping[str, Number], step: int | None = None) -> None:
        """Add one point to each named curve."""
        ...

    def summary(self, values: Mapping[str, Scalar]) -> None:
        """Set final figures of the run."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Store a table."""
        ...

    def histogram(
        self, name: str, counts: Sequence[int], edges: Sequence[float], step: int | None = None
    ) -> None:
        """Add a histogram to a curve of them: `counts[i]` lie between `edges[i]` and the next."""
        ...

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Store a file or folder that does not change any more; `kind` is its wandb type."""
        ...

    def finish(self, exit_code: int = 0) -> None:
        """Write out what is left; nothing is logged after it."""
        ...


class NullTracker:
    """Tracks nothing."""

    places: tuple[str, ...] = ()

    def log(self, metrics: Mapping[str, Number], step: int | None = None) -> None: ...
    def summary(self, values: Mapping[str, Scalar]) -> None: ...
    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]
    ) -> None: ...
    def histogram(
        self, name: str, counts: Sequence[int], edges: Sequence[float], step: int | None = None
    ) -> None: ...
    def artifact(self, path: Path, name: str, kind: str) -> None: ...
    def finish(self, exit_code: int = 0) -> None: ...


class JsonlTracker:
    """One JSON object a line, appended: `time` (Unix seconds), `kind`, and what `kind` holds.

    Each line is one write, so a kill can tear only the last one; it is dropped at the next start. A
    line that cannot be written is the last that is tried, and its beginning is taken back.
    Numbers that JSON lacks are the strings `NaN`, `Infinity` and `-Infinity`, which `float` reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places = (str(path),)
        self._file: FileIO | None = None
        try:
            self._file = path.open("a+b", buffering=0)
            self._file.truncate(_end_of_last_line(path))
        except OSError as error:
            self._give_up(error)

    def log(self, metrics: Mapping[str, Number], step: int | None = None) -> None:
        points = {k: _number(v) for k, v in metrics.items()}
        self._write("metrics", {**_place(step), "metrics": points})

    def summary(self, values: Mapping[str, Scalar]) -> None:
        self._write("summary", {"values": {k: _number(v) for k, v in values.items()}})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        cells = [[_number(cell) for cell in row] for row in rows]
        self._write("table", {"name": name, "columns": list(columns), "rows": cells})

    def histogram(
        self, name: str, counts: Sequence[int], edges: Sequence[float], step: int | None = None
    ) -> None:
        body = {"name": name, "counts": list(counts), "edges": list(edges)}
        self._write("histogram", {**_place(step), **body})

    def artifact(self, path: Path, name: str, kind: str) -> None:
        where = os.path.relpath(path, self.path.parent)
        self._write("artifact", {"name": name, "type": kind, "path": where})

    def finish(self, exit_code: int = 0) -> None:
        self._write("finish", {"exit_code": exit_code})
        if self._file is not None:
            self._file.close()

    def _write(self, kind: str, body: Mapping[str, object]) -> None:
        if self._file is None:
            return
        record = {"time": round(time.time(), 3), "kind": kind, **body}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file, self.places = None, ()
        reason = error.strerror or str(error)
        log.warning("%s cannot be written: %s; the run goes on without it", self.path, reason)


def _place(step: int | None) -> dict[str, object]:
    return {} if step is None else {"step": step}


def _number(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _end_of_last_line(path: Path, block: int = 65536) -> int:
    """Byte position just after the file's last newline; 0 if it has none."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


class WandbTracker:
    """A wandb run whose failures are warned about once and then ignored.

    Args:
        start: gives the wandb run; called at once.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self.places: tuple[str, ...] = ()
        self._run: Any = True  # so that the first call is made
        self._run = self._try("start", lambda _: start())
        self._try("start", self._look)

    def _look(self, run: Any) -> None:
        self.places = (str(run.settings.sync_dir if run.offline else run.url),)

    def log(self, metrics: Mapping[str, Number], step: int | None = None) -> None:
        self._try("log", lambda run: self._send(run, dict(metrics), step))

    @staticmethod
    def _send(run: Any, points: dict[str, Any], step: int | None) -> None:
        """Log, but for steps that wandb has: a resumed run goes over some of them once more."""
        if step is None or step >= run.step:
            run.log(points, step=step)

    def summary(self, values: Mapping[str, Scalar]) -> None:
        self._try("summary", lambda run: run.summary.update(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        def send(run: Any) -> None:
            import wandb

            data: list[Any] = [list(row) for row in rows]
            run.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

        self._try("table", send)

    def histogram(
        self, name: str, counts: Sequence[int], edges: Sequence[float], step: int | None = None
    ) -> None:
        def send(run: Any) -> None:
            import wandb

            bins: Any = (list(counts), list(edges))
            self._send(run, {name: wandb.Histogram(np_histogram=bins)}, step)

        self._try("histogram", send)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, kind)
            inside = relative_files(path) if path.is_dir() else [""]
            for file in inside:  # immutable: without a copy in the home folder
                artifact.add_file(str(path / file), name=file or path.name, policy="immutable")
            run.log_artifact(artifact)

        self._try("artifact", send)

    def finish(self, exit_code: int = 0) -> None:
        self._try("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, what: str, call: Callable[[Any], Any]) -> Any:
        """The result of the call, or None once wandb has failed."""
        if self._run is None:
            return None
        try:
            return call(self._run)
        except Exception as error:  # whatever a tracking service does, the run goes on
            self._run = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("wandb failed at %s: %s; tracking goes on without it", what, reason)
            return None


def _start_wandb(
    folder: Path, config: TrackConfig, run_config: Mapping[str, object], id: str
) -> Any:
    """Start a wandb run that prints nothing, asks nothing, and does not wait for ever."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", save_code=False, init_timeout=20, finish_timeout=300,
        finish_timeout_raises=True,
    )  # fmt: skip
    online = config.mode == "online"
    if online:
        wandb.setup(settings)
        if not wandb.login(prompt=False):
            raise RuntimeError(
                "there is no API key: run `wandb login`, set WANDB_API_KEY, or use mode offline"
            )
    return wandb.init(
        dir=folder,
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=config.name or folder.resolve().name,
        tags=config.tags or None,
        mode=config.mode,
        config=dict(run_config),
        id=id if online else None,
        resume="allow" if online else None,
        reinit="create_new",
        settings=settings,
    )


class Trackers:
    """Several trackers as one."""

    def __init__(self, *members: Tracker) -> None:
        self.members = members

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(place for member in self.members for place in member.places)

    def log(self, metrics: Mapping[str, Number], step: int | None = None) -> None:
        for member in self.members:
            member.log(metrics, step)

    def summary(self, values: Mapping[str, Scalar]) -> None:
        for member in self.members:
            member.summary(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        for member in self.members:
            member.table(name, columns, rows)

    def histogram(
        self, name: str, counts: Sequence[int], edges: Sequence[float], step: int | None = None
    ) -> None:
        for member in self.members:
            member.histogram(name, counts, edges, step)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        for member in self.members:
            member.artifact(path, name, kind)

    def finish(self, exit_code: int = 0) -> None:
        for member in self.members:
            member.finish(exit_code)


def open_tracker(
    folder: Path, config: TrackConfig, run_config: Mapping[str, object], run_id: str
) -> Tracker:
    """The tracker of a run folder: RUN/metrics.jsonl and, if the config says so, wandb.

    Args:
        run_config: the run's whole config, shown in wandb.
        run_id: the manifest's id; an online run that was interrupted goes on under it.
    """
    if config.backend == "none":
        return NullTracker()
    jsonl = JsonlTracker(folder / "metrics.jsonl")
    if config.backend == "jsonl":
        return jsonl
    return Trackers(jsonl, WandbTracker(lambda: _start_wandb(folder, config, run_config, run_id)))

"""Results of trials in a folder, one file a simulation, so that a run that was cut off goes on.

A file holds a line of JSON for what the trials were run on, and one for each trial that is done. A
last line that was cut off is dropped.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

FORMAT = "emotion-atlas trials 1"


class OtherTrials(Exception):
    """The folder holds results of another setting, or of other code."""


class Store:
    """The results in a folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, head: dict[str, Any]) -> None:
        """`head` is what results depend on beside the simulation and the trial."""
        self.folder = folder
        self.head = {"format": FORMAT, **head}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, simulation: str) -> dict[str, Any]:
        """What is known of a simulation, by trial.

        Raises:
            OtherTrials: results that this run would not give.
        """
        path = self._path(simulation)
        if not path or not path.exists():
            return {}
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        head, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        if head is not None and head != self.head:
            other = next(k for k in self.head if k not in head or head[k] != self.head[k])
            raise OtherTrials(
                f"{path} is of another {other}, and its results can't be mixed with those of this "
                "run: give an empty folder, or the settings and code of that run"
            )
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        return {line["trial"]: line["result"] for line in lines}

    def add(self, simulation: str, trial: str, result: Any) -> None:
        """Keep the result of a trial: it is on disk when this returns."""
        path = self._path(simulation)
        if not path:
            return
        new = not path.exists() or path.stat().st_size == 0
        lines = [self.head] if new else []
        lines.append({"trial": trial, "result": result})
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _path(self, simulation: str) -> Path | None:
        return self.folder / f"{simulation}.jsonl" if self.folder else None


def plain(value: Any) -> Any:
    """A value as it is when it has been written as JSON and read again."""
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) else value))  # pyright: ignore[reportArgumentType]


def code(names: Sequence[str]) -> str:
    """A digest of the source of all loaded modules that begin with one of some names."""
    digest = hashlib.sha256()
    for name in sorted(sys.modules):
        path = getattr(sys.modules[name], "__file__", None)
        if path and name.partition(".")[0] in names:
            digest.update(f"{name}\n".encode() + Path(path).read_bytes())
    return digest.hexdigest()[:16]

"""Time things against each other fairly, and report in the one form all benchmarks share."""

import atexit
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("torch", "numpy", "transformers", "sae-lens", "transformer-lens", "eai-sparsify")
DONE = "benchmark step done "


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Call every run once a round, in turn, so that a busy machine slows all of them alike.

    A run that works on a GPU must wait for it before it returns.

    Args:
        runs: By name, what to time.
        rounds: Timed calls of each.
        warmup: Untimed calls of each before them.

    Returns:
        By name, the median seconds of a call.
    """
    timed = turns(runs, rounds, warmup)
    return {name: statistics.median(values) for name, values in timed.items()}


def turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """As `interleave`, but the seconds of every call: those of one round were taken together."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def worker(command: Sequence[str]) -> Callable[[], float]:
    """Start a process that calls `serve`, so that a run has memory and settings to itself.

    Returns:
        A run for `interleave`, which gives the process's `peak_mib`.
    """
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    requests, answers = process.stdin, process.stdout
    assert requests is not None
    assert answers is not None

    def run() -> float:
        requests.write("run\n")
        requests.flush()
        for line in answers:
            if line.startswith(DONE):
                return float(line.removeprefix(DONE))
        raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")

    return run


def serve(run: Callable[[], object]) -> None:
    """In a process of `worker`: call `run` whenever it is asked to."""
    for _ in sys.stdin:
        run()
        sys.stdout.write(f"{DONE}{peak_mib()}\n")
        sys.stdout.flush()


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB; a GPU's where it has used one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux; there getrusage would give a parent's peak where that is higher
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def versions(*more: str) -> dict[str, str]:
    """Python, the processor or GPU, and the version of every package in question that is here."""
    found = {"python": platform.python_version(), "machine": _machine()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    torch = sys.modules.get("torch")
    if torch is None:
        return platform.machine()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def ratios(
    ours: float, peers: Mapping[str, float], better: Literal["lower", "higher"]
) -> dict[str, float]:
    """By peer, how many times better ours is."""
    return {
        name: round(value / ours if better == "lower" else ours / value, 3)
        for name, value in peers.items()
    }


def report(
    name: str,
    ours: float,
    unit: str,
    peers: Mapping[str, float],
    *,
    better: Literal["lower", "higher"] = "lower",
    **more: Any,
) -> None:
    """Write a benchmark's result as one line of JSON; nothing may be written after it.

    Args:
        name: Of the benchmark, as `make bench NAME=...` has it.
        ours: Our figure.
        unit: Of ours and of the peers' figures.
        peers: By peer, its figure.
        better: Whether the lower or the higher figure is the better one.
        more: Further figures, JSON-able, beside the shared ones.
    """
    line = {
        "name": name,
        "ours": ours,
        "unit": unit,
        "peers": dict(peers),
        "ratio": ratios(ours, peers, better),
        "peak_mib": round(peak_mib(), 1),
        "versions": versions(),
        **more,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows for people to read, the first column left-aligned and the others right-aligned."""
    cells = [
        [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in (columns, *rows)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        first, *others = row
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        sys.stdout.write("  ".join(line).rstrip() + "\n")
    sys.stdout.flush()

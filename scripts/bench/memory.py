"""Resident memory of harvesting and of training, at 10 %, 50 % and 100 % of the way: it is flat.

    make bench NAME=memory
    python scripts/bench/memory.py --tokens 1000000

Three phases on the packaged model and stories, each in a process of its own: harvesting two sites
to shards; training two SAEs on residuals of the live model; training them on the shards. What each
holds beside model and optimizer is set by the config: a chunk or buffer of residuals, in MiB.
A mark is the most that was resident in the tenth of the way that ends there (every pass of the
model rises and falls by some 50 MiB); the figure is the most that any phase exceeded its first
tenth by. What saving takes at the end (residuals to set thresholds on, copies of the weights) is
beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from harness import peak_mib, report, table

from saes.lm.model import load_lm
from saes.stream.activations import Activations, ActivationStream, StreamConfig
from saes.stream.shards import HarvestConfig, ShardStream, ShardStreamConfig, estimate, harvest
from saes.text.prepare import TextConfig, open_tokens, write_tokens
from saes.training.architectures import SaeSpec, TrainConfig
from saes.training.train import train_saes

ROOT = Path(__file__).resolve().parents[2]
SITES = ("blocks.3.hook_resid_post", "blocks.5.hook_resid_post")
HARVEST = HarvestConfig(shard_rows=32, pass_rows=16, dtype="bfloat16")
STREAM = StreamConfig(batch=1024, chunk_rows=32, pass_rows=16)
SHARDS = ShardStreamConfig(batch=1024, buffer=8_192, block=64)
PHASES = ("harvest", "train on the live model", "train on shards")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.phase:
        marks, budget = run(args.phase, args.work, args.tokens)
        sys.stdout.write(json.dumps({"marks": marks, "budget": budget, "peak": peak_mib()}) + "\n")
        return
    with tempfile.TemporaryDirectory() as work:
        found = {phase: ask(phase, args, work) for phase in PHASES}
    figures: dict[str, dict[str, float]] = {}
    for phase, result in found.items():
        marks = result["marks"]
        figures[phase] = {
            "10 %": most(marks, 0.0, 0.1),
            "50 %": most(marks, 0.4, 0.5),
            "100 %": most(marks, 0.9, 1.0),
            "growth": max(0.0, most(marks, 0.1, 1) - most(marks, 0, 0.1)),
            "saving": most(marks, 1, 2),
            "by config": result["budget"],
        }
    sys.stdout.write("Resident memory, MiB\n")
    rows = [(phase, *(round(mib, 1) for mib in row.values())) for phase, row in figures.items()]
    table(("phase", *next(iter(figures.values()))), cast("list[tuple[object, ...]]", rows))
    report(
        "memory",
        round(max(row["growth"] for row in figures.values()), 1),
        "MiB of growth",
        {},
        phases={p: {k: round(v, 1) for k, v in row.items()} for p, row in figures.items()},
        tokens=args.tokens,
        peak_mib=round(max(result["peak"] for result in found.values()), 1),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=600_000, help="of each phase")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def ask(phase: str, args: argparse.Namespace, work: str) -> dict[str, Any]:
    """A phase in a process of its own."""
    options = ["--tokens", str(args.tokens), "--threads", str(args.threads), "--work", work]
    command = [sys.executable, str(Path(__file__)), "--phase", phase, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(phase: str, work: Path, tokens: int) -> tuple[list[tuple[float, float]], float]:
    """[(share done, resident MiB)] of a phase, and the buffers that its config asks for, in MiB."""
    lm = load_lm("packaged/demo_lm")
    source = str(ROOT / "discovery/data/corpus/stories*.jsonl")
    text = TextConfig(source, tokens=tokens, held_out_tokens=0, epochs=1 + tokens // 700_000)
    rows = (
        write_tokens(work / "text", lm, text) if phase == PHASES[0] else open_tokens(work / "text")
    )
    if phase == PHASES[0]:
        plan = estimate(lm, rows.train, SITES, HARVEST, bos=rows.bos)
        out = work / "shards"

        def share() -> float:
            return sum(p.stat().st_size for p in out.rglob("*.safetensors")) / plan.bytes

        def work_on() -> None:
            harvest(lm, rows.train, SITES, out, HARVEST, bos=rows.bos)

        budget = HARVEST.pass_rows * rows.train.shape[1] * lm.d_model * 4 * len(SITES)
        return watched(work_on, share), budget / 2**20
    if phase == PHASES[1]:
        stream: Activations = ActivationStream(lm, rows.train, SITES, STREAM, bos=rows.bos)
        budget = STREAM.chunk_rows * rows.train.shape[1] * lm.d_model * 4 * len(SITES)
    else:
        stream = ShardStream(work / "shards", SHARDS, lm=lm)
        budget = SHARDS.buffer * lm.d_model * 2 * len(SITES)
    return trained(stream, work / phase.split()[-1], tokens), budget / 2**20


class Counted:
    """A stream that knows how many batches it gave."""

    def __init__(self, stream: Activations) -> None:
        self.stream, self.given = stream, 0

    def __next__(self) -> Any:
        self.given += 1
        return next(self.stream)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def trained(stream: Activations, out: Path, tokens: int) -> list[tuple[float, float]]:
    """Marks of training two SAEs on a stream."""
    counted = Counted(stream)
    specs = [SaeSpec(site, "topk", d_sae=2048, k=32) for site in SITES]
    # a checkpoint within the first tenth: all kinds of work have been done once by then
    config = TrainConfig(tokens=tokens, checkpoint_steps=max(1, tokens // stream.batch // 15))
    return watched(
        lambda: train_saes(cast("Activations", counted), specs, config, out / "saes", out / "work"),
        lambda: min(1.0, counted.given * stream.batch / tokens),
    )


def watched(work: Callable[[], object], share: Callable[[], float]) -> list[tuple[float, float]]:
    """Do the work; (share done, resident MiB) a hundred times a second."""
    marks: list[tuple[float, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            marks.append((share(), resident_mib()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    return [*marks, (1.0, resident_mib())]


def resident_mib() -> float:
    """Memory of this process that is resident now (Linux; elsewhere the most so far)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_mib()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def most(marks: list[tuple[float, float]], begin: float, end: float) -> float:
    """The most that was resident between two shares of the way."""
    return max(mib for done, mib in marks if begin <= done < end)


if __name__ == "__main__":
    main()

"""Does the verdict protocol keep its error rates, and do its intervals hold? By simulation.

    python scripts/validate_discovery.py                    # planted worlds, all simulations
    python scripts/validate_discovery.py --run runs/demo    # shuffles of a run's captured texts
    python scripts/validate_discovery.py --only shuffled planted
    python scripts/validate_discovery.py --trials planted=20 few=30
    python scripts/validate_discovery.py --out trials       # goes on where it was cut off
    python scripts/validate_discovery.py --fast             # a smoke test: under a minute

Prints tables in Markdown and, as its last line, all figures in JSON; progress goes to the standard
error output, a line at a time. Ends with status 1 where a check is not met. The same seed and
options give the same figures with any number of workers, cut off or not.
docs/statistics.md explains what is simulated and why.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trial_store import OtherTrials, Store, code, plain

if TYPE_CHECKING:
    from trials import Setting

SIMULATIONS = ("shuffled", "half", "planted", "few", "one-corpus", "naive", "ways", "intervals")
ON_A_RUN = SIMULATIONS[:2]  # what real activations without known answers allow
SECONDS = 20  # between lines of progress
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Plan:
    """How many trials of each simulation; the numbers can be set by `--trials`."""

    shuffled: int = 200
    half: int = 100
    planted: int = 100
    few: int = 160
    halves: int = 80
    crossfit: int = 30
    naive: int = 40
    ways: int = 20
    aurocs: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    """Of the latents whose intervals are tried."""
    positives: tuple[int, ...] = (12, 60, 200)
    """Texts of the concept in a corpus without topics."""
    intervals: int = 3
    """Trials of each kind of interval at each AUROC, of `Setting.intervals` latents each."""


@dataclass(frozen=True)
class Task:
    """One trial: arguments of a function of `trials`, `recipe_trials` or `interval_trials`."""

    simulation: str
    trial: str
    seed: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def cost(self) -> float:
        """Seconds, roughly; the estimate of the time that is left weighs trials by it."""
        return COSTS[self.trial]

    @property
    def name(self) -> str:
        """Of the trial, among those of its simulation."""
        return f"{self.trial} {self.seed} {json.dumps(self.options)}"


COSTS = {"shuffled": 2.0, "half": 1.8, "planted": 1.6, "few": 1.0, "halves": 2.0,
         "crossfit": 11.5, "naive": 0.8, "ways": 4.5, "topics": 1.9, "flat": 1.3,
         "difference": 0.2, "mean": 0.6}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        The exit status: 1 where a check is not met.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    usual = " ".join(f"{name}={n}" for name, n in vars(Plan()).items() if isinstance(n, int))
    parser.add_argument(
        "--trials", nargs="+", default=[], metavar="NAME=N", help=f"how many trials ({usual})"
    )
    parser.add_argument("--run", default="", help="a run folder: shuffle its captured texts")
    parser.add_argument("--only", nargs="+", choices=SIMULATIONS, help="some simulations")
    parser.add_argument("--fast", action="store_true", help="small worlds and few trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder to keep results in, and to go on from")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: in this one")
    args = parser.parse_args(arguments)
    if args.run and not (Path(args.run) / "capture").is_dir():
        parser.error(f"--run {args.run} has no capture stage; give a run folder that has one")
    only = args.only or (ON_A_RUN if args.run else SIMULATIONS)
    if args.run and (known := sorted(set(only) - set(ON_A_RUN))):
        parser.error(f"{known[0]} needs planted worlds; --run goes with {' and '.join(ON_A_RUN)}")

    try:
        plan, setting = sizes(args)
    except ValueError as error:
        parser.error(str(error))

    from validation_tables import REPORTS

    start = time.perf_counter()
    work = list(tasks(plan, setting, only, args.seed))
    try:
        results = run(work, setting, args.workers, args.out)
    except OtherTrials as error:
        parser.error(str(error))
    figures: dict[str, Any] = {"name": "validate-discovery", "seed": args.seed, "run": args.run}
    checks: dict[str, bool] = {}
    for name in only:
        own = [(task, result) for task, result in results if task.simulation == name]
        text, figures[name], met = REPORTS[name](own)
        sys.stdout.write(text + "\n")
        checks |= met
    sys.stdout.write("## Checks\n\n")
    for what, met in checks.items():
        sys.stdout.write(f"- {'met' if met else 'NOT MET'}: {what}\n")
    seconds = round(time.perf_counter() - start, 1)
    sys.stdout.write("\n" + json.dumps({**figures, "checks": checks, "seconds": seconds}) + "\n")
    sys.stdout.flush()
    return 0 if all(checks.values()) else 1


def sizes(args: argparse.Namespace) -> tuple[Plan, "Setting"]:
    """How many trials, and of what size."""
    from planted import Design
    from trials import Setting

    small = Design(
        families=5, strengths=(0.75, 0.85, 0.92), each=4, neighbours=0, shared=0, spread=0,
        decoys=0, latents=1000, deaf=200, writers=(4, 4), mentions=0,
    )  # fmt: skip
    few = Design(
        strengths=(0.92,), neighbours=0, shared=0, spread=0, decoys=0, latents=500, deaf=100,
        mentions=0,
    )  # fmt: skip
    plan, setting = Plan(), Setting(Design(), small, few, run=args.run)
    if args.fast:
        plan = Plan(shuffled=8, half=4, planted=4, few=4, halves=4, crossfit=2, naive=4, ways=1,
                    aurocs=(0.7, 0.92), positives=(12,), intervals=1)  # fmt: skip
        fast = Design(
            families=6, strengths=(0.75, 0.92), each=6, neighbours=2, spread=2, decoys=4,
            latents=300, deaf=60,
        )  # fmt: skip
        setting = Setting(
            fast, replace(small, latents=200), replace(few, families=6, each=3, latents=200),
            run=args.run, intervals=30, draws=200,
        )  # fmt: skip
    return replace(plan, **counts(args.trials)), setting


def counts(given: Sequence[str]) -> dict[str, int]:
    """Numbers of trials from words like planted=20.

    Raises:
        ValueError: a word that is none.
    """
    known = [name for name, n in vars(Plan()).items() if isinstance(n, int)]
    result = dict[str, int]()
    for word in given:
        name, _, number = word.partition("=")
        if name not in known or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"--trials {word} is not NAME=N with N from 1 on and a name of {', '.join(known)}"
            )
        result[name] = int(number)
    return result


def tasks(plan: Plan, setting: "Setting", only: Sequence[str], seed: int) -> Iterator[Task]:
    """All trials of the simulations wanted, long ones first, each with a seed of its own."""
    of = {
        "one-corpus": {"crossfit": plan.crossfit, "halves": plan.halves},
        "ways": {"ways": plan.ways},
        "planted": {"planted": plan.planted},
        "few": {"few": plan.few},
        "half": {"half": plan.half},
        "shuffled": {"shuffled": plan.shuffled},
        "naive": {"naive": plan.naive},
    }
    for simulation, trials in of.items():
        for trial, n in trials.items():
            if simulation in only:
                yield from (Task(simulation, trial, seed * 1_000_000 + i) for i in range(n))
    if "intervals" not in only:
        return
    kinds: list[tuple[str, dict[str, Any]]] = [
        *(("flat", {"positives": n}) for n in plan.positives),
        ("topics", {}),
        ("difference", {}),
        ("mean", {}),
    ]
    number = 0
    for kind, own in kinds:
        for auroc in plan.aurocs:
            for _ in range(plan.intervals):
                number += 1
                options = {"auroc": auroc, "n": setting.intervals, **own}
                if kind in ("flat", "topics"):
                    options["draws"] = setting.draws
                if kind == "mean":
                    options["n"] = setting.intervals // 5
                yield Task("intervals", kind, seed * 1_000_000 + number, tuple(options.items()))


def run(
    work: Sequence[Task], setting: "Setting", workers: int, out: Path | None = None
) -> list[tuple[Task, Any]]:
    """The results in the order of the tasks, by any number of processes.

    Args:
        work: the trials.
        setting: what they are run on.
        workers: processes; 0 for this one.
        out: a folder for results: those that it holds are not made again.

    Raises:
        OtherTrials: the folder's results are of another setting, or of other code.
    """
    store = Store(out, {"setting": plain(setting), "code": trials_code()})
    known = {name: store.read(name) for name in sorted({task.simulation for task in work})}
    results = {
        i: known[task.simulation][task.name]
        for i, task in enumerate(work)
        if task.name in known[task.simulation]
    }
    left = [i for i in range(len(work)) if i not in results]
    tell = progress([work[i] for i in left], len(results))

    def done(i: int, result: Any) -> None:
        results[i] = plain(result)
        store.add(work[i].simulation, work[i].name, results[i])
        tell(work[i])

    if not workers:
        for i in left:
            done(i, one(work[i], setting))
    elif left:
        os.environ |= dict.fromkeys(THREADS, "1")  # read when a worker imports numpy
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(one, work[i], setting): i for i in left}
            for future in as_completed(futures):
                done(futures[future], future.result())
    return [(task, results[i]) for i, task in enumerate(work)]


def progress(work: Sequence[Task], known: int) -> Callable[[Task], None]:
    """What to call after each trial: it says where things are, every `SECONDS` and at the end."""
    start, total, said, gone, count = time.perf_counter(), sum(t.cost for t in work), 0.0, 0.0, 0
    if known:
        sys.stderr.write(f"{known} trials are known already, {len(work)} are left\n")

    def tell(task: Task) -> None:
        nonlocal said, gone, count
        gone, count = gone + task.cost, count + 1
        seconds = time.perf_counter() - start
        if seconds - said < SECONDS and count < len(work):
            return
        said = seconds
        left = seconds * (total - gone) / gone
        sys.stderr.write(
            f"{count} of {len(work)} trials, {gone / total:.0%} of the work, now {task.trial}: "
            f"{seconds / 60:.1f} minutes, {left / 60:.1f} left\n"
        )
        sys.stderr.flush()

    return tell


def trials_code() -> str:
    """A digest of all code that trials run."""
    import interval_trials
    import recipe_trials

    return code(
        ("discovery", "planted", "trials", recipe_trials.__name__, interval_trials.__name__)
    )


def one(task: Task, setting: "Setting") -> Any:
    """One trial, with one thread, so that sums do not depend on the number of processes."""
    import interval_trials
    import recipe_trials
    import trials
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        if task.simulation == "intervals":
            return interval_trials.TRIALS[task.trial](task.seed, **dict(task.options))
        return (trials.TRIALS | recipe_trials.TRIALS)[task.trial](setting, task.seed)


if __name__ == "__main__":
    sys.exit(main())

"""All scores of all pairs of a feature and a concept, beside a loop over scikit-learn.

    make bench NAME=scores
    python scripts/bench/scores.py --large

`ours` is `discovery.scores.score_pairs`, from sparse activations to q-values. `ranking` is what it
cannot do without, done in the same way by the same workers: turning the activations by columns and
ranking every feature, over all texts and within topics. `scikit-learn` is `roc_auc_score` in a loop
over pairs, the AUROC over all texts alone: a sample of pairs is timed and the time multiplied.
`input` holds the activations and does nothing. Each has a process of its own; rounds are
interleaved; the figure is the median. Activations are planted at random with ties, labels and
topics at random; a text has one concept.

`--large` also runs ours once at 131,072 features and 50,000 texts at 1 %, for its memory.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from harness import interleave, report, serve, table, versions, worker
from scipy.sparse import csr_array

from discovery.labels import Labels, single
from discovery.scores import rank_only, score_pairs

RUNS = ("ours", "ranking", "scikit-learn", "input")


class Shape(NamedTuple):
    """Of the activations and labels."""

    features: int
    concepts: int
    texts: int
    density: float
    topics: int


LARGE = Shape(131_072, 171, 50_000, 0.01, 100)


def main() -> None:
    args = parse()
    shape = Shape(*(getattr(args, name) for name in Shape._fields))
    if args.serve:
        serve(run_of(args.serve, shape, args.workers, args.sample))
        return
    runs = {name: start(name, shape, args) for name in RUNS}
    peaks = {name: run() for name, run in runs.items()}
    seconds = interleave(runs, args.rounds, warmup=0)
    pairs = shape.features * shape.concepts
    looped = seconds["scikit-learn"] * pairs / args.sample
    apart = agreement(shape, args.sample)
    above = peaks["ours"] - peaks["input"]
    rows = [
        ("ours", seconds["ours"], peaks["ours"]),
        ("ranking alone", seconds["ranking"], peaks["ranking"]),
        (f"scikit-learn, from {args.sample} of {pairs} pairs", looped, peaks["scikit-learn"]),
        ("the input, held", 0.0, peaks["input"]),
    ]
    sys.stdout.write(f"{shape}, {args.workers} workers, median of {args.rounds} rounds\n")
    table(("", "s", "times ours", "peak MiB"), [(n, s, s / seconds["ours"], m) for n, s, m in rows])
    sys.stdout.write(
        f"Ours is {seconds['ours'] / seconds['ranking']:.2f} times the ranking alone, holds "
        f"{above:.0f} MiB above the input, and is {apart:.1e} from scikit-learn at most.\n"
    )
    large = {}
    if args.large:
        run = start("ours", LARGE, args)
        large = {"shape": LARGE._asdict(), "peak_mib": run()}
        large["s"] = interleave({"ours": run}, 1, warmup=0)["ours"]
        sys.stdout.write(f"{LARGE}: {large['s']:.1f} s, peak {large['peak_mib']:.0f} MiB\n")
    report(
        "scores",
        round(seconds["ours"], 3),
        "s",
        {"scikit-learn": round(looped, 1)},
        ranking=round(seconds["ranking"], 3),
        times_ranking=round(seconds["ours"] / seconds["ranking"], 3),
        peak_mib=round(peaks["ours"], 1),
        above_input_mib=round(above, 1),
        largest_difference=apart,
        shape=shape._asdict(),
        workers=args.workers,
        large=large,
        versions=versions("scipy", "scikit-learn"),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.split("\n")[0])
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--concepts", type=int, default=171)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05, help="share that is not zero")
    parser.add_argument("--topics", type=int, default=100, help="groups of texts")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--sample", type=int, default=300, help="pairs given to scikit-learn")
    parser.add_argument("--large", action="store_true", help="also run the large shape, once")
    parser.add_argument("--serve", choices=RUNS, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(name: str, shape: Shape, args: argparse.Namespace) -> Callable[[], float]:
    """A process of its own that holds the input and does one run whenever it is asked to."""
    options = [f"--{key}={value}" for key, value in shape._asdict().items()]
    options += [f"--workers={args.workers}", f"--sample={args.sample}", f"--serve={name}"]
    return worker([sys.executable, sys.argv[0], *options])


def run_of(name: str, shape: Shape, workers: int, sample: int) -> Callable[[], object]:
    x, labels = activations(shape), labels_of(shape)
    if name == "ours":
        return lambda: score_pairs(x, labels, workers=workers)
    if name == "ranking":
        return lambda: rank_only(x, labels, workers=workers)
    if name == "input":
        return lambda: x
    columns, of_pairs = sampled(x, labels, sample)
    return lambda: loop(columns, of_pairs)


def activations(shape: Shape) -> csr_array:
    """Non-zeros at random places, some of them tied; it takes no more memory than its result."""
    rng = np.random.default_rng(0)
    cells = shape.features * shape.texts
    room = int(cells * shape.density * 1.01) + 10_000
    data, indices = np.empty(room, np.float32), np.empty(room, np.int32)
    fires = np.zeros(shape.texts, np.int64)
    used, last = 0, -1
    while last < cells:
        place = last + np.cumsum(rng.geometric(shape.density, 1 << 16))
        last = int(place[-1])
        place = place[place < cells]
        text, feature = np.divmod(place, shape.features)
        stop = used + len(place)
        data[used:stop] = np.ceil(rng.standard_exponential(len(place)) * 1024) / 1024
        indices[used:stop] = feature
        fires += np.bincount(text, minlength=shape.texts)
        used = stop
    indptr = np.append(0, np.cumsum(fires)).astype(np.int32)
    return csr_array((data[:used], indices[:used], indptr), shape=(shape.texts, shape.features))


def labels_of(shape: Shape) -> Labels:
    rng = np.random.default_rng(1)
    concepts = rng.permutation(np.arange(shape.texts) % shape.concepts)
    topics = rng.permutation(np.arange(shape.texts) % shape.topics)
    return single(concepts, shape.concepts, topics, np.arange(shape.texts))


def sampled(
    x: csr_array, labels: Labels, sample: int
) -> tuple[dict[int, np.ndarray], list[tuple[int, int, np.ndarray]]]:
    """Some pairs: by feature its activations, and the feature, concept and positives of each."""
    rng = np.random.default_rng(2)
    features = np.sort(rng.choice(x.shape[1], min(30, x.shape[1]), replace=False))
    columns = {int(f): x[:, [int(f)]].toarray()[:, 0] for f in features}
    pairs = [
        (int(f), int(c), labels.of(int(c)))
        for f, c in zip(
            rng.choice(features, sample), rng.integers(0, labels.n_concepts, sample), strict=True
        )
    ]
    return columns, pairs


def loop(columns: dict[int, np.ndarray], pairs: list[tuple[int, int, np.ndarray]]) -> list[float]:
    from sklearn.metrics import roc_auc_score

    return [float(roc_auc_score(positive, columns[f])) for f, _, positive in pairs]


def agreement(shape: Shape, sample: int) -> float:
    """The largest difference between our AUROCs over all texts and scikit-learn's."""
    x, labels = activations(shape), labels_of(shape)
    columns, pairs = sampled(x, labels, sample)
    ours = score_pairs(csr_array(np.stack(list(columns.values()), axis=1)), labels).auroc_pooled
    row = {feature: i for i, feature in enumerate(columns)}
    own = [float(ours[row[f], c]) for f, c, _ in pairs]
    return float(np.abs(np.array(own) - loop(columns, pairs)).max())


if __name__ == "__main__":
    main()

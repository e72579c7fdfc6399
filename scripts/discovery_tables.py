"""What readers of latents reach beside dense readers and word counts, on three pairs of model and
texts.

    python scripts/discovery_tables.py --data DATA [--only demo stories260k goemotions]

1. `demo`: the packaged model and SAEs on the packaged corpus, 171 concepts (the run of
   `make demo`, which is not done again).
2. `stories260k`: a story model of 260,032 parameters (DATA/models/stories260K) on the packaged
   corpus; its SAEs are trained here, on text that the model writes.
3. `goemotions`: the packaged model and SAEs on Reddit comments with 27 emotions
   (DATA/emotion/goemotions: train.tsv selects, dev.tsv and test.tsv confirm).

Every run is `emotion-atlas discover` on a config; its folder (under --runs, but for the demo's) has
the report with all figures, and a second start goes on where the first stopped. In the tables an
AUROC is the mean over concepts with its 95 % interval over concepts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import emotion_atlas
from discovery.evaluate import Discovery
from discovery.records import VERDICTS
from labeling.prose import interval, method_name
from labeling.summary import mean_interval
from saes.config import load, read
from saes.errors import UserError
from saes.tables import markdown
from saes.training.run import train_run
from saes.training.settings import TrainRunConfig

METHODS = (
    "latent", "set", "vector", "probe", "tfidf", "embedding",
    "random", "untrained", "untrained set", "randomised", "randomised set",
)  # fmt: skip
STORY_SITES = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
DEMO = {
    "model": "packaged/demo_lm",
    "saes": [
        "packaged/demo_saes/blocks.3.hook_resid_post",
        "packaged/demo_saes/blocks.5.hook_resid_post",
    ],
}


def demo(_: Path, __: Path) -> dict[str, object]:
    """The packaged model on the packaged corpus: the run of `make demo`, in its folder."""
    return read(emotion_atlas.demo_config())


def stories260k(runs: Path, data: Path) -> dict[str, object]:
    """The smallest story model on the packaged corpus; trains its SAEs first."""
    model, folder = str(data / "models" / "stories260K"), runs / "stories260k_saes"
    tree = {
        "run": str(folder),
        "model": {"name": model},
        "text": {"source": "sample", "tokens": 400_000, "held_out_tokens": 16_000, "epochs": 4},
        "stream": {"chunk_rows": 128},
        "saes": [{"architecture": "topk", "sites": list(STORY_SITES), "d_sae": [1024], "k": [16]}],
        "train": {"tokens": 400_000, "lr": 2e-3, "dead_tokens": 100_000},
        "quality_rows": 60,
        "track": {"backend": "jsonl"},
    }
    train_run(load(TrainRunConfig, tree))
    saes = sorted(str(path.parent) for path in (folder / "saes").rglob("cfg.json"))
    return {
        "run": str(runs / "stories260k"),
        "subject": {"model": model, "saes": saes},
        "capture": {"long": "chunk"},  # many stories are longer than its 512 tokens
        "track": {"backend": "jsonl"},
    }


def goemotions(runs: Path, data: Path) -> dict[str, object]:
    """The packaged model on Reddit comments."""
    files = {"train.tsv": "selection", "dev.tsv": "confirmation", "test.tsv": "confirmation"}
    folder = data / "emotion" / "goemotions"
    comments = [
        {"source": str(folder / file), "mapping": "goemotions", "role": role}
        for file, role in files.items()
    ]
    neutral = {"source": "packaged", "role": "neutral"}
    return {
        "run": str(runs / "goemotions"),
        "subject": DEMO,
        "concepts": {"set": "goemotions27"},
        "corpora": [*comments, neutral],
        "track": {"backend": "jsonl"},
    }


PAIRS: dict[str, Callable[[Path, Path], dict[str, object]]] = {
    "demo": demo,
    "stories260k": stories260k,
    "goemotions": goemotions,
}


def table(run: Path) -> tuple[str, dict[str, object]]:
    """The table of one finished run, and its figures."""
    found = Discovery.load_run(run)
    first = found.alignments[0]
    k = sum(member.concept == first.concept for member in found.members)
    cells = [["method", "selection set", "confirmation set"]]
    figures: dict[str, object] = {}
    for method in METHODS:
        row = [method_name(method, k)]
        for name in ("selection", "confirmation"):
            values = [s.auroc for s in found.scores if (s.method, s.set) == (method, name)]
            mean = mean_interval(values)
            row.append(interval(mean) if mean else "")
            if mean:
                figures[f"{method}/{name}"] = mean.mean
        if any(row[1:]):
            cells.append(row)
    text = markdown(cells)
    for control in found.controls:
        counts = (control.found, control.found_as_a_set, control.found_for_the_family,
                  control.lexical_only, control.not_found)  # fmt: skip
        figures[f"verdicts/{control.labels}"] = dict(zip(VERDICTS, counts, strict=True))
        line = ", ".join(f"{n} {verdict}" for n, verdict in zip(counts, VERDICTS, strict=True))
        text += f"{control.labels} labels: {line}\n"
    text += f"site: {first.site}, pooling: {first.pooling}\n"
    return text, figures


def main(argv: Sequence[str] | None = None) -> int:
    """The tables of all pairs: 0 when all went well, 2 for input to be mended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and emotion/")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"), help="run folders")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    args = parser.parse_args(argv)
    try:
        _run(args)
    except UserError as error:
        sys.stderr.write(f"discovery_tables: error: {error}\n")
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    figures: dict[str, object] = {}
    texts: list[str] = []
    for name in args.only:
        tree = PAIRS[name](args.runs, args.data)
        config = load(emotion_atlas.RunConfig, tree)
        emotion_atlas.run(config, last="discovery")
        text, figures[name] = table(Path(config.run))
        texts.append(f"\n{name}\n\n{text}")
    sys.stdout.write("".join(texts) + "\n" + json.dumps(figures) + "\n")


if __name__ == "__main__":
    sys.exit(main())

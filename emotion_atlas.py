"""The front door: the stages in order, and the command line.

    emotion-atlas demo                      the packaged demo, configs/demo.yaml
    emotion-atlas train CONFIG [--set k=v]  train SAEs, configs/train.yaml
    emotion-atlas saes ACTION               list, check, judge, publish and fetch SAEs
    emotion-atlas concepts ACTION           the concept sets, and checks of your own
    emotion-atlas corpora ACTION            the label mappings, and checks of your texts
    emotion-atlas discover CONFIG           which latents stand for which concepts, and how sure
    emotion-atlas run CONFIG [--set k=v]    all of it; the same command goes on where it stopped
    emotion-atlas browse RUN                the catalog of a run, in the browser

Heavy packages are imported when a stage needs them, so help answers at once; a finished run does
when its texts have been read, since they tell whether it is finished.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = {"report": "report/report.html", "catalog": "catalog/catalog.sqlite"}  # in a run folder
DISCOVERED = "discovery/report.html"  # what `discover` leaves


def _check_packages() -> None:
    """Our package names are generic: stop when others of these names would be imported instead."""
    for name in ("saes", "discovery", "labeling"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != HERE / name:
            sys.exit(
                f"emotion-atlas: error: package {name!r} is found at {found}, not beside "
                f"{Path(__file__).name}; another distribution shadows it: use a fresh environment"
            )


_check_packages()

from threadpoolctl import (  # noqa: E402  # pyright: ignore[reportMissingTypeStubs]
    threadpool_limits,
)

from discovery import commands as text_commands  # noqa: E402
from discovery.corpora.source import Source  # noqa: E402
from discovery.settings import (  # noqa: E402
    AlignConfig,
    CaptureConfig,
    CausalConfig,
    ConceptsConfig,
    ContrastConfig,
    OutputConfig,
    Texts,
    open_texts,
)
from labeling.settings import LabelConfig  # noqa: E402
from saes import commands as sae_commands  # noqa: E402
from saes.config import load, override, read, to_dict  # noqa: E402
from saes.errors import UserError  # noqa: E402
from saes.run import Run, check_run, open_run, without_folders  # noqa: E402
from saes.stage import Event, Stage, is_done, run_stages, stage_keys  # noqa: E402
from saes.subject import Subject, SubjectConfig, fingerprints, load_subject  # noqa: E402
from saes.track import TrackConfig, open_tracker  # noqa: E402


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Every field is explained in configs/demo.yaml."""

    run: str
    subject: SubjectConfig
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    corpora: tuple[Source, ...] = (Source("packaged"),)
    seed: int = 0
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


def stages(config: RunConfig, subject: Callable[[], Subject], texts: Texts) -> list[Stage]:
    """The stages of a run, in order. `subject` is called by the stages that need the model.

    Raises:
        UserError: an SAE that cannot be found.
    """
    from discovery import stages as discover
    from labeling import stages as name

    here, seed = Path(config.run).expanduser(), config.seed
    model = fingerprints(config.subject)
    found = ("capture", "contrast", "align", "output")
    results = (*found, "compare", "causal", "label")
    return [
        Stage(
            "capture",
            lambda out: discover.capture(out, subject(), texts, config.capture, seed),
            {"capture": config.capture, "subject": config.subject, "seed": seed},
            external=model | {"texts": texts.fingerprint},
        ),
        Stage(
            "contrast",
            lambda out: discover.contrast(out, here, texts, config.contrast, seed),
            {"contrast": config.contrast, "seed": seed},
            inputs=("capture",),
        ),
        Stage(
            "align",
            lambda out: discover.align(out, here, texts, config.align, config.contrast, seed),
            {"align": config.align, "contrast": config.contrast, "seed": seed},
            inputs=("capture",),
        ),
        Stage(
            "output",
            lambda out: discover.output(out, here, subject(), texts, config.output, seed),
            {"output": config.output, "seed": seed},
            inputs=("capture", "align"),
        ),
        Stage(
            "discovery",
            lambda out: name.discovery(out, here, texts, config.subject),
            inputs=found,
        ),
        Stage(
            "compare",
            lambda out: discover.compare(out, here, subject(), texts, config.contrast, seed),
            {"contrast": config.contrast, "seed": seed},
            inputs=("capture", "contrast", "align"),
        ),
        Stage(
            "causal",
            lambda out: discover.causal(out, here, subject(), texts, config.causal, seed),
            {"causal": config.causal, "seed": seed},
            inputs=("capture", "contrast", "align"),
        ),
        Stage(
            "label",
            lambda out: name.label(out, here, subject(), texts, config.label),
            config.label,
            inputs=("capture", "align"),
        ),
        Stage(
            "catalog", lambda out: name.catalog(out, here, texts, config.subject), inputs=results
        ),
        Stage("report", lambda out: name.report(out, here, texts, config.subject), inputs=results),
    ]


def run(config: RunConfig, last: str = "report") -> None:
    """Run the stages that are not done yet, and print what was found and where to look.

    Nothing is written before the model, the SAEs, the texts and the settings have been found to
    fit.

    Args:
        last: the stage to stop after.

    Raises:
        UserError: anything in the config or its files that the user can mend.
    """
    folder = Path(config.run).expanduser()
    check_run(folder, config)
    subject = cache(lambda: load_subject(config.subject))
    texts = open_texts(config.corpora, config.concepts, config.seed)
    todo = stages(config, subject, texts)
    todo = todo[: 1 + [stage.name for stage in todo].index(last)]
    keys = stage_keys(todo)
    done = all(is_done(folder / stage.name, keys[stage.name]) for stage in todo)
    if not done:
        check_fit(subject(), config, texts, whole=last == "report")
    # numpy's libraries are loaded by now: their threads, like torch's, decide the order of sums
    with open_run(folder, config) as opened, threadpool_limits(config.subject.threads):
        track = replace(config.track, backend="none") if done else config.track
        _run(opened, config, todo, track)


def check_fit(subject: Subject, config: RunConfig, texts: Texts, whole: bool = True) -> None:
    """What can be seen to fail before anything is run.

    Args:
        whole: the run goes on after discovery.

    Raises:
        UserError: the settings ask for more than the model, the SAEs, the tokenizer or the texts
            have, or for more tokens than causal.max_tokens.
    """
    from discovery.discover import check_fit as check_discovery
    from discovery.stages import check_causal

    check_discovery(
        subject.lm, subject.dictionaries, texts, config.capture, config.contrast, config.align,
        config.output, config.seed,
    )  # fmt: skip
    if not whole:
        return
    if config.label.promoted > subject.lm.vocab_size:
        raise UserError(f"label.promoted is more than the {subject.lm.vocab_size} tokens there are")
    check_causal(subject, texts, config.causal, config.seed)


def _run(opened: Run, config: RunConfig, todo: Sequence[Stage], track: TrackConfig) -> None:
    from labeling.stages import summary, tables

    opened.record(inputs={k: v for stage in todo for k, v in stage.external.items()})
    made = {stage.name for stage in todo}
    results = {
        kind: opened.folder / file
        for kind, file in RESULTS.items()
        if Path(file).parent.name in made
    }
    if "report" not in made:
        results["report"] = opened.folder / DISCOVERED
    shown = without_folders(to_dict(config))
    tracker = open_tracker(opened.folder, track, shown, opened.manifest().id)
    exit_code = 1
    try:
        events = run_stages(opened, todo, _tell)
        opened.finish()
        rows = summary(opened.folder, tuple(made))
        tracker.log({f"seconds/{e.stage}": e.seconds for e in events})
        tracker.summary(dict(rows))
        tracker.table("summary", ("figure", "value"), rows)
        for name, columns, values in tables(opened.folder, tuple(made)):
            tracker.table(name, columns, values)
        if any(event.state == "finished" for event in events):
            for kind, file in results.items():
                tracker.artifact(file, f"{opened.folder.resolve().name}-{kind}", kind)
        exit_code = 0
    finally:
        tracker.finish(exit_code)
    _print_summary(rows, events)
    where = {
        "report": str(results["report"]),
        "catalog": f"emotion-atlas browse {opened.folder}" if "catalog" in results else "",
        "tracked": ", ".join(tracker.places),
    }
    for name, place in where.items():
        if place:
            sys.stdout.write(f"{name:<10} {place}\n")


def _tell(event: Event) -> None:
    if event.state == "started":
        sys.stderr.write(f"{event.stage} ...\n")
    elif event.state == "finished":
        sys.stderr.write(f"{event.stage} done in {event.seconds:.1f} s\n")
    else:
        sys.stderr.write(f"{event.stage} was done before\n")


def _print_summary(rows: Sequence[tuple[str, str]], events: Sequence[Event]) -> None:
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("\n" + "".join(f"{name:<{width}}  {value}\n" for name, value in rows))
    made = [e for e in events if e.state == "finished"]
    parts = ", ".join(f"{e.stage} {e.seconds:.1f}" for e in made) or "nothing left to do"
    total = f" (in all {sum(e.seconds for e in made):.1f})" if made else ""
    sys.stdout.write(f"\nseconds    {parts}{total}\n")


def demo_config() -> Path:
    """The demo's config: beside this file in a checkout, in the package when installed."""
    checkout = HERE / "configs" / "demo.yaml"
    return checkout if checkout.exists() else HERE / "saes" / "configs" / "demo.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emotion-atlas",
        description="Find, name, test and browse the SAE features of 171 emotion concepts.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--run", metavar="FOLDER", help="run folder, instead of the config's")
    shared.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="sets",
        help="override a setting of the config, for example --set causal.concepts=6; repeatable",
    )  # fmt: skip
    commands.add_parser("demo", parents=[shared], help="the packaged demo (configs/demo.yaml)")
    one = commands.add_parser(
        "discover", parents=[shared],
        help="verdicts, scores, baselines and controls: the first part of a run",
    )  # fmt: skip
    one.add_argument("config", type=Path, metavar="CONFIG", help="see configs/demo.yaml")
    text_commands.add_source(one)
    one = commands.add_parser("run", parents=[shared], help="a run, from its YAML config")
    one.add_argument("config", type=Path, metavar="CONFIG", help="see configs/demo.yaml")
    one = commands.add_parser("train", parents=[shared], help="train SAEs, from a YAML config")
    one.add_argument("config", type=Path, metavar="CONFIG", help="see configs/train.yaml")
    sae_commands.add_parsers(commands)
    text_commands.add_parsers(commands)
    look = commands.add_parser("browse", help="the catalog of a run, in the browser")
    look.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    look.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (this machine only)"
    )
    look.add_argument("--port", type=int, default=8171)
    look.add_argument("--open", action="store_true", help="open the browser")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when all went well, 2 for input to be mended, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if args.command == "browse":
            from labeling.web.serve import browse

            browse(args.folder, host=args.host, port=args.port, open_browser=args.open)
        elif args.command == "saes":
            sae_commands.dispatch(args)
        elif args.command in ("concepts", "corpora"):
            text_commands.dispatch(args)
        else:
            path = demo_config() if args.command == "demo" else args.config
            tree = read(path)
            if args.command == "discover" and (own := text_commands.sources(args)):
                tree["corpora"] = own
            tree = override(tree, args.sets)
            tree = {**tree, "run": args.run} if args.run else tree
            if args.command == "train":
                from saes.training.run import train_run
                from saes.training.settings import TrainRunConfig

                train_run(load(TrainRunConfig, tree))
            else:
                last = "discovery" if args.command == "discover" else "report"
                run(load(RunConfig, tree), last)
    except UserError as error:
        sys.stderr.write(f"emotion-atlas: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        goes_on = args.command not in ("browse", "saes", "concepts", "corpora")
        sys.stderr.write("\nstopped" + "; the same command goes on from here" * goes_on + "\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

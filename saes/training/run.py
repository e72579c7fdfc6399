"""The run of `emotion-atlas train CONFIG`: text, activations, SAEs, and how good they are.

    RUN/text      rows of tokens, training and held out
    RUN/saes      one folder an SAE, in sae-lens's format
    RUN/quality   figures on held-out text, and the table
    RUN/checkpoints   while training goes on; snapshots stay

A stage is done once and then kept (`saes.stage`). Training itself is safe to interrupt: its
checkpoints lie outside the stage's folder, and so do text and activations while they are made.
"""

import json
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from saes import sources
from saes.config import to_dict
from saes.errors import UserError
from saes.files import write_text
from saes.run import Run, check_run, open_run, without_folders
from saes.stage import Event, Stage, is_done, run_stages, stage_keys
from saes.subject import fingerprint, load_model
from saes.text.documents import Source, pieces, source_hashes
from saes.text.prepare import MANIFEST, SAMPLE, TextConfig
from saes.track import NullTracker, Tracker, open_tracker
from saes.training.architectures import name_specs
from saes.training.settings import ModelConfig, TrainRunConfig

if TYPE_CHECKING:
    import numpy as np

    from saes.latents import SaeLens
    from saes.lm.model import LM
    from saes.quality import Quality
    from saes.stream.activations import Activations, StreamConfig
    from saes.stream.shards import ShardStreamConfig
    from saes.text.prepare import Tokens
    from saes.training.budget import Planned

CHECKPOINTS = "checkpoints"
TABLE = "quality.md"
TRACKED = "tracked.json"  # which SAEs have become artifacts


@contextmanager
def _leaving_on_sigterm() -> Generator[None, None, None]:
    """Let SIGTERM end the block as an error would, so that what is open is closed.

    While SAEs are trained `saes.training.checkpoint.Interrupts` takes its place.
    """

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@_leaving_on_sigterm()
def train_run(config: TrainRunConfig) -> None:
    """Train what the config asks for, judge it, and print where it is; safe to interrupt.

    `saes.config.load(TrainRunConfig, saes.config.read(path))` gives the config of a YAML file.

    Raises:
        UserError: anything in the config or its files that the user can mend.
    """
    folder = Path(config.run).expanduser()
    check_run(folder, config)
    lm = cache(lambda: _load_lm(config.model))
    todo = _stages(config, folder, lm, NullTracker())
    keys = stage_keys(todo)
    done = all(is_done(folder / stage.name, keys[stage.name]) for stage in todo)
    if not done:
        _check_fit(config, folder, lm())
    from threadpoolctl import (
        threadpool_limits,  # pyright: ignore[reportMissingTypeStubs]
    )

    # numpy's libraries are loaded by now: their threads, like torch's, decide the order of sums
    with open_run(folder, config) as opened, threadpool_limits(config.model.threads):
        track = replace(config.track, backend="none") if done else config.track
        shown = without_folders(to_dict(config))
        tracker = open_tracker(opened.folder, track, shown, opened.manifest().id)
        _run(opened, config, lm, tracker)


def _load_lm(config: ModelConfig) -> "LM":
    import torch

    torch.set_num_threads(config.threads)
    return load_model(
        config.name,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        device_map=config.device_map,
        revision=config.revision,
    )


def _check_fit(config: TrainRunConfig, folder: Path, lm: "LM") -> None:
    """What can be seen to fail before anything is written."""
    from saes.training.budget import check_budget, check_room

    for grid in config.saes:
        for site in grid.sites:
            lm.site(site)
    if config.text.context > lm.context:
        raise UserError(
            f"text.context is {config.text.context}, but {lm.name} takes {lm.context} tokens"
        )
    if (text := config.text).source != SAMPLE:
        source = Source(text.source, text.column, text.split, text.name, text.document)
        next(pieces(source), None)  # so that a source which cannot be read is said now
    _stream_config(config)
    watched = config.watch_rows * config.text.context
    planned = _planned(config, lm)
    check_budget(
        planned, config.specs(), folder / CHECKPOINTS, config.train, held_out_tokens=watched
    )
    if config.shards is not None:
        tokens = config.text.tokens // config.text.epochs
        check_room(Path(config.shards).expanduser(), planned, tokens, lm.model.dtype)
    if config.start_from:
        _check_starts(config, planned, lm)


def _planned(config: TrainRunConfig, lm: "LM") -> "Planned":
    """What the activations will be."""
    from saes.stream.activations import About
    from saes.training.budget import Planned

    stream, text = config.stream, config.text
    tokens = stream.chunk_rows * text.context
    about = About(lm.name, text.context, lm.tokenizer.bos_token_id is not None, "")
    return Planned(_sites(config), stream.batch, lm.d_model, tokens, lm.device, about)


def _check_starts(config: TrainRunConfig, planned: "Planned", lm: "LM") -> None:
    """Load the SAEs to begin with, and put each into one as it will be trained."""
    from saes.training.architectures import build
    from saes.training.export import begin_from

    starts = {start.site: start for start in _starts(config, lm)}
    for spec in config.specs():
        if spec.site not in starts or len(starts) != len(_sites(config)):
            raise UserError(
                f"start_from holds SAEs at {', '.join(starts)}, but {', '.join(_sites(config))} "
                "are to be trained; give one for every site"
            )
        trainer = build(spec, config.train, cast("Activations", planned), steps=1)
        begin_from(trainer.sae, spec, starts[spec.site], 1.0)


def _starts(config: TrainRunConfig, lm: "LM") -> "list[SaeLens]":
    from saes.pretrained import load_sae

    return [load_sae(s, d_model=lm.d_model, device=str(lm.device)) for s in config.start_from]


def _stages(
    config: TrainRunConfig, folder: Path, lm: Callable[[], "LM"], tracker: Tracker
) -> list[Stage]:
    """The stages, in order; `lm` is called by those that need the model."""
    model = {config.model.name: fingerprint(config.model.name, config.model.revision)}
    text = _text_files(config.text)
    starts = {name: sources.fingerprint(name) for name in config.start_from}
    stages = [
        Stage(
            "text",
            lambda out: _text(out, folder / CHECKPOINTS / "text", lm(), config.text),
            {"text": config.text, "model": config.model},
            external=model | text,
        ),
        Stage(
            "saes",
            lambda out: _saes(out, folder, lm(), config, tracker),
            {
                "saes": config.saes, "stream": config.stream, "train": config.train,
                "start_from": config.start_from, "watch_rows": config.watch_rows,
                "model": config.model, "shards": config.shards,
            },
            inputs=("text",),
            external=model | starts,
        ),
    ]  # fmt: skip
    if config.quality_rows:
        stages.append(
            Stage(
                "quality",
                lambda out: _quality(out, folder, lm(), config),
                {"quality_rows": config.quality_rows, "model": config.model},
                inputs=("text", "saes"),
                external=model,
            )
        )
    return stages


def _text_files(config: TextConfig) -> dict[str, str]:
    """Hashes of local text files; text of a hub, or sampled, stands for itself."""
    if config.source == SAMPLE:
        return {}
    return {f"text {name}": hashed for name, hashed in source_hashes(config.source).items()}


def _text(out: Path, work: Path, lm: "LM", config: TextConfig) -> None:
    """Rows of tokens, made in `work`, where a later start goes on, and then moved."""
    from saes.text.prepare import write_tokens

    write_tokens(work, lm, config)
    # the manifest first: without it what is left in `work` is not taken for whole
    names = sorted((p.name for p in work.iterdir()), key=lambda name: name != MANIFEST)
    for name in names:
        (work / name).rename(out / name)
    work.rmdir()


def _saes(out: Path, folder: Path, lm: "LM", config: TrainRunConfig, tracker: Tracker) -> None:
    from saes.text.prepare import open_tokens
    from saes.training.train import train_saes

    tokens = open_tokens(folder / "text")
    train_saes(
        _activations(config, lm, tokens),
        config.specs(),
        config.train,
        out,
        folder / CHECKPOINTS,
        held_out=_watched(config, lm, tokens),
        tracker=tracker,
        start_from=_starts(config, lm),
    )


def _sites(config: TrainRunConfig) -> tuple[str, ...]:
    """The sites of all SAEs, each once, in the order of the config."""
    return tuple(dict.fromkeys(spec.site for spec in config.specs()))


def _activations(config: TrainRunConfig, lm: "LM", tokens: "Tokens") -> "Activations":
    """Residuals of the training rows, from the live model or from shards."""
    from saes.stream.activations import ActivationStream, StreamConfig
    from saes.stream.shards import HarvestConfig, ShardStream, harvest

    sites, stream = _sites(config), config.stream
    about = {"bos": tokens.bos, "text": tokens.text}
    settings = _stream_config(config)
    if isinstance(settings, StreamConfig):
        return ActivationStream(lm, tokens.train, sites, settings, **about)
    assert config.shards is not None
    folder = Path(config.shards).expanduser()
    pass_config = HarvestConfig(pass_rows=stream.pass_rows, autocast=stream.autocast)
    made = harvest(lm, tokens.train, sites, folder, pass_config, **about)
    return ShardStream(folder, settings, sites=sites, lm=lm, device=lm.device, checked=made)


def _stream_config(config: TrainRunConfig) -> "StreamConfig | ShardStreamConfig":
    """Order and size of the batches, of the live model or of shards."""
    from saes.stream.activations import StreamConfig
    from saes.stream.shards import ShardStreamConfig

    stream = config.stream
    if config.shards is None:
        return StreamConfig(**asdict(stream))
    buffer = stream.chunk_rows * config.text.context
    block = min(ShardStreamConfig.block, buffer)
    return ShardStreamConfig(batch=stream.batch, buffer=buffer, block=block, seed=stream.seed)


def _watched(config: TrainRunConfig, lm: "LM", tokens: "Tokens") -> dict[str, Any]:
    """Held-out residuals of every site, judged while training goes on."""
    from saes.stream.rows import read_all

    rows, stream = _spread(tokens.held_out, config.watch_rows), config.stream
    if len(rows) == 0:
        return {}
    return read_all(
        lm, rows, _sites(config), tokens.bos, pass_rows=stream.pass_rows, autocast=stream.autocast
    )


def _spread(rows: "np.ndarray[Any, Any]", count: int) -> "np.ndarray[Any, Any]":
    """At most `count` of the rows, evenly spread."""
    import numpy as np

    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def _quality(out: Path, folder: Path, lm: "LM", config: TrainRunConfig) -> None:
    import numpy as np

    from saes.pretrained import load_sae
    from saes.quality import qualities, quality_table
    from saes.text.prepare import open_tokens

    tokens = open_tokens(folder / "text")
    rows = _spread(tokens.held_out, config.quality_rows).astype(np.int64)
    if tokens.bos is not None:
        rows = np.concatenate([np.full((len(rows), 1), tokens.bos), rows], axis=1)
    saes = {
        name: load_sae(folder / "saes" / name, d_model=lm.d_model, device=str(lm.device))
        for name in name_specs(config.specs())
    }
    results = qualities(lm, saes, rows)
    records = {name: _figures(result) for name, result in results.items()}
    write_text(out / "quality.json", json.dumps(records, indent=1) + "\n")
    write_text(out / TABLE, quality_table(results))


def _figures(result: "Quality") -> dict[str, int | float | None]:
    """Figures as JSON has them: null for what is not a number."""
    return {
        name: None if value != value else round(value, 5)
        for name, value in result._asdict().items()
    }


def _run(opened: Run, config: TrainRunConfig, lm: Callable[[], "LM"], tracker: Tracker) -> None:
    folder = opened.folder
    todo = _stages(config, folder, lm, tracker)
    opened.record(inputs={k: v for stage in todo for k, v in stage.external.items()})
    exit_code = 1
    try:
        events = run_stages(opened, todo, _tell)
        opened.finish()
        _clean(folder / CHECKPOINTS)
        names = list(name_specs(config.specs()))
        records = _put_beside(folder, names) if config.quality_rows else {}
        _track(tracker, records, events)
        _track_saes(tracker, folder, names, stage_keys(todo)["saes"])
        exit_code = 0
    finally:
        tracker.finish(exit_code)
    _print(folder, config, events, tracker)


def _clean(work: Path) -> None:
    """Delete checkpoints, which nothing reads any more; snapshots stay."""
    for file in work.glob("*step_*"):
        file.unlink()
    if work.exists() and not any(work.iterdir()):
        work.rmdir()


def _put_beside(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Copy the figures of each SAE into its own folder, for cards; all of them by name."""
    records = json.loads((folder / "quality" / "quality.json").read_text(encoding="utf-8"))
    for name in names:
        text = json.dumps({"site": name.split("/")[0], "held_out": records[name]}, indent=1) + "\n"
        path = folder / "saes" / name / "quality.json"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return records


def _track(
    tracker: Tracker, records: Mapping[str, Mapping[str, Any]], events: Sequence[Event]
) -> None:
    """Final figures."""
    tracker.summary({f"seconds/{event.stage}": event.seconds for event in events})
    for name, figures in records.items():
        tracker.summary({f"quality/{name}/{key}": value for key, value in figures.items()})
    if records:
        columns = list(next(iter(records.values())))
        rows = [[name, *figures.values()] for name, figures in records.items()]
        tracker.table("quality", ["SAE", *columns], rows)


def _track_saes(tracker: Tracker, folder: Path, names: Sequence[str], key: str) -> None:
    """The SAEs as artifacts, now that they are where they stay, unless they are already.

    A run may be stopped between the stage and this, so what counts is a record of it.
    """
    record = folder / TRACKED
    text = json.dumps({"saes": key}) + "\n"
    if record.exists() and record.read_text(encoding="utf-8") == text:
        return
    for name in names:
        label = f"{folder.resolve().name}-{name.replace('/', '-')}"
        tracker.artifact(folder / "saes" / name, label, "model")
    write_text(record, text)


def _tell(event: Event) -> None:
    words = {"started": "...", "kept": "was done before"}
    said = words.get(event.state, f"done in {event.seconds:.1f} s")
    sys.stderr.write(f"{event.stage} {said}\n")


def _print(folder: Path, config: TrainRunConfig, events: Sequence[Event], tracker: Tracker) -> None:
    if config.quality_rows:
        sys.stdout.write("\n" + (folder / "quality" / TABLE).read_text(encoding="utf-8"))
    made = [event for event in events if event.state == "finished"]
    parts = ", ".join(f"{e.stage} {e.seconds:.1f}" for e in made) or "nothing left to do"
    total = f" (in all {sum(e.seconds for e in made):.1f})" if made else ""
    sys.stdout.write(f"\nseconds    {parts}{total}\n")
    where = {
        "SAEs": ", ".join(str(folder / "saes" / name) for name in name_specs(config.specs())),
        "snapshots": str(folder / CHECKPOINTS / "snapshots") if config.train.snapshots else "",
        "tracked": ", ".join(tracker.places),
    }
    for name, place in where.items():
        if place:
            sys.stdout.write(f"{name:<10} {place}\n")

"""Train SAEs of any architecture that sae-lens has, many in one pass over the activations.

What is ours around the step of sae-lens's `SAETrainer`: a resumable source of activations, one
checkpoint of all state, a constant scale of the activations that is folded away on saving, decoder
rows of TopK kinds kept at norm 1, thresholds set on data, and evaluation on held-out residuals.
TopK and the auxiliary loss for dead latents: Gao et al. 2024, "Scaling and evaluating sparse
autoencoders" (arXiv 2406.04093), sections 2.3 and 2.4, appendix A.2.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from saes.errors import UserError
from saes.latents import SaeLens
from saes.track import NullTracker, Tracker
from saes.training.architectures import SaeSpec, TrainConfig, build, name_specs
from saes.training.budget import check_budget
from saes.training.checkpoint import (
    Interrupts,
    Stopped,
    load_trainer_state,
    read_checkpoint,
    trainer_state,
    write_checkpoint,
)
from saes.training.export import Fit, Residuals, begin_from, evaluate, export, weights_hash

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

    from saes.stream.activations import Activations

    Trainer = SAETrainer[Any, Any]

FIT_BATCHES = 8
TIMED_STEPS = 40
TRIED_STEPS = 3  # before the first, of which one is to warm up
DENSITY_EDGES = np.linspace(-10, 0, 65)  # of log10 of the share of tokens on which a latent fires
log = logging.getLogger(__name__)


@dataclass
class _Run:
    """A training under way."""

    activations: "Activations"
    config: TrainConfig
    specs: dict[str, SaeSpec]
    trainers: "dict[str, Trainer]"
    steps: int
    work: Path
    identity: dict[str, object]
    tracker: Tracker
    held_out: Mapping[str, Residuals]
    step: int = 0
    """Steps done."""
    place: Any = None
    """State of the activations after them."""
    saved: int = 0
    """Step of the newest checkpoint."""
    clock: float = 0.0
    """When the last point of the curves was logged, or the loop begun."""
    clock_step: int = 0
    """Steps that were done then."""

    def name(self, metric: str, sae: str) -> str:
        """A metric's name: that of sae-lens, after the SAE's when there are several."""
        return f"{sae}/{metric}" if len(self.specs) > 1 else metric

    @property
    def kept(self) -> str:
        """The end of an error: what is left of the work."""
        return f"; the checkpoint of step {self.saved} is kept" if self.saved else ""

    def next(self) -> dict[str, Residuals]:
        """The next batch of every site; an error of the stream also says the step."""
        try:
            return next(self.activations)
        except UserError as error:
            raise UserError(f"at step {self.step + 1}: {error}{self.kept}") from None


def train_saes(
    activations: "Activations",
    specs: Sequence[SaeSpec],
    config: TrainConfig,
    out: Path,
    work: Path,
    *,
    held_out: Mapping[str, Residuals] | None = None,
    tracker: Tracker | None = None,
    start_from: Sequence[SaeLens] = (),
) -> dict[str, Path]:
    """Train SAEs on the same activations and save each in `out/NAME`, in sae-lens's format.

    NAME is the site, and what differs when several SAEs sit at one (`saes.training.architectures`).

    Safe to interrupt at any moment: the same call goes on from the newest checkpoint in `work` and,
    with the same number of threads, ends with the same bytes. SIGTERM and Ctrl-C write a checkpoint
    first.

    Args:
        held_out: residuals by site, of text that is not trained on; judged on the way and at last.
        tracker: gets sae-lens's metrics under sae-lens's names, and snapshots as artifacts.
        start_from: SAEs to begin with instead of random weights, one for every site.

    Returns:
        The folder of each SAE by its name.

    Raises:
        UserError: anything in the arguments that does not fit together; too little memory or disk;
            activations or a loss that are not finite (the last checkpoint stays); a damaged
            checkpoint, or one of another run; a disk that fills up.
    """
    named = name_specs(specs)
    steps = config.tokens // activations.batch
    _check(activations, specs, config, held_out or {}, start_from)
    work.mkdir(parents=True, exist_ok=True)
    tqdm.write(check_budget(activations, specs, work, config), file=sys.stderr)
    run = _Run(
        activations,
        config,
        named,
        {name: build(spec, config, activations, steps=steps) for name, spec in named.items()},
        steps,
        work,
        _identity(activations, specs, config, start_from),
        tracker or NullTracker(),
        held_out or {},
    )
    with torch.sparse.check_sparse_tensor_invariants(enable=False), Interrupts() as interrupts:
        try:
            if not _resume(run):
                _fit_to_data(run, interrupts, start_from)
            _loop(run, interrupts)
            return _export_all(run, out, interrupts)
        except Stopped:
            if run.step:
                _save_state(run)
            note = "checkpoint written" if run.step else "nothing to keep yet"
            log.warning("stopped at step %d of %d; %s", run.step, run.steps, note)
            interrupts.leave()


def _check(
    activations: "Activations",
    specs: Sequence[SaeSpec],
    config: TrainConfig,
    held_out: Mapping[str, Residuals],
    start_from: Sequence[SaeLens],
) -> None:
    """Refuse arguments that do not fit together."""
    if config.tokens < activations.batch:
        raise UserError(f"{config.tokens} tokens are fewer than a batch of {activations.batch}")
    sites = {spec.site for spec in specs}
    for site in sorted(sites - set(activations.sites)):
        raise UserError(
            f"no activations at {site}; there are those at {', '.join(activations.sites)}"
        )
    if held_out:
        for site in sorted(sites - set(held_out)):
            raise UserError(f"held-out residuals lack the site {site}")
        for site in sorted(sites):
            shape, wide = tuple(held_out[site].shape), activations.d_model
            if len(shape) != 2 or shape[0] < 2 or shape[1] != wide:
                raise UserError(
                    f"held-out residuals at {site} are of shape {list(shape)}; give at least two "
                    f"tokens of width {wide}, [tokens, {wide}]"
                )
    starts = [source.site for source in start_from]
    if start_from and (sorted(starts) != sorted(sites)):
        raise UserError(
            f"start_from holds SAEs at {', '.join(starts)}, but {', '.join(sorted(sites))} are to "
            "be trained; give one for every site"
        )


def _loop(run: _Run, interrupts: Interrupts) -> None:
    """Step until all tokens are seen."""
    batch, start = run.activations.batch, time.perf_counter()
    first = run.step
    run.clock, run.clock_step = start, run.step
    bar = tqdm(
        total=run.steps * batch, initial=run.step * batch, unit="tok", unit_scale=True,
        mininterval=2, desc="SAEs",
    )  # fmt: skip
    with bar:
        while run.step < run.steps:
            with interrupts.waiting():
                batches = run.next()
            outputs = {n: _step(t, batches[run.specs[n].site]) for n, t in run.trainers.items()}
            _check_finite(run, outputs)
            run.step, run.place = run.step + 1, run.activations.state_dict()
            bar.update(batch)
            if run.step - first == TIMED_STEPS < run.steps:
                seconds = (time.perf_counter() - start) / TIMED_STEPS * (run.steps - run.step)
                bar.write(f"about {_duration(seconds)} to go", file=sys.stderr)
            _report(run, outputs, bar)
            if run.step in _snapshot_steps(run):  # before the checkpoint, which goes on after it
                _export_all(run, run.work / "snapshots" / f"step_{run.step:08d}")
            if run.step % run.config.checkpoint_steps == 0 or run.step == run.steps:
                _save_state(run)
            interrupts.check()


def _step(trainer: "Trainer", x: Residuals) -> Any:
    """One step of sae-lens's trainer, then decoder rows back to norm 1 if they are kept there."""
    output = trainer.step(x)
    trainer.n_training_steps += 1
    if trainer.sae.cfg.decoder_init_norm == 1.0:
        with torch.no_grad():
            trainer.sae.W_dec.div_(trainer.sae.W_dec.norm(dim=1, keepdim=True))
    return output


def _check_finite(run: _Run, outputs: Mapping[str, Any]) -> None:
    """Stop at a loss that is not finite, before it is saved or logged.

    Raises:
        UserError: names the SAE, the step and the cause.
    """
    losses = torch.stack([o.loss.detach().float().reshape(()) for o in outputs.values()]).tolist()
    for (name, output), loss in zip(outputs.items(), losses, strict=True):
        if not math.isfinite(loss):
            whole = bool(torch.isfinite(output.sae_in).all())
            cause = "the learning rate is too high" if whole else "an activation is not finite"
            at = f"at {name} is {loss} at step {run.step + 1}"
            raise UserError(f"the loss {at}: {cause}{run.kept}")


def _check_weights(run: _Run) -> None:
    """Refuse to save weights that are not finite: the loss shows them one step later, if at all.

    Raises:
        UserError: names the SAE and the step.
    """
    for name, trainer in run.trainers.items():
        if not all(bool(value.isfinite().all()) for value in trainer.sae.state_dict().values()):
            raise UserError(
                f"weights of {name} are not finite after step {run.step}: the learning rate is too "
                f"high, or a gradient is infinite{run.kept}"
            )


def _report(run: _Run, outputs: Mapping[str, Any], bar: "tqdm[Any]") -> None:
    """What is due at this step: a point of the curves, an evaluation."""
    due = run.step % run.config.log_steps == 0 or run.step == run.steps
    metrics: dict[str, float] = {}
    if due:
        now = time.perf_counter()
        tokens = (run.step - run.clock_step) * run.activations.batch
        metrics["details/tokens_per_second"] = tokens / (now - run.clock)
        run.clock, run.clock_step = now, run.step
        for name, trainer in run.trainers.items():
            found = trainer.build_train_step_log_dict(outputs[name], trainer.n_training_samples)
            metrics |= {run.name(k, name): float(v) for k, v in found.items()}
        bar.set_postfix_str(_postfix(run, metrics))
    if run.step % run.config.held_out_steps == 0 or run.step == run.steps:
        metrics |= _held_out(run)
        _densities(run)
    if metrics:
        run.tracker.log(metrics, run.step)


def _postfix(run: _Run, metrics: Mapping[str, float]) -> str:
    """Variance explained and dead latents of the first few SAEs, for the progress bar."""
    parts = []
    for name in list(run.trainers)[:3]:
        explained = metrics[run.name("metrics/explained_variance", name)]
        dead = metrics[run.name("sparsity/dead_features", name)]
        parts.append(f"VE {explained:.3f} dead {dead:.0f}")
    return " | ".join(parts)


def _held_out(run: _Run) -> dict[str, float]:
    """Figures of every SAE, as it is in training, on held-out residuals."""
    metrics: dict[str, float] = {}
    for name, trainer in run.trainers.items():
        if (x := run.held_out.get(run.specs[name].site)) is None:
            continue
        scale = trainer.activation_scaler.scaling_factor
        fit = evaluate(trainer.sae, x.split(run.activations.batch), scale or 1.0)
        metrics[run.name("held_out/explained_variance", name)] = fit.variance_explained
        metrics[run.name("held_out/l0", name)] = fit.l0
    return metrics


def _densities(run: _Run) -> None:
    """Histograms of how often latents fire, as sae-lens names them, and a new window."""
    for name, trainer in run.trainers.items():
        share = trainer.log_feature_sparsity.numpy()
        counts, _ = np.histogram(share.clip(-10, 0), DENSITY_EDGES)
        run.tracker.histogram(
            run.name("plots/feature_density_line_chart", name),
            counts.tolist(),
            DENSITY_EDGES.tolist(),
            run.step,
        )
        metrics = {
            "metrics/mean_log10_feature_sparsity": float(share.mean()),
            "sparsity/below_1e-5": int((share < -5).sum()),
            "sparsity/below_1e-6": int((share < -6).sum()),
        }
        run.tracker.log({run.name(k, name): v for k, v in metrics.items()}, run.step)
        if run.step < run.steps:  # the last window goes into the SAE's metadata
            trainer.act_freq_scores = torch.zeros_like(trainer.act_freq_scores)
            trainer.n_frac_active_samples = 0


def _fit_to_data(run: _Run, interrupts: Interrupts, start_from: Sequence[SaeLens]) -> None:
    """Scale each site to unit variance a dimension about its mean, and start b_dec at the mean.

    Both are read off the first batches, which training then sees again from the start. An SAE that
    begins with given weights keeps their b_dec. How long that reading and some steps take gives the
    estimate of time.
    """
    chunk = run.activations.buffer_tokens // run.activations.batch
    start = time.perf_counter()
    sample = _sample(run, FIT_BATCHES, interrupts)
    # the first batch of a chunk takes the time of all
    seconds = (time.perf_counter() - start) / (math.ceil(FIT_BATCHES / chunk) * chunk)
    run.place = run.activations.state_dict()
    sources = {source.site: source for source in start_from}
    for name in run.trainers:
        site = run.specs[name].site
        x = torch.cat([batch[site] for batch in sample]).double()
        mean = x.mean(0)
        scale = float(x.shape[1] ** 0.5 / (x - mean).norm(dim=-1).mean())
        if not math.isfinite(scale):
            raise UserError(f"an activation at {site} is not finite, or all are equal, at step 0")
        seconds += _try_steps(run, name, [batch[site] for batch in sample], scale)
        interrupts.check()
        trainer = run.trainers[name]
        trainer.activation_scaler.scaling_factor = scale
        if site in sources:
            begin_from(trainer.sae, run.specs[name], sources[site], scale)
        elif run.config.b_dec == "mean":
            with torch.no_grad():
                trainer.sae.b_dec.copy_(mean * scale)
    tqdm.write(_time_line(run, seconds), file=sys.stderr)


def _sample(run: _Run, count: int, interrupts: Interrupts | None = None) -> list[Any]:
    """The next batches; the activations go back to where they were."""
    place = run.activations.state_dict()
    with interrupts.waiting() if interrupts else contextlib.nullcontext():
        batches = [run.next() for _ in range(count)]
    run.activations.load_state_dict(place)
    return batches


def _try_steps(run: _Run, name: str, batches: Sequence[Residuals], scale: float) -> float:
    """Seconds a step takes; the trainer that was used for it is built anew."""
    trainer = run.trainers[name]
    trainer.activation_scaler.scaling_factor = scale
    times = [_finished(run)]
    for x in batches[:TRIED_STEPS]:
        _step(trainer, x)
        times.append(_finished(run))
    run.trainers[name] = build(run.specs[name], run.config, run.activations, steps=run.steps)
    return (times[-1] - times[1]) / (len(times) - 2)


def _finished(run: _Run) -> float:
    """The time when all work so far is done, on a GPU too."""
    if run.activations.device.type == "cuda":
        torch.cuda.synchronize(run.activations.device)
    return time.perf_counter()


def _time_line(run: _Run, seconds: float) -> str:
    """What a step of so many seconds makes in all, and how often the text is seen."""
    tokens, epoch = run.steps * run.activations.batch, run.activations.tokens_per_epoch
    return (
        f"training takes about {_duration(seconds * run.steps)} for {run.steps:,} steps, "
        f"{tokens:,} tokens: {tokens / epoch:.1f} passes over {epoch:,}"
    )


def _identity(
    activations: "Activations",
    specs: Sequence[SaeSpec],
    config: TrainConfig,
    start_from: Sequence[SaeLens],
) -> dict[str, object]:
    """What a checkpoint must agree on with the run that reads it, as JSON."""
    parts = {
        "activations": activations.identity(),
        "SAEs": [asdict(spec) for spec in specs],
        "settings": config.deciding(),
        "start_from": [weights_hash(source.sae) for source in start_from],
    }
    return json.loads(json.dumps(parts))


def _save_state(run: _Run) -> None:
    """Write a checkpoint of all state, unless this step has one."""
    if run.step == run.saved:
        return
    _check_weights(run)
    saes = {name: trainer_state(trainer) for name, trainer in run.trainers.items()}
    state = {"identity": json.dumps(run.identity), "activations": run.place, "saes": saes}
    write_checkpoint(run.work, run.step, state)
    run.saved = run.step


def _resume(run: _Run) -> bool:
    """Load the newest whole checkpoint; False if there is none."""
    found = read_checkpoint(run.work, run.activations.device)
    if found is None:
        return False
    there = json.loads(found.state["identity"])
    differ = [key for key, value in run.identity.items() if there.get(key) != value]
    if differ:
        raise UserError(
            f"the checkpoints in {run.work} belong to a run with other settings "
            f"({', '.join(differ)}); delete them or choose another work folder"
        )
    for name, trainer in run.trainers.items():
        load_trainer_state(trainer, found.state["saes"][name])
    run.place = found.state["activations"]
    run.activations.load_state_dict(run.place)
    run.step = run.saved = found.step
    return True


def _snapshot_steps(run: _Run) -> set[int]:
    """Steps after which the SAEs are saved on the way."""
    parts = run.config.snapshots + 1
    return {run.steps * i // parts for i in range(1, parts)}


def _export_all(run: _Run, out: Path, interrupts: Interrupts | None = None) -> dict[str, Path]:
    """Save every SAE as for use.

    Args:
        interrupts: of the finished SAEs, which a later start saves again. A snapshot has to be
            whole before its step's checkpoint, and waits for no signal.
    """
    _check_weights(run)
    count = max(1, run.config.calibration_tokens // run.activations.batch)
    sample = _sample(run, count, interrupts)
    folders = {}
    for name, trainer in run.trainers.items():
        spec = run.specs[name]
        batches = [batch[spec.site] for batch in sample]

        def record(saved: Any, trained: Fit, spec: SaeSpec = spec, x: Any = batches) -> Any:
            return _record(run, spec, saved, trained, x)

        folders[name] = out / name
        folders[name].parent.mkdir(parents=True, exist_ok=True)
        export(trainer, spec, folders[name], batches, dtype=run.config.dtype, record=record)
        if interrupts:
            interrupts.check()
        else:  # the finished ones may still be moved by the caller, who then logs them
            label = f"{name.replace('/', '-')}-step{run.step}"
            run.tracker.artifact(folders[name], label, "model")
    return folders


def _record(
    run: _Run, spec: SaeSpec, saved: Any, trained: Fit, batches: Sequence[Residuals]
) -> dict[str, object]:
    """What training.json says: settings, and figures of the SAE as trained and as saved."""
    held_out = run.held_out.get(spec.site)
    return {
        "sae": asdict(spec),
        "train": asdict(run.config),
        "about": run.activations.about._asdict(),
        "steps": run.step,
        "tokens": run.step * run.activations.batch,
        "trained": trained._asdict(),
        "saved": evaluate(saved, batches)._asdict(),
        "held_out": None
        if held_out is None
        else evaluate(saved, held_out.split(run.activations.batch))._asdict(),
    }


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""Train TopK SAEs for several sites in one pass over the model, through sae-lens's SAETrainer.

What is ours around its step: a resumable stream, one checkpoint file for all sites, a constant
scale of the activations that is folded away on saving, and decoder rows kept at norm 1.
TopK and the auxiliary loss for dead latents: Gao et al. 2024, "Scaling and evaluating sparse
autoencoders" (arXiv 2406.04093), sections 2.3 and 2.4, appendix A.2.
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from saes.activations import ActivationStream
from saes.errors import UserError
from saes.lm.model import LM

if TYPE_CHECKING:
    from sae_lens import TopKTrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

CHECKPOINT = "checkpoint.pt"
REPORT_EVERY = 20  # steps


@dataclass(frozen=True)
class TrainConfig:
    """Everything beside the stream that decides the weights."""

    d_sae: int = 4096
    """Number of latents."""
    k: int = 32
    """Latents that fire on a token."""
    tokens: int = 4_000_000
    """Content tokens to train on."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises."""
    decay: float = 0.5
    """Share of the steps, at the end, over which it falls to 0."""
    dead_tokens: int = 200_000
    """A latent that has not fired for this many tokens is dead and gets the auxiliary loss."""
    autocast: bool = False
    """Encode in bfloat16."""
    seed: int = 0
    """Seed of the initial weights."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if not 0 < self.k <= self.d_sae:
            raise UserError(f"k = {self.k} must lie between 1 and d_sae = {self.d_sae}")


def train_saes(
    stream: ActivationStream, config: TrainConfig, out: Path, work: Path
) -> dict[str, Path]:
    """Train one SAE at each site of the stream and save it in `out/SITE` (sae-lens format, bf16).

    Safe to interrupt: the same call goes on from `work/checkpoint.pt` and, with the same number of
    threads, ends with the same bytes.

    Returns:
        The folder of each site's SAE.

    Raises:
        UserError: fewer tokens than a batch, `work` holds the checkpoint of another run, or an
            activation is not finite.
    """
    steps = config.tokens // stream.config.batch
    if steps == 0:
        raise UserError(f"{config.tokens} tokens are fewer than a batch of {stream.config.batch}")
    work.mkdir(parents=True, exist_ok=True)
    trainers = {
        site: _trainer(stream, config, site, seed=config.seed + i, steps=steps)
        for i, site in enumerate(stream.sites)
    }
    identity = _identity(stream, config)
    step = _resume(work / CHECKPOINT, identity, stream, trainers)
    if step == 0:
        _fit_to_data(stream, trainers)
    bar = tqdm(
        total=steps * stream.config.batch,
        initial=step * stream.config.batch,
        unit="tok",
        unit_scale=True,
        mininterval=2,
        desc="SAEs",
    )
    with bar, torch.sparse.check_sparse_tensor_invariants(enable=False):
        while step < steps:
            batches = next(stream)
            outputs = {site: _step(trainers[site], batches[site]) for site in trainers}
            step += 1
            bar.update(stream.config.batch)
            save_now = step % config.checkpoint_steps == 0 or step == steps
            if save_now or step % REPORT_EVERY == 0:
                bar.set_postfix_str(_report(trainers, outputs, step))
            if save_now:
                _checkpoint(work / CHECKPOINT, identity, step, stream, trainers)
    folders = {site: out / site for site in trainers}
    for site, folder in folders.items():
        trainers[site].set_final_sae_metadata()
        scale = trainers[site].activation_scaler.scaling_factor
        assert scale is not None
        save(trainers[site].sae, scale, folder)
    return folders


def _trainer(
    stream: ActivationStream, config: TrainConfig, site: str, *, seed: int, steps: int
) -> "SAETrainer[Any, Any]":
    """sae-lens's trainer around a fresh SAE; torch is seeded here, since the trainer does not."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    lm = stream.lm
    sae_config = TopKTrainingSAEConfig(
        d_in=lm.d_model,
        d_sae=config.d_sae,
        k=config.k,
        decoder_init_norm=1.0,
        rescale_acts_by_decoder_norm=False,  # rows are kept at norm 1
        use_sparse_activations=True,
        device=str(lm.device),
        metadata=SAEMetadata(
            model_name=lm.name,
            hook_name=site,
            context_size=stream.rows.shape[1] + (stream.bos is not None),
            prepend_bos=lm.tokenizer.bos_token_id is not None,
            training_tokens=steps * stream.config.batch,
            seed=seed,
        ),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(sae_config)
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * stream.config.batch,
        train_batch_size_samples=stream.config.batch,
        lr=config.lr,
        lr_end=config.lr,  # of the constant part; the decay goes to 0
        lr_warm_up_steps=math.ceil(steps * config.warmup),
        lr_decay_steps=math.ceil(steps * config.decay),
        device=str(lm.device),
        autocast=config.autocast,
        dead_feature_window=math.ceil(config.dead_tokens / stream.config.batch),
    )
    return SAETrainer(trainer_config, sae, iter(()))


def _fit_to_data(stream: ActivationStream, trainers: dict[str, "SAETrainer[Any, Any]"]) -> None:
    """Scale each site to unit variance a dimension about its mean, and start b_dec at the mean.

    Both are read off the first batches, which training then sees again from the start.
    """
    state = stream.state_dict()
    sample = [next(stream) for _ in range(8)]
    stream.load_state_dict(state)
    for site, trainer in trainers.items():
        x = torch.cat([batch[site] for batch in sample]).double()
        mean = x.mean(0)
        scale = float(x.shape[1] ** 0.5 / (x - mean).norm(dim=-1).mean())
        trainer.activation_scaler.scaling_factor = scale
        with torch.no_grad():
            trainer.sae.b_dec.copy_(mean * scale)


def _step(trainer: "SAETrainer[Any, Any]", x: Float[Tensor, "batch d_in"]) -> Any:
    """One step of sae-lens's trainer, then decoder rows back to norm 1."""
    output = trainer.step(x)
    trainer.n_training_steps += 1
    with torch.no_grad():
        trainer.sae.W_dec.div_(trainer.sae.W_dec.norm(dim=1, keepdim=True))
    return output


def _report(trainers: dict[str, "SAETrainer[Any, Any]"], outputs: dict[str, Any], step: int) -> str:
    """Variance explained on the last batch and dead latents, by site.

    Raises:
        UserError: the loss is not finite.
    """
    parts = []
    for site, output in outputs.items():
        mse = float(output.losses["mse_loss"].detach())
        if not math.isfinite(mse):
            raise UserError(
                f"loss at {site} is {mse} at step {step}: an activation is not finite or the "
                "learning rate is too high; the last checkpoint is kept"
            )
        explained = 1 - mse / float(output.sae_in.var(0, correction=0).sum())
        parts.append(f"VE {explained:.3f} dead {int(trainers[site].dead_neurons.sum())}")
    return " | ".join(parts)


def _weights(lm: LM) -> str:
    """Tells a model from another training of it: a hash of a few values of every parameter."""
    values = [p.detach().flatten()[:16].float().tolist() for p in lm.model.parameters()]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _identity(stream: ActivationStream, config: TrainConfig) -> str:
    """What a checkpoint must agree on with the run that reads it."""
    parts = {
        "model": _weights(stream.lm),
        "sites": stream.sites,
        "rows": [stream.rows.shape, stream.rows[0].tolist(), stream.rows[-1].tolist()],
        "stream": asdict(stream.config),
        "train": asdict(config),
    }
    return json.dumps(parts, sort_keys=True)


def _checkpoint(
    path: Path,
    identity: str,
    step: int,
    stream: ActivationStream,
    trainers: dict[str, "SAETrainer[Any, Any]"],
) -> None:
    """Write all state to one file, which is replaced in one move."""
    sites = {
        site: {
            "sae": t.sae.state_dict(),
            "optimizer": t.optimizer.state_dict(),
            "lr_scheduler": t.lr_scheduler.state_dict(),
            "scaling_factor": t.activation_scaler.scaling_factor,
            "counts": {name: getattr(t, name) for name in _COUNTS},
        }
        for site, t in trainers.items()
    }
    part = path.with_suffix(".part")
    torch.save(
        {"identity": identity, "step": step, "stream": stream.state_dict(), "sites": sites}, part
    )
    part.replace(path)


_COUNTS = (
    "n_training_steps",
    "n_training_samples",
    "act_freq_scores",
    "n_forward_passes_since_fired",
    "n_frac_active_samples",
)


def _resume(
    path: Path, identity: str, stream: ActivationStream, trainers: dict[str, "SAETrainer[Any, Any]"]
) -> int:
    """Load a checkpoint if there is one; the step to go on from."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=stream.lm.device, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(f"checkpoint {path} cannot be read ({error}); delete it") from None
    if state["identity"] != identity:
        raise UserError(
            f"checkpoint {path} belongs to a run with other settings; delete it or choose "
            "another work folder"
        )
    stream.load_state_dict(state["stream"])
    for site, trainer in trainers.items():
        saved = state["sites"][site]
        trainer.sae.load_state_dict(saved["sae"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        trainer.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        trainer.activation_scaler.scaling_factor = saved["scaling_factor"]
        for name, value in saved["counts"].items():
            setattr(trainer, name, value)
    return state["step"]


def save(sae: "TopKTrainingSAE", scale: float, folder: Path) -> None:
    """Save a TopK SAE that was trained on `scale * x` so that it reads x, in sae-lens format, bf16.

    TopK with ReLU is homogeneous: with b_enc and b_dec divided by the scale, latents and
    reconstructions of x are those of `scale * x`, divided by it. So latents are in units of the
    residual's norm (decoder rows have norm 1). `sae` itself is changed.
    """
    with torch.no_grad():
        sae.b_enc.div_(scale)
        sae.b_dec.div_(scale)
    sae.to(device="cpu", dtype=torch.bfloat16)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    sae.save_inference_model(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)

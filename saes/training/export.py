"""Trained SAEs to folders in sae-lens's format and back, and how well either reconstructs."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saes.errors import UserError
from saes.latents import SaeLens
from saes.training.architectures import SaeSpec
from saes.training.thresholds import calibrate

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

Residuals = Float[Tensor, "_ d_model"]
WEIGHTS, RECORD = "sae_weights.safetensors", "training.json"


class Fit(NamedTuple):
    """How an SAE does on some residuals."""

    l0: float
    """Mean number of latents that fire on a token."""
    variance_explained: float
    """1 - (squared error) / (squared distance from the mean), each summed over tokens."""


@torch.no_grad()
def evaluate(sae: Any, batches: Sequence[Residuals], scale: float = 1.0) -> Fit:
    """L0 and variance explained of any sae-lens SAE, for training or inference.

    Args:
        batches: residuals; an SAE that chooses latents by batch sees these batches.
        scale: factor of the residuals that the SAE was trained with.
    """
    mean = torch.cat([x.double().mean(0, keepdim=True) * len(x) for x in batches]).sum(0)
    mean /= sum(len(x) for x in batches)
    fired, error, distance = 0, 0.0, 0.0
    for x in batches:
        acts = sae.encode(x * scale)
        out = sae.decode(acts) / scale
        fired += int((acts.to_dense() if acts.is_sparse else acts).count_nonzero())
        error += float((x - out).double().square().sum())
        distance += float((x.double() - mean).square().sum())
    return Fit(fired / sum(len(x) for x in batches), 1 - error / distance)


def scale_biases(sae: Any, factor: float) -> None:
    """Make an SAE read `factor * x` as it read x: latents and reconstructions are then `factor`
    times as large.

    All architectures here are positively homogeneous, so that multiplying biases, thresholds and
    the tolerance of matching pursuit is exact, and weights stay. (sae-lens's own
    `fold_activation_norm_scaling_factor` scales the weights, which leaves decoder rows at another
    norm, and is wrong for matching pursuit, whose encoder is its decoder.)
    """
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "b_gate", "b_mag", "threshold", "topk_threshold"):
            tensor = getattr(sae, name, None)
            if tensor is not None:
                tensor.mul_(factor)
    if hasattr(sae.cfg, "residual_threshold"):
        sae.cfg.residual_threshold *= factor


def export(
    trainer: "SAETrainer[Any, Any]",
    spec: SaeSpec,
    folder: Path,
    batches: Sequence[Residuals],
    *,
    dtype: str,
    record: Callable[[Any, Fit], dict[str, object]],
) -> Any:
    """Save the SAE in sae-lens's format, for unscaled residuals, with decoder rows of norm 1.

    What was trained is left as it is.

    Args:
        batches: residuals of the training text, on which thresholds are set.
        record: gives, from the saved SAE and the fit of the trained one on `batches`, what is
            written to training.json.

    Returns:
        the saved SAE as sae-lens loads it, in float32.

    Raises:
        UserError: the disk is full or cannot be written; what the folder held before stays.
    """
    scale = trainer.activation_scaler.scaling_factor
    assert scale is not None
    trained = evaluate(trainer.sae, batches, scale)
    trainer.set_final_sae_metadata()
    sae = copy.deepcopy(trainer.sae)
    sae.cfg.metadata.l0 = trained.l0
    scale_biases(sae, 1 / scale)
    if not spec.unit_rows:
        sae.fold_W_dec_norm()
    sae.to(device="cpu", dtype=getattr(torch, dtype))
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        sae.save_inference_model(part)
        _sort_keys(part / "cfg.json")
        saved = load(part, device=trainer.cfg.device)
        if spec.has_threshold:
            calibrate(saved, batches, trained.l0)
            _write_threshold(part / WEIGHTS, saved.threshold.detach().cpu())
        text = json.dumps(record(saved, trained), indent=1)
        (part / RECORD).write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except (OSError, SafetensorError) as error:  # safetensors has errors of its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot write the SAE folder {folder}: {reason}; make room") from None
    return saved


def load(folder: Path, device: str = "cpu") -> Any:
    """A folder in sae-lens's format, in float32, without gradients."""
    from sae_lens import SAE

    return SAE.load_from_disk(folder, dtype="float32", device=device).eval().requires_grad_(False)


def _sort_keys(path: Path) -> None:
    """sae-lens writes the keys in the order of a set, which differs from process to process."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _write_threshold(path: Path, threshold: Float[Tensor, " d_sae"]) -> None:
    """Put thresholds into a file of weights; in float32, since rounding them moves the L0."""
    save_file(load_file(path) | {"threshold": threshold.float().contiguous()}, path)


def begin_from(sae: Any, spec: SaeSpec, source: SaeLens, scale: float) -> None:
    """Copy the weights of a saved SAE into one for training on `scale * x`.

    Raises:
        UserError: another architecture or size, or decoder rows that are not of norm 1 where
            training keeps them there.
    """
    wanted, given = sae.cfg.get_inference_config_class().architecture(), source.sae.cfg
    if given.architecture() != wanted:
        raise UserError(
            f"start_from at {spec.site} is a {given.architecture()} SAE; {spec.architecture} "
            f"begins from a {wanted} one"
        )
    if (given.d_in, given.d_sae) != (sae.cfg.d_in, spec.d_sae):
        raise UserError(
            f"start_from at {spec.site} is {given.d_in} wide with {given.d_sae} latents; here it "
            f"is {sae.cfg.d_in} and {spec.d_sae}: set d_sae to {given.d_sae}"
        )
    norms = source.sae.W_dec.norm(dim=1)
    if spec.unit_rows and float((norms - 1).abs().max()) > 0.02:
        raise UserError(
            f"decoder rows of start_from at {spec.site} have norms of {float(norms.min()):.2f} to "
            f"{float(norms.max()):.2f}; training keeps those of {spec.architecture} at 1"
        )
    weights = source.sae.state_dict()
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.copy_(weights[key])
    scale_biases(sae, scale)


def weights_hash(sae: Any) -> str:
    """SHA-256 of an SAE's weights and their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return total.hexdigest()

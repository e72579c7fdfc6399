"""sae-lens: cfg.json and sae_weights.safetensors, of version 6 and of those before."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saes.errors import UserError
from saes.formats.stored import Stored, damaged, figure, read_json, read_safetensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NOT_ONE_RESIDUAL = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "temporal")
NOT_ONE_RESIDUAL += ("jumprelu_skip_transcoder",)
SCALED = "expected_average_only_in"


def read(
    folder: Path, label: str, device: str, scale: float | None, overrides: dict[str, Any]
) -> Stored:
    """Read a folder.

    Args:
        scale: the constant that inputs were multiplied by in training, where it is known from
            elsewhere; files never hold it.
        overrides: settings that replace those of cfg.json.

    Raises:
        UserError: damaged files, an unknown architecture, one that does not reconstruct a single
            residual, or a normalisation that weights cannot hold.
    """
    cfg = _modern(_config(folder, label), overrides, label)
    if cfg["architecture"] in NOT_ONE_RESIDUAL:
        raise UserError(
            f"SAE {label} is a {cfg['architecture']}, which does not reconstruct a single "
            "token's residual; take another architecture"
        )
    scaled = _scaled(cfg, label, scale)
    metadata: dict[str, Any] = cfg["metadata"]
    hook = metadata.get("hook_name")
    if hook is None:
        raise UserError(f"SAE {label} does not say its site; set metadata.hook_name in {CONFIG}")
    tensors = read_safetensors(folder / WEIGHTS, label, device)
    _fold_finetuned(tensors, label)
    # sae-lens warns of these at every load; what they do to the residual is folded in, once
    model = metadata.pop("model_from_pretrained_kwargs", None)
    return Stored(
        "sae-lens",
        {**cfg, "dtype": "float32", "normalize_activations": "none"},
        tensors,
        str(hook),
        scale=scale if scaled else None,
        fold_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm")),
        centred=isinstance(model, dict) and bool(model.get("center_writing_weights")),
        l0=figure(metadata.get("l0")) or figure(cfg.get("k")),
        variance_explained=figure(metadata.get("variance_explained")),
    )


def _config(folder: Path, label: str) -> dict[str, Any]:
    cfg = read_json(folder / CONFIG, label)
    if not isinstance(cfg.get("d_in"), int):
        raise UserError(f"{CONFIG} of SAE {label} is damaged: d_in is {cfg.get('d_in')!r}")
    if not isinstance(cfg.get("apply_b_dec_to_input", True), bool):
        flag = cfg["apply_b_dec_to_input"]
        raise UserError(f"{CONFIG} of SAE {label} is damaged: apply_b_dec_to_input is {flag!r}")
    return cfg


def _modern(cfg: dict[str, Any], overrides: dict[str, Any], label: str) -> dict[str, Any]:
    """The config as sae-lens 6 writes it, with overrides where each belongs."""
    from sae_lens import __version__
    from sae_lens.loading.pretrained_sae_loaders import (
        LLM_METADATA_KEYS,
        handle_config_defaulting,
    )
    from sae_lens.registry import SAE_CLASS_REGISTRY

    architecture = cfg.get("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(a for a in SAE_CLASS_REGISTRY if a not in NOT_ONE_RESIDUAL)
        raise UserError(
            f"SAE {label} is of an unknown kind, {architecture!r}; known are {known} (a training "
            "checkpoint is loaded by the run that wrote it)"
        )
    metadata = cfg.get("metadata")
    if not isinstance(metadata, dict):
        try:
            return handle_config_defaulting({**cfg, **overrides})
        except (TypeError, AttributeError, ValueError) as error:  # a setting of another type
            raise damaged(CONFIG, label, error) from None
    # version 6; sae-lens takes a file that does not say its version for an older one
    about = {key: value for key, value in overrides.items() if key in LLM_METADATA_KEYS}
    metadata = {"sae_lens_version": __version__, **metadata, **about}
    return {**cfg, **overrides, "metadata": metadata}


def _scaled(cfg: dict[str, Any], label: str, scale: float | None) -> bool:
    """Whether inputs are to be multiplied by `scale`."""
    norm = cfg.get("normalize_activations") or "none"
    if norm == "none":
        return False
    if norm != SCALED:
        raise UserError(
            f"SAE {label} normalises its inputs by {norm!r}, token by token, so its decoder is not "
            "one fixed affine map of the residual; take an SAE without it"
        )
    if scale is None:
        raise UserError(
            f"SAE {label} expects activations normalised by {norm!r} and its files do not hold the "
            "factor; fold it into the weights (fold_activation_norm_scaling_factor of sae-lens), "
            "or load it by its name in the registry"
        )
    return True


def _fold_finetuned(tensors: dict[str, Tensor], label: str) -> None:
    """Fold the factor that a finetuned SAE of sae-lens before 6 puts on each decoder row."""
    factor = tensors.pop("scaling_factor", None)
    if factor is None:
        return
    W_dec = tensors.get("W_dec")
    if W_dec is None or factor.shape != W_dec.shape[:1]:
        raise UserError(
            f"the weights of SAE {label} are damaged: scaling_factor does not fit W_dec"
        )
    tensors["W_dec"] = W_dec * factor[:, None]

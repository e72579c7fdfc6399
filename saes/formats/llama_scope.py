"""Llama Scope and other SAEs of OpenMOSS's lm-saes: hyperparams.json or config.json, safetensors.

He et al. 2024, arXiv:2410.20526. Inputs are multiplied by sqrt(d) over the data's average norm, and
reconstructions divided by it. Latents are on the scale of the normalised inputs, as in sae-lens and
on Neuronpedia; lm-saes in its inference mode divides them by that factor.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.errors import UserError
from saes.formats.stored import (
    Stored,
    config,
    figure,
    number,
    read_json,
    read_safetensors,
    take,
    whole,
)

LAYOUTS = (
    ("hyperparams.json", "checkpoints/final.safetensors"),
    ("config.json", "sae_weights.safetensors"),
)
NAMES = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}


def read(
    folder: Path, layout: tuple[str, str], label: str, device: str, scale: float | None
) -> Stored:
    """Read a folder.

    Args:
        layout: names of the config and the weights.
        scale: sqrt(d) over the average norm, where the files do not tell.

    Raises:
        UserError: another activation or normalisation than the format's, a transcoder, or damage.
    """
    hyper = read_json(folder / layout[0], label)
    d_in = whole(hyper, "d_model", label)
    hook = hyper.get("hook_point_in")
    if hook is None or hyper.get("hook_point_out", hook) != hook or hyper.get("use_glu_encoder"):
        raise UserError(
            f"SAE {label} reads {hook!r} and writes {hyper.get('hook_point_out')!r}, or has a GLU "
            "encoder; take one that reconstructs what it reads"
        )
    tensors = read_safetensors(folder / layout[1], label, device)
    factor = _scale(hyper, tensors, d_in, label, scale)
    weights = take(tensors, NAMES, label)
    d_sae = weights["b_enc"].shape[0]
    weights["b_dec"] = tensors.pop("decoder.bias", torch.zeros(d_in, device=device))
    act, k = str(hyper.get("act_fn", "relu")).lower(), hyper.get("top_k")
    with_norm = bool(hyper.get("sparsity_include_decoder_norm"))
    if act not in ("relu", "topk", "jumprelu"):
        raise UserError(f"SAE {label} has the activation {act!r}; relu, topk, jumprelu are known")
    if act == "jumprelu":
        threshold = _threshold(hyper, tensors, d_sae, factor, label).to(device)
        # lm-saes compares pre-activations times decoder norms with it
        weights["threshold"] = threshold / weights["W_dec"].norm(dim=1) if with_norm else threshold
    cfg = config(
        {"relu": "standard"}.get(act, act),
        d_in,
        d_sae,
        subtract=bool(hyper.get("apply_decoder_bias_to_pre_encoder")),
        k=whole(hyper, "top_k", label) if act == "topk" else None,
        prepend_bos=True,
        context_size=1024,
    )
    if act == "topk" and with_norm:
        cfg["rescale_acts_by_decoder_norm"] = True
    return Stored(
        "llama-scope",
        cfg,
        weights,
        str(hook),
        scale=factor,
        fold_decoder_norm=act == "topk" and with_norm,
        l0=figure(k),
    )


def _scale(
    hyper: dict[str, Any], tensors: dict[str, Tensor], d_in: int, label: str, given: float | None
) -> float | None:
    """sqrt(d) over the data's average norm, from the config, the weights or the registry."""
    mode = hyper.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return None
    if mode != "dataset-wise":
        raise UserError(
            f"SAE {label} normalises its inputs {mode}, so its decoder is not one fixed affine map "
            "of the residual; take an SAE without it"
        )
    norms = hyper.get("dataset_average_activation_norm")
    if isinstance(norms, dict) and isinstance(norms.get("in"), int | float):
        return d_in**0.5 / norms["in"]
    stored = tensors.get(f"dataset_average_activation_norm.{hyper['hook_point_in']}")
    if stored is not None:
        return d_in**0.5 / float(stored)
    if given is None:
        raise UserError(
            f"SAE {label} normalises its inputs by the data's average norm, which its files do not "
            "hold; load it by its name in the registry"
        )
    return given


def _threshold(
    hyper: dict[str, Any],
    tensors: dict[str, Tensor],
    d_sae: int,
    scale: float | None,
    label: str,
) -> Tensor:
    """One threshold a latent, on the scale of normalised inputs.

    A scalar in the config is on the scale of the raw residual (it belongs to the weights after
    lm-saes standardised them for inference), a tensor in the file on that of training.
    """
    if "log_jumprelu_threshold" in tensors:
        return tensors.pop("log_jumprelu_threshold").exp()
    return torch.full((d_sae,), number(hyper, "jump_relu_threshold", label) * (scale or 1.0))

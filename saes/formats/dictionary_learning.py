"""dictionary_learning (Marks, Karvonen, Mueller): ae.pt, a state dict, and config.json.

Its trainers fold the normalisation of activations into the weights before they save. Latents of its
plain, gated and JumpReLU kinds carry the norm of their decoder rows: `AutoEncoder.from_pretrained`
moves the norms into the encoder by default (`normalize_decoder`), the other two multiply by them.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saes.errors import UserError
from saes.formats.stored import Stored, config, model_in, read_json, read_torch, take, whole

WEIGHTS = "ae.pt"
LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
KINDS: dict[str, tuple[str, bool, dict[str, str]]] = {
    "AutoEncoder": ("standard", True, {**LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": ("standard", False, {**LINEAR, "b_dec": "decoder.bias"}),
    "AutoEncoderTopK": ("topk", True, {**LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", True, {**LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, {**PLAIN, "threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", False, {**PLAIN, "threshold": "threshold"}),
    "GatedAutoEncoder": (
        "gated",
        True,
        {
            "W_enc": "encoder.weight.T",
            "W_dec": "decoder.weight.T",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
}
"""By class: sae-lens's architecture, whether b_dec is taken from the input, names of tensors."""

WITH_NORM = ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder")
"""Classes whose latents are multiplied by the norms of decoder rows."""


def read(folder: Path, where: str, label: str, device: str) -> Stored:
    """Read a folder.

    Raises:
        UserError: an unknown class, a transcoder, no layer, or damage.
    """
    tree = read_json(folder / "config.json", label)
    trainer = tree.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"config.json of SAE {label} is damaged: it has no trainer; fetch it again")
    buffer: dict[str, Any] = tree.get("buffer") or {}
    kind = str(trainer.get("dict_class"))
    if kind not in KINDS:
        raise UserError(f"SAE {label} is of an unknown kind, {kind}; known are {', '.join(KINDS)}")
    architecture, subtract, names = KINDS[kind]
    tensors = read_torch(folder / WEIGHTS, label, device)
    weights = take(tensors, names, label)
    d_sae, d_in = weights["W_dec"].shape
    if "threshold" in weights:
        weights["threshold"] = _each(weights["threshold"], d_sae)
    k = _k(tensors, trainer, label) if "TopK" in kind else None
    return Stored(
        "dictionary_learning",
        config(
            architecture,
            d_in,
            d_sae,
            subtract=subtract,
            k=k if architecture == "topk" else None,
            model_name=model_in(trainer.get("lm_name")),
            context_size=buffer.get("ctx_len"),
        ),
        weights,
        _hook(trainer, buffer, where, label),
        fold_decoder_norm=kind in WITH_NORM,
        l0=k,
    )


def _each(threshold: Tensor, d_sae: int) -> Tensor:
    """One threshold a latent. A negative one (never calibrated) lets every positive latent pass."""
    return threshold.clamp(min=0).expand(d_sae).contiguous()


def _k(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> int:
    stored = tensors.get("k")
    if stored is None:
        return whole(trainer, "k", label)
    value = float(stored) if stored.numel() == 1 else 0.0
    return whole({"k": int(value) if value.is_integer() else value}, "k", label)


def _hook(trainer: dict[str, Any], buffer: dict[str, Any], where: str, label: str) -> str:
    """The module and side; most runs name them (`resid_post_layer_12`), some give a layer only."""
    io, name = buffer.get("io", "out"), trainer.get("submodule_name")
    if io not in ("in", "out"):
        raise UserError(f"SAE {label} maps a module's input to its output (a transcoder); "
                        "take one of the residual stream")  # fmt: skip
    if not name:
        named = re.findall(r"((?:resid|attn|attention|mlp)\w*?_layer_?\d+)", where)
        name = named[-1] if named else None
    if name and io == "out":
        return str(name)
    if not isinstance(trainer.get("layer"), int):
        raise UserError(f"config.json of SAE {label} does not say its layer")
    return f"blocks.{trainer['layer']}.hook_resid_{'pre' if io == 'in' else 'post'}"

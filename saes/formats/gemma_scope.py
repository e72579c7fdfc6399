"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors): JumpReLU, by DeepMind.

Lieberum et al. 2024, arXiv:2408.05147, section 3; b_dec is not taken from the input. The site is in
the path (`layer_12/width_16k/average_l0_71`), in the second series in config.json as well.
"""

import re
from pathlib import Path
from typing import Any

from saes.errors import UserError
from saes.formats.stored import (
    Stored,
    config,
    figure,
    layer_in,
    read_json,
    read_npz,
    read_safetensors,
    take,
)

LAYER = r"layer_(\d+)"
NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
LOWER = {**NAMES, "W_enc": "w_enc", "W_dec": "w_dec"}


def read(file: Path, where: str, label: str, device: str) -> Stored:
    """Read an .npz file of Gemma Scope.

    Args:
        where: repository and path; `-att` or `-mlp` in it means another site than the residual.
    """
    arrays = read_npz(file, label, device)
    weights = take(arrays, NAMES if "W_enc" in arrays else LOWER, label)
    d_sae, d_in = weights["W_dec"].shape
    embedding = re.search(r"(^|/)embedding/width_", where) is not None
    if embedding:  # trained on rows of the embedding matrix; the model multiplies them by sqrt(d)
        weights["W_enc"] /= d_in**0.5
        weights["W_dec"] *= d_in**0.5
        weights["b_dec"] *= d_in**0.5
    l0 = re.search(r"average_l0_(\d+)", where)
    return Stored(
        "gemma-scope",
        config("jumprelu", d_in, d_sae, subtract=False, prepend_bos=True, context_size=1024),
        weights,
        _hook(where, label, embedding),
        l0=float(l0[1]) if l0 else None,
    )


def _hook(where: str, label: str, embedding: bool) -> str:
    if embedding:
        return "hook_embed"
    if found := re.search(r"gemma-scope-[^/]*-(att|mlp|transcoders)(?=/|-|$)", where):
        return found[1]
    return f"layers.{layer_in(where, LAYER, label)}"


def read_second(folder: Path, where: str, label: str, device: str) -> Stored:
    """Read a folder of Gemma Scope 2.

    Raises:
        UserError: a transcoder, another architecture, or damage.
    """
    path = folder / "config.json"
    about = read_json(path, label) if path.is_file() else {}
    if (architecture := about.get("architecture", "jump_relu")) != "jump_relu":
        raise UserError(f"SAE {label} has the architecture {architecture!r}, not jump_relu")
    if re.search(r"(^|/)(transcoder|clt)(_all)?/", where) or about.get("hf_hook_point_out"):
        raise UserError(f"SAE {label} is a transcoder; take one of the residual stream")
    tensors = read_safetensors(folder / "params.safetensors", label, device)
    weights = take(tensors, LOWER, label)
    d_sae, d_in = weights["W_dec"].shape
    hook = about.get("hf_hook_point_in") or _hook_second(where, label)
    return Stored(
        "gemma-scope-2",
        config(
            "jumprelu",
            d_in,
            d_sae,
            subtract=False,
            prepend_bos=True,
            context_size=1024,
            model_name=_model(about),
        ),
        weights,
        str(hook),
        l0=figure(about.get("l0")),
    )


def _hook_second(where: str, label: str) -> str:
    kind = re.search(r"(resid_post|attn_out|mlp_out)", where)
    if kind and kind[1] != "resid_post":
        return kind[1]
    return f"layers.{layer_in(where, LAYER, label)}"


def _model(about: dict[str, Any]) -> str | None:
    """The model's hub name; the files write gemma-v3 for Gemma 3."""
    name = about.get("model_name")
    return None if name is None else str(name).replace("gemma-v3", "gemma-3")

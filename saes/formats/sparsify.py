"""sparsify (EleutherAI): cfg.json and sae.safetensors in a folder named by its hookpoint.

Its `SparseCoder` always takes b_dec from the input and writes W_dec as [num_latents, d_in]; the
loader in sae-lens 6.54 transposes W_dec, and takes b_dec only where the decoder is not normalised.
"""

import re
from pathlib import Path
from typing import Any

import torch

from saes.errors import UserError
from saes.formats.stored import (
    Stored,
    config,
    model_in,
    read_json,
    read_safetensors,
    take,
    whole,
)

WEIGHTS = "sae.safetensors"


def read(folder: Path, where: str, label: str, device: str) -> Stored:
    """Read a folder; its path says the hookpoint (`layers.5`, `gpt_neox.layers.3/seed0`).

    Raises:
        UserError: a transcoder, a skip connection, an activation other than top-k, or damage.
    """
    cfg = read_json(folder / "cfg.json", label)
    if cfg.get("transcode") or cfg.get("skip_connection"):
        raise UserError(
            f"SAE {label} is a transcoder or has a skip connection, which does not reconstruct the "
            "residual from sparse latents alone; take another"
        )
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise UserError(f"SAE {label} has the activation {activation!r}; only topk can be loaded")
    k = whole(cfg, "k", label)
    tensors = read_safetensors(folder / WEIGHTS, label, device)
    decoder = "W_dec" if "W_dec" in tensors else "decoder.weight.T"  # the latter before 2024-07
    names = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": decoder}
    d_in = whole(cfg, "d_in", label)
    bias = tensors.get("b_dec", torch.zeros(d_in, device=device))
    weights = {**take(tensors, names, label), "b_dec": bias}
    about = _run(folder.parent / "config.json", label)
    context = about.get("ctx_len")
    return Stored(
        "sparsify",
        config(
            "abstopk" if cfg.get("signed") else "topk",
            d_in,
            weights["b_enc"].shape[0],
            subtract=True,
            k=k,
            model_name=model_in(about.get("model")),
            context_size=context if isinstance(context, int) else None,
        ),
        weights,
        _hookpoint(where),
        l0=k,
    )


def _run(file: Path, label: str) -> dict[str, Any]:
    """What the run's config says, beside the SAE's folder; it may be a file of something else."""
    try:
        return read_json(file, label)
    except UserError:
        return {}


def _hookpoint(where: str) -> str:
    """The folder's own name, or its parent's where a seed has a folder of its own."""
    *_, parent, name = ["", *where.rstrip("/").split("/")]
    return parent if re.fullmatch(r"seed\d+", name) else name

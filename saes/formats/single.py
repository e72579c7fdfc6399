"""Single torch files that some laboratories published: Qwen Scope, Goodfire, qresearch (R1)."""

import re
from pathlib import Path

from saes.errors import UserError
from saes.formats.stored import Stored, config, layer_in, read_torch, take

BIASES = {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}


def read(file: Path, where: str, label: str, device: str) -> Stored:
    """Read a file by the tensors in it; none of the three takes b_dec from the input.

    Raises:
        UserError: tensors of no known format, or damage.
    """
    tensors = read_torch(file, label, device)
    k = None
    if {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(tensors):
        names = {"W_enc": "W_enc.T", "W_dec": "W_dec.T", "b_enc": "b_enc", "b_dec": "b_dec"}
        pattern, name, k = r"layer(\d+)\.", "qwen-scope", _sparsity(where, label)
    elif "encoder_linear.weight" in tensors:
        names = {
            "W_enc": "encoder_linear.weight.T",
            "W_dec": "decoder_linear.weight.T",
            "b_enc": "encoder_linear.bias",
            "b_dec": "decoder_linear.bias",
        }
        pattern, name = r"[-_]l(\d+)\b", "goodfire"
    elif "encoder.weight" in tensors and "decoder.bias" in tensors:
        names = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", **BIASES}
        pattern, name = r"[-_]l(\d+)\b", "deepseek-r1"
    else:
        raise UserError(
            f"SAE {label} is of an unknown format: {file.name} holds "
            f"{', '.join(sorted(tensors)[:6]) or 'no tensor'}"
        )
    weights = take(tensors, names, label)
    d_sae, d_in = weights["W_dec"].shape
    architecture = "standard" if k is None else "topk"
    return Stored(
        name,
        config(architecture, d_in, d_sae, subtract=False, k=k),
        weights,
        f"layers.{layer_in(where, pattern, label)}",
        l0=k,
    )


def _sparsity(where: str, label: str) -> int:
    """k of a Qwen Scope repository, from its name (`SAE-Res-Qwen3-8B-Base-W64K-L0_50`)."""
    found = re.search(r"L0_(\d+)", where)
    if found is None:
        raise UserError(
            f"the path of SAE {label} does not say how many latents fire; keep the repository's "
            "name in it (SAE-Res-Qwen3-8B-Base-W64K-L0_50)"
        )
    return int(found[1])

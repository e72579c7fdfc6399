"""Recognise an SAE's format, read it, and make of it an inference SAE of sae-lens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.errors import UserError
from saes.formats import dictionary_learning, gemma_scope, lens, llama_scope, single, sparsify
from saes.formats.stored import Stored, figure, read_json, whole

LOOKED_FOR = (
    "cfg.json + sae_weights.safetensors (sae-lens), cfg.json + sae.safetensors (sparsify), "
    "config.json + ae.pt (dictionary_learning), params.npz (Gemma Scope), params.safetensors "
    "(Gemma Scope 2), hyperparams.json + checkpoints/final.safetensors (Llama Scope)"
)


def read(
    path: Path,
    where: str,
    label: str,
    device: str,
    *,
    scale: float | None = None,
    overrides: dict[str, Any] | None = None,
) -> Stored:
    """Read an SAE of any known format.

    Args:
        path: its folder, or its file where the format is a single file.
        where: repository and path, or the path; some formats name layer and sparsity there.
        label: what to call it in errors.
        scale: constant that inputs are multiplied by, where the registry tells it.
        overrides: settings that replace those of a sae-lens config.

    Raises:
        UserError: an unknown format (with what was looked for), or damaged files.
    """
    if path.is_file():
        return _read_file(path, where, label, device)

    def has(name: str) -> bool:
        return (path / name).is_file()

    if has(sparsify.WEIGHTS):
        return sparsify.read(path, where, label, device)
    if has(dictionary_learning.WEIGHTS):
        return dictionary_learning.read(path, where, label, device)
    if has("params.npz"):
        return gemma_scope.read(path / "params.npz", where, label, device)
    if has("params.safetensors"):
        return gemma_scope.read_second(path, where, label, device)
    for layout in llama_scope.LAYOUTS:
        if has(layout[0]) and has(layout[1]) and not has(lens.CONFIG):
            return llama_scope.read(path, layout, label, device, scale)
    if has(lens.CONFIG) and has(lens.WEIGHTS):
        return _promised(lens.read(path, label, device, scale, overrides or {}), path, label)
    raise _unknown(path, label)


def _read_file(path: Path, where: str, label: str, device: str) -> Stored:
    if path.name == dictionary_learning.WEIGHTS:
        return dictionary_learning.read(path.parent, where.rpartition("/")[0], label, device)
    if path.suffix == ".npz":
        return gemma_scope.read(path, where, label, device)
    if path.suffix in (".pt", ".pth"):
        return single.read(path, where, label, device)
    if (
        path.name in ("cfg.json", "config.json", "hyperparams.json")
        or path.suffix == ".safetensors"
    ):
        raise UserError(f"SAE {label}: give the folder that holds {path.name}, not the file")
    raise UserError(f"SAE {label} is of an unknown format; known are {LOOKED_FOR}")


def _unknown(path: Path, label: str) -> UserError:
    """The error for a folder of no known format, with the SAEs below it if there are any."""
    for config, weights in ((lens.CONFIG, lens.WEIGHTS), *llama_scope.LAYOUTS):
        here = [name for name in (config, weights) if (path / name).is_file()]
        if len(here) == 1 and here[0] != "config.json":
            lacking = weights if here[0] == config else config
            return UserError(
                f"SAE folder {label} lacks {lacking}; it is incomplete, fetch it again"
            )
    weights = (lens.WEIGHTS, sparsify.WEIGHTS, "ae.pt", "params.npz", "params.safetensors")
    inside = sorted(f.name for f in path.iterdir() if any((f / name).is_file() for name in weights))
    if inside:
        some = ", ".join(inside[:4]) + (" ..." if len(inside) > 4 else "")
        return UserError(f"{label} is a folder of SAEs; name one of them: {some}")
    return UserError(f"no SAE of a known format in {label}; looked for {LOOKED_FOR}")


def _promised(stored: Stored, folder: Path, label: str) -> Stored:
    """With the figures of quality.json, which this package writes beside what it trains."""
    file = folder / "quality.json"
    if not file.is_file():
        return stored
    record = read_json(file, label)
    held_out = record.get("held_out", record)
    if not isinstance(held_out, dict):
        return stored
    return stored._replace(
        variance_explained=figure(held_out.get("variance_explained")),
        l0=figure(held_out.get("l0")) or stored.l0,
    )


def build(stored: Stored, label: str, device: str) -> Any:
    """The inference SAE of sae-lens, in float32, with everything folded that is exact to fold.

    Raises:
        UserError: weights that lack a tensor or have another shape than the config says, or a k
            that is not from 1 to d_sae.
    """
    from sae_lens import SAE

    _check_shapes(stored, label)
    _check_k(stored.cfg, label)

    def converter(*_: Any, **__: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {**stored.cfg, "device": device}, stored.tensors

    try:
        sae: Any = SAE.load_from_disk("", device=device, dtype="float32", converter=converter)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        line = " ".join(lines[:2])[:200] or type(error).__name__
        raise UserError(f"the weights of SAE {label} are damaged: {line}") from None
    if stored.centred:
        _centre(sae, label)
    if stored.fold_decoder_norm:
        sae.fold_W_dec_norm()
        if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
            sae.cfg.rescale_acts_by_decoder_norm = False  # all norms are 1 now; `scale` alters them
    if stored.scale is not None:
        sae.fold_activation_norm_scaling_factor(stored.scale)
    return sae.eval().requires_grad_(False)


def _check_shapes(stored: Stored, label: str) -> None:
    d_in, d_sae = whole(stored.cfg, "d_in", label), whole(stored.cfg, "d_sae", label)
    for name, wanted in (("W_dec", (d_sae, d_in)), ("W_enc", (d_in, d_sae))):
        tensor = stored.tensors.get(name)
        if tensor is None or tuple(tensor.shape) == wanted:
            continue
        turned = tuple(tensor.shape) == wanted[::-1]
        raise UserError(
            f"the weights of SAE {label} are damaged: {name} is {list(tensor.shape)} instead of "
            f"{list(wanted)}" + (" (it is transposed)" if turned else "")
        )
    for name, tensor in stored.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"the weights of SAE {label} are damaged: {name} is not finite")


def _check_k(cfg: dict[str, Any], label: str) -> None:
    """k decides nothing in other architectures, but one that is damaged must not be believed."""
    if cfg["architecture"] not in ("topk", "abstopk") and cfg.get("k") is None:
        return
    if (k := whole(cfg, "k", label)) > cfg["d_sae"]:
        raise UserError(
            f"the config of SAE {label} is damaged: k is {k}, but it has {cfg['d_sae']} latents"
        )


@torch.no_grad()
def _centre(sae: Any, label: str) -> None:
    """Let the encoder see x_c = x - mean(x), with the mean over dimensions, given x.

    center_writing_weights of TransformerLens takes that mean out of everything that GPT-2 writes to
    the residual stream; the model as published leaves it in. With W' = W - mean(W) over inputs,
    x_c W = x W'. The b_dec that is taken from the input is not centred: (x_c - b_dec) W =
    (x - b_dec) W' - mean(b_dec) sum(W). The decoder stays: it gives back x_c, and every layer norm
    of the model takes the mean out again.
    """
    if not hasattr(sae, "b_enc") and not hasattr(sae, "b_gate"):  # matching pursuit
        raise UserError(
            f"SAE {label} was trained on the centred residual, which cannot be folded into the "
            f"weights of a {sae.cfg.architecture()} SAE; take another"
        )
    if sae.cfg.apply_b_dec_to_input:
        shift = sae.b_dec.mean() * sae.W_enc.sum(0)
        if hasattr(sae, "b_gate"):
            sae.b_gate -= shift
            sae.b_mag -= shift * sae.r_mag.exp()
        else:
            sae.b_enc -= shift
    sae.W_enc -= sae.W_enc.mean(0, keepdim=True)

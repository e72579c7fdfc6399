"""What every format's reader hands over, and the files that readers open."""

import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saes.errors import UserError


class Stored(NamedTuple):
    """An SAE as its files hold it, in the names and orientation of sae-lens."""

    format: str
    cfg: dict[str, Any]
    """Config of sae-lens 6: architecture, d_in, d_sae, k, apply_b_dec_to_input, metadata."""
    tensors: dict[str, Tensor]
    """float32: W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec, threshold and so on."""
    hook: str
    """Where it reads, in the format's own words."""
    scale: float | None = None
    """Constant that the format multiplies inputs by, and divides reconstructions by."""
    fold_decoder_norm: bool = False
    """Whether the format multiplies latents by the norms of their decoder rows."""
    centred: bool = False
    """Whether the encoder is to see x less its mean over dimensions."""
    l0: float | None = None
    """Mean number of latents on a token that the files promise."""
    variance_explained: float | None = None


def config(
    architecture: str, d_in: int, d_sae: int, *, subtract: bool, k: int | None = None, **about: Any
) -> dict[str, Any]:
    """A config of sae-lens 6.

    Args:
        subtract: whether b_dec is taken from the input before encoding.
        about: metadata (model_name, context_size, prepend_bos ...); None is left out.
    """
    from sae_lens import __version__

    about = {key: value for key, value in about.items() if value is not None}
    cfg = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": subtract,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": __version__, **about},
    }
    return cfg if k is None else {**cfg, "k": k}


def read_json(path: Path, label: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"SAE {label} lacks {path.name}; fetch it again") from None
    except (ValueError, OSError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path.name} of SAE {label} is damaged; fetch it again")
    return cast("dict[str, Any]", tree)


def read_safetensors(path: Path, label: str, device: str) -> dict[str, Tensor]:
    """All tensors of a file, in float32."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path.name, label, error) from None


def read_npz(path: Path, label: str, device: str) -> dict[str, Tensor]:
    """All arrays of a file, in float32. Pickled objects are refused."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {
                name: torch.from_numpy(arrays[name].astype(np.float32, copy=False)).to(device)
                for name in arrays.files
            }
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, TypeError) as error:
        raise damaged(path.name, label, error) from None


def read_torch(path: Path, label: str, device: str) -> dict[str, Tensor]:
    """A state dict written by torch.save, in float32; nothing but tensors is unpickled."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path.name} of SAE {label} is a pickle that holds more than tensors, and loading it "
            "could run code; save its state dict with safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise damaged(path.name, label, error) from None
    if not isinstance(state, dict):
        raise UserError(f"{path.name} of SAE {label} holds no state dict of tensors")
    items = cast("dict[str, Any]", state).items()
    return {name: value.float() for name, value in items if isinstance(value, Tensor)}


def damaged(name: str, label: str, error: BaseException) -> UserError:
    """The error for a file that cannot be read."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return UserError(f"{name} of SAE {label} is damaged: {line}; fetch it again")


def take(tensors: dict[str, Tensor], names: dict[str, str], label: str) -> dict[str, Tensor]:
    """Tensors under sae-lens's names; a name that ends in `.T` is transposed.

    Each is taken out of `tensors`, so that no second copy of a matrix stays.

    Args:
        names: sae-lens's name to the file's.

    Raises:
        UserError: one is missing.
    """
    out: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        plain = theirs.removesuffix(".T")
        if plain not in tensors:
            raise UserError(f"the weights of SAE {label} are damaged: they lack {plain}")
        tensor = tensors.pop(plain)
        out[ours] = tensor.T.contiguous() if theirs.endswith(".T") else tensor
    return out


def number(tree: dict[str, Any], key: str, label: str) -> float:
    """A positive number of a config file."""
    value = tree.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"the config of SAE {label} is damaged: {key} is {value!r}")
    return float(value)


def whole(tree: dict[str, Any], key: str, label: str) -> int:
    """A whole number of a config file, 1 or more."""
    value = tree.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"the config of SAE {label} is damaged: {key} is {value!r}")
    return value


def figure(value: object) -> float | None:
    """A figure that files tell of an SAE; None for anything but a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON knows no largest integer
        return None
    return number if math.isfinite(number) else None


def model_in(value: object) -> str | None:
    """A model's name as files tell it; of a path on somebody's machine the last part."""
    if not isinstance(value, str) or not value.strip():
        return None
    parts = [part for part in re.split(r"[/\\]", value) if part]
    local = value.startswith(("/", "~", ".")) or "\\" in value or len(parts) > 2
    return (parts or [None])[-1] if local else value


def layer_in(where: str, pattern: str, label: str) -> int:
    """The last layer that a path names."""
    found = re.findall(pattern, where)
    if not found:
        raise UserError(
            f"the path of SAE {label} does not say its layer; keep the folder names it was "
            "published with (layer_12/width_16k/average_l0_71)"
        )
    return int(found[-1])

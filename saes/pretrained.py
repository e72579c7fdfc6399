"""Load SAEs that were trained before, from folders in sae-lens's format."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from saes.errors import UserError
from saes.files import locate
from saes.latents import SaeLens
from saes.lm.model import parse_site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NOT_RESIDUAL = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "temporal")


def load_sae(path: str | Path, *, d_model: int, device: str = "cpu") -> SaeLens:
    """A sae-lens folder as a `Dictionary`, in float32 whatever it is stored in.

    Decoder norms that the architecture multiplies into its latents (`rescale_acts_by_decoder_norm`)
    are folded into the weights, which leaves latents and reconstructions as they are.

    Args:
        path: folder with cfg.json and sae_weights.safetensors, or `packaged/demo_saes/SITE`.
        d_model: width of the model's residual stream.

    Raises:
        UserError: a missing or damaged folder, another width than the model's, no residual site
            in the metadata, or a kind of SAE that is not a sparse dictionary of one residual.
    """
    folder = locate(path)
    cfg = _config(folder, path)
    site = _site(cfg, path)
    if cfg["d_in"] != d_model:
        raise UserError(
            f"SAE {path} reads width {cfg['d_in']} but the model's residual stream has {d_model}; "
            "take an SAE that was trained on this model"
        )
    if cfg.get("architecture") in NOT_RESIDUAL:
        raise UserError(
            f"SAE {path} is a {cfg['architecture']}, which does not reconstruct a single "
            "token's residual; take another architecture"
        )
    if (norm := cfg.get("normalize_activations", "none")) != "none":
        raise UserError(
            f"SAE {path} expects activations normalised by {norm!r}; fold the normalisation into "
            "its weights and save it anew with normalize_activations 'none'"
        )
    sae = _load(folder, path, device)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        sae.fold_W_dec_norm()
    return SaeLens(sae.eval().requires_grad_(False), site)


def _config(folder: Path, path: str | Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"no SAE folder {path}; give a folder that holds {CONFIG} and {WEIGHTS}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"SAE folder {path} lacks {name}; it is incomplete, fetch it again")
    try:
        cfg = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        assert isinstance(cfg["d_in"], int)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{CONFIG} of SAE {path} is damaged; fetch the folder again") from None
    return cfg


def _site(cfg: dict[str, Any], path: str | Path) -> str:
    """The residual-stream site in the metadata (sae-lens 6) or at the top level (before)."""
    name = (cfg.get("metadata") or {}).get("hook_name") or cfg.get("hook_name")
    if name is None:
        raise UserError(f"SAE {path} does not say its site; set metadata.hook_name in {CONFIG}")
    return str(parse_site(str(name)))


def _load(folder: Path, path: str | Path, device: str) -> Any:
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device=device, dtype="float32")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"SAE {path} is damaged or of an unknown kind: {line}") from None

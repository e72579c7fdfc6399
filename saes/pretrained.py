"""Load SAEs of any format, wherever they lie, checked against the model they are to be used on."""

from pathlib import Path
from typing import Any, NamedTuple

from saes.check import Check, Expect, require, self_check
from saes.errors import UserError
from saes.formats.build import build, read
from saes.formats.hooks import site_of
from saes.formats.stored import Stored
from saes.latents import Origin, SaeLens
from saes.lm.model import LM
from saes.registry import Listed
from saes.sources import Source, resolve


class Loaded(NamedTuple):
    """An SAE that fits the model, and what its check found."""

    dictionary: SaeLens
    check: Check


def load_sae(source: str | Path, *, d_model: int, device: str = "cpu") -> SaeLens:
    """An SAE as a `Dictionary`, in float32 whatever it is stored in, not tried on any model.

    Norms of decoder rows that an architecture multiplies into its latents, and a constant factor on
    inputs, are folded into the weights, which leaves latents and reconstructions as they are.

    Args:
        source: `packaged/NAME`; a folder or file of sae-lens, sparsify, dictionary_learning, Gemma
            Scope or Llama Scope; `RELEASE/ID` of sae-lens's registry; or a hub repository
            (`OWNER/NAME/FOLDER`).
        d_model: width of the model's residual stream.

    Raises:
        UserError: nothing there, an unknown format, damaged files, another width than the model's,
            a site that is not of the residual stream, or an SAE whose decoder is not one fixed
            affine map of a single token's residual.
    """
    return _load(resolve(source), d_model, device)[0]


def load_checked(source: str | Path, lm: LM, *, trust: bool = False) -> Loaded:
    """An SAE for this model, on its device, tried on real residuals at its site.

    Args:
        source: as for `load_sae`.
        trust: take it even if it fails; `check` then says why.

    Raises:
        UserError: as `load_sae`; a site that the model does not have; or an SAE that does not
            reconstruct the model's residuals, with the probable cause.
    """
    dictionary, expect = _load(resolve(source), lm.d_model, str(lm.device))
    check = self_check(lm, dictionary, expect=expect)
    require(check, trust)
    return Loaded(dictionary, check)


def _load(source: Source, d_model: int, device: str) -> tuple[SaeLens, Expect]:
    """The SAE, and what its files or the registry promise of it."""
    listed, label = source.listed, source.given
    stored = read(
        source.path,
        source.where,
        label,
        device,
        scale=listed.norm_scaling_factor if listed else None,
        overrides=listed.overrides if listed else None,
    )
    site = site_of(stored.hook, label)
    if stored.cfg["d_in"] != d_model:
        raise UserError(
            f"SAE {label} reads width {stored.cfg['d_in']} but the model's residual stream has "
            f"{d_model}; take an SAE that was trained on this model"
        )
    metadata: dict[str, Any] = stored.cfg["metadata"]
    metadata["hook_name"] = site  # what is saved again says where it belongs
    if listed:
        metadata.setdefault("model_name", listed.model)
        metadata["neuronpedia_id"] = listed.neuronpedia or metadata.get("neuronpedia_id")
    origin = origin_of(source, stored.format, metadata.get("neuronpedia_id"))
    return SaeLens(build(stored, label, device), site, origin), _expect(stored, listed)


def origin_of(source: Source, format: str, neuronpedia: str | None) -> Origin:
    """Where the SAE of a source is from, given its file format and its id at Neuronpedia."""
    listed = source.listed
    return Origin(
        source.name,
        format,
        release=listed.release if listed else None,
        sae_id=listed.id if listed else None,
        neuronpedia=neuronpedia,
        revision=source.revision,
    )


def _expect(stored: Stored, listed: Listed | None) -> Expect:
    """What the registry and the files promise; of variance the files, for they lie nearer."""
    explained, l0 = stored.variance_explained, stored.l0
    if listed:
        explained = listed.variance_explained if explained is None else explained
        l0 = listed.l0 or l0
    return Expect(None if explained is None else float(explained), float(l0) if l0 else None)

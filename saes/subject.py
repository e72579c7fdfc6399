"""The subject of a run: which model and SAEs, how they are loaded, and what identifies them.

Torch is imported when something is loaded, not before, so that a finished run is recognised and the
help is printed without it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from saes import sources
from saes.errors import UserError
from saes.files import locate, tree_sha256

if TYPE_CHECKING:
    from saes.check import Check
    from saes.latents import SaeLens
    from saes.lm.model import LM


@dataclass(frozen=True)
class SubjectConfig:
    """The language model and the SAEs under study."""

    model: str
    """Hub name, local folder, or packaged/NAME."""
    saes: tuple[str, ...]
    """SAEs, one a site: folder of any format, packaged/NAME, RELEASE/ID, or hub repository."""
    trust: bool = False
    """Take SAEs that fail the check on loading."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["8bit", "4bit"] | None = None
    """Load the model quantised, through bitsandbytes."""
    device_map: Literal["auto"] | None = None
    """Spread a model that is larger than one device over all of them, instead of `device`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; None is its main branch."""
    threads: int = 2
    """CPU threads; part of the result, since they decide the order of floating-point sums."""

    def __post_init__(self) -> None:
        if not self.saes:
            raise ValueError("saes is empty; name at least one SAE")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


class Subject(NamedTuple):
    """A loaded model with one dictionary per site."""

    lm: "LM"
    dictionaries: tuple["SaeLens", ...]
    checks: tuple["Check", ...]
    """How each of them did on the model."""

    def dictionary(self, site: str) -> "SaeLens":
        """The dictionary at `site`."""
        return next(d for d in self.dictionaries if d.site == site)


def load_subject(config: SubjectConfig) -> Subject:
    """Load the model and its SAEs, each tried on the model's residuals at its site.

    Raises:
        UserError: unknown model, missing folder, no tokenizer, an SAE that does not fit the model
            (one that fails its check is taken with `trust`), two SAEs at one site, or a device
            that is not there.
    """
    import torch

    from saes.pretrained import load_checked

    torch.set_num_threads(config.threads)
    lm = load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        device_map=config.device_map,
        revision=config.revision,
    )
    loaded = [load_checked(source, lm, trust=config.trust) for source in config.saes]
    dictionaries = tuple(one.dictionary for one in loaded)
    sites = [str(lm.site(d.site)) for d in dictionaries]
    twice = sorted({site for site in sites if sites.count(site) > 1})
    if twice:
        raise UserError(f"two SAEs sit at {twice[0]}; a run takes one SAE per site")
    return Subject(lm, dictionaries, tuple(one.check for one in loaded))


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
) -> "LM":
    """The model of a run or a command, of a hub name the very commit that `fingerprint` states.

    Args:
        device: must be left at the CPU when `device_map` places the model.

    Raises:
        UserError: as `saes.lm.model.load_lm`, or a device that is not there.
    """
    import torch

    from saes.lm.model import load_lm

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        reason = "no such kind" if reason.startswith("Expected one of") else reason
        raise UserError(
            f"device {device!r} cannot be used here ({reason}); set it to cpu"
        ) from None
    return load_lm(
        name,
        device=None if device_map and device == "cpu" else device,
        dtype=dtype,
        device_map=device_map,
        quantize=quantize,
        revision=commit(name, revision) or revision,
    )


def fingerprints(config: SubjectConfig) -> dict[str, str]:
    """What identifies the model and each SAE, by its name in the config.

    Raises:
        UserError: an SAE that cannot be found.
    """
    saes = {name: sources.fingerprint(name) for name in config.saes}
    return {config.model: fingerprint(config.model, config.revision), **saes}


def fingerprint(name: str, revision: str | None = None) -> str:
    """Identify a model: the hash of its folder, or the hub name with the commit of its files."""
    folder = locate(name)
    if folder.exists():
        return tree_sha256(folder)
    found = commit(name, revision)
    return f"hub:{name}@{found or revision}" if found or revision else f"hub:{name}"


def commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a hub model: the one that the local cache holds, else the hub's own.

    Fetching config.json, a small file, settles it before anything is computed: a second start must
    find what the first one found. None for a folder, and where neither cache nor hub has it.
    """
    import huggingface_hub as hub

    if locate(name).exists():
        return None
    try:
        file = hub.try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(file, str):
            file = cast("Any", hub).hf_hub_download(name, "config.json", revision=revision)
    except Exception:  # of many types; loading it will say what is wrong
        return None
    return Path(file).parent.name

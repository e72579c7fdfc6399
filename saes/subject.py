"""The subject of a run: which model and SAEs, how they are loaded, and what identifies them.

Torch is imported when something is loaded, not before, so that a finished run is recognised and the
help is printed without it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from saes.errors import UserError
from saes.files import locate, tree_sha256

if TYPE_CHECKING:
    from saes.latents import Dictionary
    from saes.lm.model import LM


@dataclass(frozen=True)
class SubjectConfig:
    """The language model and the SAEs under study."""

    model: str
    """Hub name, local folder, or packaged/NAME."""
    saes: tuple[str, ...]
    """SAE folders in sae-lens format, or packaged/NAME; one per site."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 2
    """CPU threads; part of the result, since they decide the order of floating-point sums."""

    def __post_init__(self) -> None:
        if not self.saes:
            raise ValueError("saes is empty; name at least one SAE folder")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


class Subject(NamedTuple):
    """A loaded model with one dictionary per site."""

    lm: "LM"
    dictionaries: tuple["Dictionary", ...]

    def dictionary(self, site: str) -> "Dictionary":
        """The dictionary at `site`."""
        return next(d for d in self.dictionaries if d.site == site)


def load_subject(config: SubjectConfig) -> Subject:
    """Load the model and its SAEs, each checked against the model.

    Raises:
        UserError: unknown model, missing folder, no tokenizer, a SAE that does not fit the model,
            two SAEs at one site, or a device that is not there.
    """
    import torch

    from saes.lm.model import load_lm
    from saes.pretrained import load_sae

    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {config.device!r} cannot be used here: {reason}") from None
    torch.set_num_threads(config.threads)
    lm = load_lm(config.model, device=config.device, dtype=config.dtype)
    dictionaries = tuple(
        load_sae(path, d_model=lm.d_model, device=config.device) for path in config.saes
    )
    sites = [str(lm.site(d.site)) for d in dictionaries]
    twice = sorted({site for site in sites if sites.count(site) > 1})
    if twice:
        raise UserError(f"two SAEs sit at {twice[0]}; a run takes one SAE per site")
    return Subject(lm, dictionaries)


def fingerprint(name: str) -> str:
    """Identify a model or SAE: the hash of its folder, or the hub name.

    A hub name stands for itself: when the hub's files change, delete the capture stage.
    """
    folder = locate(name)
    return tree_sha256(folder) if folder.is_dir() else f"hub:{name}"

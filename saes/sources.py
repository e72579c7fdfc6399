"""Where an SAE's files lie: packaged, on disk, in sae-lens's registry, or in a hub repository.

Nothing here loads a tensor: torch is not imported.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saes.errors import UserError
from saes.files import locate, sha256, tree_sha256
from saes.registry import Listed, find, releases_like

WEIGHTS = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "checkpoints/final.safetensors",
    "params.npz",
    "params.safetensors",
    "ae.pt",
)
CONFIGS = ("cfg.json", "config.json", "hyperparams.json", "quality.json")
BESIDE = ("origin.json", "training.json")
"""Fetched as well, though they decide nothing."""
SINGLE = (".npz", ".pt", ".pth", ".safetensors")


class Source(NamedTuple):
    """The files of one SAE on this machine."""

    given: str
    """What was asked for, for errors."""
    name: str
    """The same as it may be written down: of a local path the last part or the last two."""
    path: Path
    """Folder, or file where the format is a single file."""
    where: str
    """Repository and path, or the path alone; formats read layers and sparsities out of it."""
    listed: Listed | None = None
    """What the registry says of it."""
    revision: str | None = None
    """Commit of the hub repository."""


def resolve(source: str | Path) -> Source:
    """Find an SAE's files, and fetch them when they lie in a hub repository.

    Args:
        source: `packaged/NAME`, an existing folder or file, `RELEASE/ID` of sae-lens's registry, or
            a hub repository `OWNER/NAME` with a folder or file in it (`OWNER/NAME/FOLDER`). They
            are tried in this order.

    Raises:
        UserError: nothing of that name, or a hub that cannot be reached and has no cached copy.
    """
    text = str(source)
    path = locate(source)
    if path.exists():
        name = text if text.startswith("packaged/") else _local_name(path.resolve())
        return Source(text, name, path, path.absolute().as_posix())
    if isinstance(source, Path) or text.startswith(("packaged/", ".", "/", "~")):
        raise UserError(f"no SAE folder {text}; give a folder or file that holds an SAE")
    if listed := find(text):
        if reason := listed.why_not:
            raise UserError(f"SAE {text} cannot be loaded: {reason}; take another of the registry")
        return _fetch(text, listed.repo, listed.path, listed)
    owner, slash, rest = text.partition("/")
    name, _, inner = rest.partition("/")
    if not slash or not owner or not name:
        near = releases_like(owner)
        raise UserError(
            f"no SAE {text}: it is no folder, and a released SAE is named RELEASE/ID"
            + (f" (releases like it: {', '.join(near)})" if near else "")
        )
    return _fetch(text, f"{owner}/{name}", inner.strip("/"), None)


def _local_name(path: Path) -> str:
    """Its last part, with the one before where only that can tell the SAEs of a run apart.

    >>> _local_name(Path("/runs/x/saes/blocks.4.hook_resid_post/k16"))
    'blocks.4.hook_resid_post/k16'
    """
    parent = path.parent
    if re.search(r"(?<![a-z])(blocks|layers?|h)[._]?\d+", path.name) or parent in (
        Path.home(),
        Path("/"),
    ):
        return path.name
    return f"{parent.name}/{path.name}"


def fingerprint(source: str | Path) -> str:
    """SHA-256 over the names and bytes of an SAE's files, hex.

    Of a hub repository, over the files that belong to this SAE; where they lie does not matter.

    Raises:
        UserError: as `resolve`.
    """
    found = resolve(source)
    if found.revision is None or found.path.is_file():
        return tree_sha256(found.path)
    total = hashlib.sha256()
    for name in sorted((*WEIGHTS, *CONFIGS)):
        if (found.path / name).is_file():
            total.update(f"{name}\0{sha256(found.path / name)}\n".encode())
    return total.hexdigest()


def _fetch(text: str, repo: str, inner: str, listed: Listed | None) -> Source:
    """The files of `inner` in a hub repository, from the cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if ".." in inner.split("/"):
        raise UserError(f"SAE {text}: name the folder inside the repository without '..'")
    try:
        root = Path(snapshot_download(repo, allow_patterns=_patterns(inner)))
    except HFValidationError:
        raise UserError(f"{repo!r} of SAE {text} is not the name of a hub repository") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"SAE {text}: hub repository {repo} is not in the local cache, and the hub is off or "
            "cannot be reached; fetch it once with the hub on"
        ) from None
    except Exception as error:  # of many types; each means that it cannot be fetched now
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"SAE {text}: cannot fetch hub repository {repo}: {line}") from None
    path = root / inner
    if not path.exists() or not _held(path):
        raise UserError(
            f"SAE {text}: no SAE at {inner or 'the top'} of hub repository {repo}, or it is not in "
            f"the local cache (revision {root.name[:12]}); check the folder, or fetch it once with "
            "the hub on"
        )
    return Source(text, text, path, f"{repo}/{inner}".rstrip("/"), listed, root.name)


def _held(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in WEIGHTS)


def _patterns(inner: str) -> list[str]:
    """The files of one SAE by name, so that a repository of hundreds is not fetched whole."""
    folder, wanted = PurePosixPath(inner), (*CONFIGS, *BESIDE)
    if inner.endswith(SINGLE):
        return [inner, *((folder.parent / name).as_posix() for name in wanted)]
    names = [(folder / name).as_posix() for name in (*WEIGHTS, *wanted)]
    return [*names, (folder.parent / "config.json").as_posix()]

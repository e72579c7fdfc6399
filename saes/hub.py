"""SAEs to and from a hub repository or a folder, in sae-lens's format, with a card."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from safetensors import safe_open

from saes.card import card
from saes.errors import UserError
from saes.files import check_space, locate, sha256, sync_folder
from saes.formats.build import build, read
from saes.formats.hooks import site_of
from saes.formats.stored import Stored
from saes.pretrained import origin_of
from saes.sources import Source, resolve

CONFIG, WEIGHTS, ORIGIN, CARD = "cfg.json", "sae_weights.safetensors", "origin.json", "README.md"
FIGURES = "quality.json"
BESIDE = (FIGURES, "training.json", ORIGIN)
"""Files that go along where they are there."""
KNOWN = {CONFIG, WEIGHTS, CARD, *BESIDE}
"""Files that an SAE folder of ours may hold; one that holds others is not replaced."""
DESCRIBING = {"dataset_path", "model_name", "hook_name"}
"""Settings of the registry that change no weight."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
MACHINE_PATH = re.compile(
    r"""^/\S                                  # a string that is a path, wherever it leads
    | (?:^|[\s"'=:(,;\[])(?:file://)?         # inside others, or after a scheme that means one
      (?: /(?:home|Users|root|mnt|media|data|tmp|scratch|var|opt|srv|work|workspace|private
             |Volumes|content|kaggle|gpfs|lustre|nfs)/\S
        | ~[\w.-]*/\S
        | \$\{?HOME\b | %USERPROFILE%
        | [A-Za-z]:[\\/]\S
        | \\\\\w
      )
    | \bfile:///?\S
    """,
    re.VERBOSE,
)
INDEX = """---
library_name: saelens
---

# Sparse autoencoders

One in each folder, in the format of sae-lens; every folder has a card of its own.

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "FOLDER")
```
"""


@runtime_checkable
class Api(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...
    def file_exists(self, repo_id: str, filename: str) -> bool: ...
    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        delete_patterns: list[str] | None,
    ) -> Any: ...


class Remote(NamedTuple):
    """A place in a hub repository."""

    repo: str
    """OWNER/NAME."""
    folder: str

    @property
    def source(self) -> str:
        """What `saes.pretrained` loads it by."""
        return f"{self.repo}/{self.folder}"


def pull(source: str | Path, folder: Path, *, force: bool = False) -> Path:
    """Copy an SAE into a local folder in sae-lens's format.

    What is in sae-lens's format already keeps its weights byte for byte; anything else is converted
    to float32, with what has to be folded into the weights folded. Its Neuronpedia id and its site
    go into cfg.json, where it came from into origin.json. The folder is whole or not there.

    Args:
        source: anything that `saes.pretrained.load_sae` takes.
        folder: left alone when it holds the same already.
        force: replace another SAE that is there.

    Raises:
        UserError: nothing of that name, an SAE that cannot be loaded, a folder that holds something
            else, or a disk that is too small.
    """
    found = resolve(source)
    with _whole(folder, force) as part:
        _write(found, part)
    return folder


def push(
    folder: str | Path,
    destination: str | Path,
    *,
    licence: str | None = None,
    public: bool = False,
    force: bool = False,
    api: Api | None = None,
) -> str:
    """Copy an SAE, with a card, to a hub repository or to a local folder; it is loaded first.

    A repository that is not there is made, private unless `public`; one that is keeps its setting.
    The login is the one of `hf auth login`.

    Args:
        folder: anything that `saes.pretrained.load_sae` takes, usually a folder.
        destination: `OWNER/NAME` or `OWNER/NAME/FOLDER` of a hub repository (FOLDER is else the
            SAE's site, with the SAE's own name below it if that is another), or a local folder:
            one that exists, or begins with `/`, `.` or `~`.
        licence: identifier as the hub knows it, for the card.
        force: replace an SAE that is there.
        api: takes the place of `huggingface_hub.HfApi()`.

    Returns:
        Where it is now, as `saes.pretrained.load_sae` takes it.

    Raises:
        UserError: an SAE that cannot be loaded, a path of this machine or an access token in its
            files, a destination that is neither, a hub that refuses, or as `pull`.
    """
    found = resolve(folder)
    local = _local(destination)
    if local is not None:
        with _whole(local, force) as part:
            _write(found, part)
            _check_private(part)
            text = card(part, place=local.name, repo=None, licence=licence)
            (part / CARD).write_text(text, encoding="utf-8")
        return str(destination)
    with tempfile.TemporaryDirectory() as work:
        return _upload(found, str(destination), Path(work), licence, public, force, api).source


# ------------------------------------------------------------------------------------ destinations


def _local(destination: str | Path) -> Path | None:
    """The local folder that is meant, or None for a hub repository."""
    path, text = locate(destination), str(destination)
    named = isinstance(destination, Path) or text.startswith((".", "/", "~"))
    if named or (text and path.is_dir()):
        return path
    return None


def _remote(destination: str, site: str, name: str) -> Remote:
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+(?:/[\w.-]+)*))?/?", destination)
    own = re.sub(r"[^\w.-]", "-", name.rpartition("/")[2])
    folder = (found[2] or (site if own == site else f"{site}/{own}")) if found else ""
    if found is None or ".." in folder.split("/"):
        raise UserError(
            f"cannot push to {destination!r}; write OWNER/NAME or OWNER/NAME/FOLDER of a hub "
            "repository, or a local folder that begins with ./"
        )
    return Remote(found[1], folder)


def _upload(
    found: Source,
    destination: str,
    work: Path,
    licence: str | None,
    public: bool,
    force: bool,
    api: Api | None,
) -> Remote:
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    part = work / "sae"
    part.mkdir()
    where = _remote(destination, _write(found, part), found.name)
    _check_private(part)
    target = work / "repo" / where.folder
    target.parent.mkdir(parents=True)
    part.rename(target)
    text = card(target, place=where.source, repo=where, licence=licence)
    (target / CARD).write_text(text, encoding="utf-8")
    api = HfApi() if api is None else api
    try:
        if not force and api.file_exists(where.repo, f"{where.folder}/{CONFIG}"):
            raise UserError(
                f"{where.source} holds an SAE; choose another folder, or replace it (--force)"
            )
        api.create_repo(where.repo, private=not public, exist_ok=True)
        if not api.file_exists(where.repo, CARD):
            (work / "repo" / CARD).write_text(INDEX.format(repo=where.repo), encoding="utf-8")
        api.upload_folder(
            repo_id=where.repo,
            folder_path=str(work / "repo"),
            commit_message=f"SAE {where.folder}",
            # of the SAE that is replaced nothing stays; files that are uploaded are not deleted
            delete_patterns=[f"{where.folder}/{name}" for name in sorted(KNOWN)] if force else None,
        )
    except LocalTokenNotFoundError:
        raise UserError(
            f"cannot push to {where.repo}: you are not logged in to the hub; run `hf auth login`"
        ) from None
    except HFValidationError:
        raise UserError(f"{where.repo!r} is not the name of a hub repository") from None
    except (OSError, HTTPError) as error:  # the hub's errors are OSErrors, the network's are not
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"cannot push to {where.repo}: {line}; check the name, your login (`hf auth whoami`) "
            "and the network"
        ) from None
    return where


# ------------------------------------------------------------------------------- what is written


def _write(found: Source, part: Path) -> str:
    """An SAE in sae-lens's format into the empty folder `part`; returns its site."""
    listed = found.listed
    stored = read(
        found.path,
        found.where,
        found.given,
        "cpu",
        scale=listed.norm_scaling_factor if listed else None,
        overrides=listed.overrides if listed else None,
    )
    site = site_of(stored.hook, found.given)
    sae = build(stored, found.given, "cpu")  # loads, or says why not
    beside = found.path if found.path.is_dir() else found.path.parent
    cfg = _modern_cfg(found, stored)
    if cfg is None:
        check_space(part, 4 * sum(p.numel() for p in sae.parameters()), f"SAE {found.given}")
        sae.save_model(part)
        cfg = json.loads((part / CONFIG).read_text(encoding="utf-8"))
    else:
        check_space(part, (beside / WEIGHTS).stat().st_size, f"SAE {found.given}")
        shutil.copyfile(beside / WEIGHTS, part / WEIGHTS)
    about = cfg["metadata"]
    about["hook_name"] = site
    if listed and listed.neuronpedia:
        about["neuronpedia_id"] = listed.neuronpedia
    if listed and not about.get("model_name"):
        about["model_name"] = listed.model
    _put(part / CONFIG, cfg)
    _beside(found, stored, about, beside, part)
    return site


def _beside(found: Source, stored: Stored, about: dict[str, Any], beside: Path, part: Path) -> None:
    """Copy what lies beside the SAE, and say where it came from unless that is said already."""
    for name in BESIDE:
        if (beside / name).is_file():
            tree = json.loads((beside / name).read_text(encoding="utf-8"))
            _put(part / name, tree)
    if not (part / FIGURES).exists() and (figures := _figures(beside.resolve())) is not None:
        _put(part / FIGURES, {"held_out": figures})
    if (part / ORIGIN).exists():
        return
    origin = origin_of(found, stored.format, about.get("neuronpedia_id"))
    _put(part / ORIGIN, origin._asdict())


def _figures(folder: Path) -> dict[str, Any] | None:
    """What the run that trained an SAE measured: RUN/quality/quality.json, of RUN/saes/NAME."""
    for saes in folder.parents:
        file = saes.parent / "quality" / FIGURES
        if saes.name == "saes" and file.is_file():
            tree = json.loads(file.read_text(encoding="utf-8"))
            return tree.get(folder.relative_to(saes).as_posix())
    return None


def _modern_cfg(found: Source, stored: Stored) -> dict[str, Any] | None:
    """cfg.json of a folder whose weights can be kept as they are, else None."""
    listed = found.listed
    overrides = listed.overrides if listed else {}
    changed = stored.scale is not None or not overrides.keys() <= DESCRIBING
    if stored.format != "sae-lens" or changed:
        return None
    cfg = json.loads((found.path / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(cfg.get("metadata"), dict):
        return None
    cfg["metadata"].update(overrides)
    return cfg


def _put(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _check_private(folder: Path) -> None:
    """Refuse to give away where things lie on somebody's machine, or an access token."""
    trees = {
        path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    }
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        trees[WEIGHTS] = file.metadata()
    for name, tree in sorted(trees.items()):
        for text in _strings(tree):
            if TOKEN.search(text):
                raise UserError(
                    f"{name} of the SAE holds an access token of the hub (hf_...); take it out "
                    "before the SAE is published, and revoke it"
                )
            if MACHINE_PATH.search(text):
                raise UserError(
                    f"{name} of the SAE names a path of a machine, {text[:200]}; write a hub name "
                    "or plain words there before it is published"
                )


def _strings(tree: Any) -> Iterator[str]:
    """Every string in some JSON, keys among them."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield str(key)
            yield from _strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value)


# -------------------------------------------------------------------------------- whole or absent


@contextmanager
def _whole(folder: Path, force: bool) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` when the block ends without an error."""
    folder = folder.absolute()
    _check_replaceable(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if _same(part, folder):
            return
        _sync(part)
        if folder.exists() and any(folder.iterdir()):
            if not force:
                raise UserError(
                    f"{folder} holds something else; choose another folder, or replace it (--force)"
                )
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old)
        else:
            part.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    others = (
        sorted(p.name for p in folder.iterdir() if p.name not in KNOWN) if folder.exists() else []
    )
    if others:
        raise UserError(f"{folder} holds other files ({others[0]}); name a folder of its own")


def _sync(part: Path) -> None:
    """Bring files to the disk, so that no power cut leaves empty ones under the final name."""
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(part)


def _same(part: Path, folder: Path) -> bool:
    """Whether `folder` holds every file of `part`, wherever it came from."""
    return all(
        (folder / path.name).is_file() and sha256(path) == sha256(folder / path.name)
        for path in part.iterdir()
        if path.name != ORIGIN
    )

"""Rows of a dataset of the hub, or of a folder that `datasets` saved. Only here is it imported."""

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from discovery.corpora.files import Row
from discovery.corpora.source import Source
from saes.errors import UserError

WAIT = 5.0  # seconds in which the hub should answer


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a dataset in this folder (save_to_disk)."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def rows(
    name: str, config: str | None, split: str, revision: str | None, folder: Path | None = None
) -> Iterator[Row]:
    """The rows of a split, with the names of classes in the place of their numbers.

    Nothing is executed that a dataset brings along: a dataset that is a script is refused. Where
    the hub is out of reach, what was loaded before comes from the cache of `datasets`.

    Args:
        name: OWNER/NAME of a dataset of the hub.
        config: its configuration (subset).
        revision: branch, tag or commit.
        folder: read the dataset that was saved there instead.

    Raises:
        UserError: an unknown dataset, configuration or split, or a hub that cannot be reached and
            a cache that does not hold it.
    """
    data = _open_hub(name, config, split, revision) if folder is None else _saved(folder, split)
    classes = _classes(data.features)
    place = " ".join(part for part in (name, config, split) if part)
    for number, cells in enumerate(data, start=1):
        named = {c: _named(value, classes.get(c)) for c, value in cells.items()}
        yield Row(f"{place}, row {number}", number, named)


def _library() -> Any:
    """`datasets`, which takes seconds to import and has no types."""
    return importlib.import_module("datasets")


def _open_hub(name: str, config: str | None, split: str, revision: str | None) -> Any:
    datasets = _library()
    local = datasets.DownloadConfig(local_files_only=True)
    reasons: list[str] = []
    online = _reached()
    for options in ({},) * online + ({"download_config": local},):
        try:
            with nullcontext() if online and not options else _offline(datasets):
                return datasets.load_dataset(
                    name, config, split=split, revision=revision, **options
                )
        except Exception as error:  # many types; each means that it cannot be had this way
            reasons.append(_line(error))
    if not online:
        raise UserError(
            f"no texts {name!r}: it is neither a file or folder here, nor a dataset that the cache "
            f"of `datasets` holds, and the hub is off or cannot be reached ({reasons[0]})"
        )
    raise UserError(
        f"no texts {name!r}: it is neither a file or folder here, nor a dataset that the hub gave "
        f"or the cache of `datasets` holds ({reasons[0]})"
    )


def _reached() -> bool:
    """Whether the hub answers: asked once, since `datasets` asks for a minute before it gives up,
    with a line for every time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=WAIT)
    except Exception:  # of many types, of a session that is off too; each means that it does not
        return False
    return True


@contextmanager
def _offline(datasets: Any) -> Generator[None]:
    """`datasets` takes what its cache holds, and asks nobody."""
    from huggingface_hub import constants

    places = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _saved(folder: Path, split: str) -> Any:
    datasets = _library()
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # many types; each means that it cannot be read
        raise UserError(f"dataset folder {folder} cannot be read: {_line(error)}") from None
    if not isinstance(data, dict):
        if split != Source.hub_split:
            raise UserError(f"{folder} is one dataset without splits; leave out hub_split")
        return data
    if split not in data:
        there = ", ".join(str(name) for name in cast("dict[str, Any]", data))
        raise UserError(f"{folder} has no split {split!r}; there are: {there} (hub_split)")
    return cast("dict[str, Any]", data)[split]


def _classes(features: Any) -> dict[str, list[str]]:
    """By column that holds numbers of classes, alone or in lists, their names."""
    found: dict[str, list[str]] = {}
    for column, feature in cast("dict[str, Any]", features or {}).items():
        inner = getattr(feature, "feature", feature)
        if (names := getattr(inner, "names", None)) is not None:
            found[column] = list(names)
    return found


def _named(value: object, names: list[str] | None) -> object:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in cast("list[object]", value)]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

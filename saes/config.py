"""YAML to frozen dataclasses and back, with errors that say where and what to do.

The YAML is that of YAML 1.2's core schema: `1e-3` is a number, `yes` and `on` are words, and a key
given twice is an error (PyYAML alone follows YAML 1.1 on the first two and keeps the last of two).
"""

import dataclasses
import difflib
import hashlib
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable

import yaml

from saes.errors import UserError

T = TypeVar("T")
_ROOT = "config"


@runtime_checkable
class Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key '{key.value}' is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        inline = not any(isinstance(item, list | dict) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=inline)


_Dumper.add_representer(list, _Dumper.represent_list)

_WHOLE = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
_CORE_SCHEMA = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", ["<"]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", rf"^[-+]?{_WHOLE}$", list("-+0123456789")),
    (
        "float",
        rf"^(?:[-+]?(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _CORE_SCHEMA:
        _class.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first
        )


def _parse(text: str, source: str) -> object:
    """Parse YAML; `source` names it in errors."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None


def read(path: Path) -> dict[str, object]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        UserError: the file is missing, cannot be read, is not YAML (with the line), or holds
            something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {_short(tree)}")
    return cast(dict[str, object], tree)


def override(mapping: Mapping[str, object], assignments: Sequence[str]) -> dict[str, object]:
    """A copy of `mapping` with each `a.b=value` set; values are YAML (`0.1`, `[1, 2]`, `null`).

    Items of a list are counted from 0: `saes.0.k=[64]`.

    Raises:
        UserError: no `=`, a value that is not YAML, or a path that goes through a plain value. Keys
            that do not exist are caught by `load`.
    """
    tree: object = mapping
    for assignment in assignments:
        place, equals, text = assignment.partition("=")
        path = place.strip().split(".")
        if not equals or not all(path):
            raise UserError(f"--set {assignment}: expected key=value, for example causal.seed=1")
        where = f"--set {assignment}"
        tree = _with(tree, path, _parse(text, where), where)
    return dict(cast(Mapping[str, object], tree))


def _with(node: object, path: Sequence[str], value: object, where: str, name: str = "") -> object:
    """A copy of `node`, called `name`, with the value at the path."""
    if not path:
        return value
    first, *rest = path
    if isinstance(node, list):
        items = list(cast(list[object], node))
        if not first.isdecimal() or int(first) >= len(items):
            raise UserError(f"{where}: {name} is a list; count its items from 0: {name}.0")
        items[int(first)] = _with(items[int(first)], rest, value, where, first)
        return items
    if not isinstance(node, Mapping | None):
        raise UserError(f"{where}: {name} is {_short(node)}, not a section")
    section = dict(cast(Mapping[str, object], node or {}))
    section[first] = _with(section.get(first), rest, value, where, first)
    return section


def load(cls: type[T], mapping: Mapping[str, object], where: str = _ROOT) -> T:
    """Build the dataclass `cls` from a mapping, checking every key and type.

    Fields may be bool, int, float (an int is taken, nan and inf are not), str, Path, Literal,
    tuple[X, ...], dict[str, X], another dataclass, or any of these `| None`.

    Args:
        where: dotted place of `mapping` in the whole config, for messages.

    Raises:
        UserError: unknown or missing key, wrong type, or a ValueError of `__post_init__`; it names
            the place, the value and what was expected.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cast(type[Dataclass], cls))}
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ";"
            raise UserError(f"unknown key '{key}' in {where}{hint} known keys: {', '.join(known)}")
    missing = [n for n, f in known.items() if n not in mapping and _is_required(f)]
    if missing:
        raise UserError(f"missing key '{missing[0]}' in {where}: {_describe(hints[missing[0]])}")
    values = {
        key: _convert(hints[key], value, key if where == _ROOT else f"{where}.{key}")
        for key, value in mapping.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _convert(kind: Any, value: object, where: str, or_null: str = "") -> object:
    """`value` as the type `kind`, or a UserError that names `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = [a for a in args if a is not types.NoneType]
        return _convert(inner, value, where, " or null")
    if origin is Literal:
        for option in args:
            if type(option) is type(value) and option == value:
                return value
    elif origin is tuple and isinstance(value, list | tuple):
        items = cast(Sequence[object], value)
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    elif isinstance(value, Mapping):
        section = cast(Mapping[object, object], value)
        if dataclasses.is_dataclass(kind):
            return load(cast(type[object], kind), cast(Mapping[str, object], section), where)
        if origin is dict and all(isinstance(key, str) for key in section):
            return {key: _convert(args[1], item, f"{where}.{key}") for key, item in section.items()}
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif isinstance(value, int | float):
        if kind is int and isinstance(value, int):
            return value
        if kind is float and abs(value) <= sys.float_info.max:
            return float(value)
    elif isinstance(value, str) and kind in (str, Path):
        return kind(value)
    raise UserError(
        f"{where}: expected {_describe(kind)}{or_null}, got {_short(cast(object, value))}"
    )


_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


def _describe(kind: Any, plural: bool = False) -> str:
    """What a type expects, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind][plural]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"{'lists' if plural else 'a list'} of {_describe(args[0], plural=True)}"
    if origin is dict:
        return f"{'mappings' if plural else 'a mapping'} of names to {_describe(args[1], True)}"
    if origin in (types.UnionType, typing.Union):
        return (
            " or ".join(_describe(a, plural) for a in args if a is not types.NoneType) + " or null"
        )
    assert dataclasses.is_dataclass(kind), f"no YAML form for a field of type {kind}"
    keys = ", ".join(f.name for f in dataclasses.fields(kind))
    return f"{'sections' if plural else 'a section'} with the keys {keys}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_dict(config: Dataclass) -> dict[str, object]:
    """The dataclass as plain mappings, lists and scalars, in the order of its fields."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in cast(Mapping[object, object], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(Sequence[object], value)]
    return str(value) if isinstance(value, Path) else value


def dump(config: Dataclass) -> str:
    """The dataclass as YAML, keys in the order of its fields; `load` gives it back."""
    return yaml.dump(
        to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def digest(value: object) -> str:
    """SHA-256, hex, of a dataclass or of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()

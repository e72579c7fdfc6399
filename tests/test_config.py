"""YAML to dataclasses and back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saes.config import digest, dump, load, override, read, to_dict
from saes.errors import UserError


@dataclass(frozen=True)
class Causal:
    doses: tuple[float, ...] = (0.1, 0.5)
    prompts: int = 8
    kind: Literal["feature", "vector"] = "feature"

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"prompts is {self.prompts}; it must be at least 1")


@dataclass(frozen=True)
class Config:
    model: str
    seed: int = 0
    lr: float = 1e-3
    fast: bool = False
    corpus: Path | None = None
    causal: Causal = Causal()
    sites: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    parts: tuple[Causal, ...] = ()
    extra: Causal | None = None


def error(mapping: dict[str, object], cls: type = Config) -> str:
    with pytest.raises(UserError) as caught:
        load(cls, mapping)
    assert "\n" not in str(caught.value)
    return str(caught.value)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
causals = st.builds(
    Causal,
    doses=st.lists(numbers, max_size=4).map(tuple),
    prompts=st.integers(1, 10**20),
    kind=st.sampled_from(["feature", "vector"]),
)
configs = st.builds(
    Config,
    model=names,
    seed=st.integers(),
    lr=numbers,
    fast=st.booleans(),
    corpus=st.none() | st.sampled_from([Path("a/b"), Path("/x y"), Path("null"), Path("1e3")]),
    causal=causals,
    sites=st.lists(names, max_size=3).map(tuple),
    weights=st.dictionaries(names, numbers, max_size=3),
    parts=st.lists(causals, max_size=2).map(tuple),
    extra=st.none() | causals,
)


@given(configs)
@example(
    Config(model="1e-3", sites=("yes", "null", "010", "1_000", "<<", "2024-01-01", "0x1F", ""))
)
@settings(max_examples=60)
def test_a_dumped_config_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    again = load(Config, read(path))
    assert again == config
    assert repr(again) == repr(config)  # tells -0.0 from 0.0 and 1 from 1.0
    assert digest(again) == digest(config) == digest(to_dict(config)) == digest(read(path))


def test_dump_follows_the_fields_and_keeps_lists_on_one_line() -> None:
    lines = dump(Config(model="m", sites=("b", "a"))).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("model", "seed", "lr", "fast", "corpus", "causal", "  doses", "  prompts", "  kind"),
        *("sites", "weights", "parts", "extra"),
    ]
    assert "sites: [b, a]" in lines


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "missing key 'model' in config: text"),
        (
            {"model": "m", "causal": {"doze": 1}},
            "unknown key 'doze' in causal; did you mean 'doses'? known keys: doses, prompts, kind",
        ),
        (
            {"model": "m", "parts": [{}, {"qqq": 1}]},
            "unknown key 'qqq' in parts[1]; known keys: doses, prompts, kind",
        ),
        (
            {"model": "m", "causal": {"doses": "x"}},
            "causal.doses: expected a list of numbers, got 'x'",
        ),
        (
            {"model": "m", "causal": {"doses": [1, "x"]}},
            "causal.doses[1]: expected a number, got 'x'",
        ),
        ({"model": "m", "causal": {"prompts": 2.0}}, "expected a whole number, got 2.0"),
        ({"model": "m", "causal": {"prompts": True}}, "expected a whole number, got True"),
        ({"model": "m", "lr": False}, "lr: expected a number, got False"),
        ({"model": "m", "lr": float("nan")}, "lr: expected a number, got nan"),
        ({"model": "m", "lr": float("inf")}, "lr: expected a number, got inf"),
        ({"model": "m", "lr": 10**400}, "lr: expected a number, got 1000"),
        ({"model": "m", "fast": 1}, "fast: expected true or false, got 1"),
        ({"model": 3}, "model: expected text, got 3"),
        ({"model": None}, "model: expected text, got None"),
        ({"model": "m", "corpus": 3}, "corpus: expected a path or null, got 3"),
        (
            {"model": "m", "causal": {"kind": "none"}},
            "causal.kind: expected one of feature, vector, got 'none'",
        ),
        (
            {"model": "m", "causal": 3},
            "causal: expected a section with the keys doses, prompts, kind",
        ),
        ({"model": "m", "weights": {"a": "x"}}, "weights.a: expected a number, got 'x'"),
        ({"model": "m", "weights": {3: 1.0}}, "weights: expected a mapping of names to numbers"),
        ({"model": "m", "causal": {"prompts": 0}}, "causal: prompts is 0; it must be at least 1"),
        ({"model": "m", 3: 3}, "unknown key '3' in config"),
        ({"model": "m", "sites": list(range(1000))}, "sites[0]: expected text, got 0"),
        ({"model": "m", "lr": "x" * 1000}, "..."),
    ],
)
def test_errors_name_place_value_and_expectation(mapping: dict[str, object], message: str) -> None:
    assert message in error(mapping)


def test_whole_numbers_are_taken_for_numbers() -> None:
    config = load(Config, {"model": "m", "lr": 1, "causal": {"doses": [1]}})
    assert repr(config.lr) == "1.0"
    assert repr(config.causal.doses) == "(1.0,)"


def test_the_place_can_be_given() -> None:
    with pytest.raises(UserError, match=r"^causal\.prompts: expected"):
        load(Causal, {"prompts": "x"}, "causal")


def test_override_sets_copies_and_parses() -> None:
    original: dict[str, object] = {"model": "m", "causal": {"prompts": 3, "kind": "vector"}}
    before = repr(original)
    tree = override(original, ["causal.prompts=5", "lr=1e-4", "sites=[a, b]", "extra.prompts=2"])
    assert repr(original) == before
    config = load(Config, tree)
    assert config.causal == Causal(prompts=5, kind="vector")
    assert config.lr == 1e-4
    assert config.sites == ("a", "b")
    assert config.extra == Causal(prompts=2)
    assert override(original, ["extra=null", "model=a=b"])["model"] == "a=b"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("causal.prompts", "expected key=value"),
        ("=3", "expected key=value"),
        ("causal.=3", "expected key=value"),
        ("model.x=3", "model is 'm', not a section"),
        ("lr=[1", "--set lr=[1, line 1: "),
        ("saes.1.k=3", "saes is a list; count its items from 0: saes.0"),
        ("saes.k=3", "saes is a list; count its items from 0: saes.0"),
    ],
)
def test_bad_overrides_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        override({"model": "m", "saes": [{"k": 1}]}, [assignment])
    assert message in str(caught.value)


def test_items_of_a_list_are_overridden_by_their_number() -> None:
    original: dict[str, object] = {"saes": [{"k": [8]}, {"k": [16]}], "doses": [1, 2]}
    before = repr(original)
    tree = override(original, ["saes.1.k=[32, 64]", "doses.0=5"])
    assert tree == {"saes": [{"k": [8]}, {"k": [32, 64]}], "doses": [5, 2]}
    assert repr(original) == before


def test_an_overridden_key_that_does_not_exist_is_caught() -> None:
    assert "did you mean 'prompts'?" in error(override({"model": "m"}, ["causal.prompt=3"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", ", line 3: "),
        ("a: 1\nb: 2\na: 3\n", ", line 3: the key 'a' is there twice"),
        ("a: !!python/object:os.system {}\n", ", line 1: could not determine a constructor"),
        ("- 1\n- 2\n", "expected a mapping of keys to values, got [1, 2]"),
        ("", "expected a mapping of keys to values, got None"),
        ("a: \x01\n", "not YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config file .*none\.yaml"):
        read(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path / "latin")


def test_yaml_follows_the_core_schema(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "base: &b {x: 1, y: yes}\nmerged: {<<: *b, x: 2}\n"
        "v: [1e-3, 1_000, on, 010, 2024-01-01, 1:30, ~, -.5, +3, true, .inf]\n"
    )
    tree = read(path)
    assert tree["merged"] == {"x": 2, "y": "yes"}
    assert tree["v"] == [
        *(1e-3, 1000, "on", "010", "2024-01-01", "1:30", None, -0.5, 3, True, float("inf"))
    ]


def test_digest_does_not_depend_on_order_but_on_every_value() -> None:
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1})
    config = Config(model="m", weights={"a": 1.0, "b": 2.0})
    assert digest(config) == digest(Config(model="m", weights={"b": 2.0, "a": 1.0}))
    others = [
        Config(model="n", weights={"a": 1.0, "b": 2.0}),
        Config(model="m", weights={"a": 1.0}),
        Config(model="m", weights={"a": 1.0, "b": 2.0}, causal=Causal(prompts=9)),
    ]
    assert len({digest(c) for c in [config, *others]}) == 4
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"

"""Trackers: the JSONL file, wandb offline for real, and a wandb that fails."""

import inspect
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saes.track import (
    JsonlTracker,
    NullTracker,
    TrackConfig,
    Tracker,
    Trackers,
    WandbTracker,
    open_tracker,
)


def use(tracker: Tracker, folder: Path) -> None:
    """Every method once."""
    tracker.log({"loss": 1.5, "l0": 32}, step=7)
    tracker.histogram("densities", [3, 0, 5], [-2.0, -1.0, 0.0, 1.0], step=8)
    tracker.log({"bad": math.nan, "worse": -math.inf})
    tracker.summary({"found": 12, "verdict": "ok", "none": None})
    tracker.table("verdicts", ["concept", "auroc"], [["joy", 0.9], ["awe", None]])
    (folder / "stage").mkdir(exist_ok=True)
    (folder / "stage" / "catalog.db").write_text("x")
    tracker.artifact(folder / "stage", "catalog", "catalog")
    tracker.finish(0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bodies(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in lines(path)]


def test_jsonl_holds_one_strict_json_object_a_line(tmp_path: Path) -> None:
    use(JsonlTracker(tmp_path / "metrics.jsonl"), tmp_path)
    assert bodies(tmp_path / "metrics.jsonl") == [
        {"kind": "metrics", "step": 7, "metrics": {"loss": 1.5, "l0": 32}},
        {
            "kind": "histogram",
            "step": 8,
            "name": "densities",
            "counts": [3, 0, 5],
            "edges": [-2.0, -1.0, 0.0, 1.0],
        },
        {"kind": "metrics", "metrics": {"bad": "NaN", "worse": "-Infinity"}},
        {"kind": "summary", "values": {"found": 12, "verdict": "ok", "none": None}},
        {
            "kind": "table",
            "name": "verdicts",
            "columns": ["concept", "auroc"],
            "rows": [["joy", 0.9], ["awe", None]],
        },
        {"kind": "artifact", "name": "catalog", "type": "catalog", "path": "stage"},
        {"kind": "finish", "exit_code": 0},
    ]


def test_jsonl_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    for step in range(3):
        tracker.log({"a": step}, step)
        assert len(lines(tmp_path / "m.jsonl")) == step + 1
    tracker.finish()


@pytest.mark.parametrize("torn", [b"", b"{", b'{"kind": "metr', b"x" * 200_000, b'{"a":1}\r'])
@pytest.mark.parametrize("whole", [0, 1, 5000])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes, whole: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "old"}\n' * whole + torn)
    tracker = JsonlTracker(path)
    tracker.log({"a": 1.0})
    tracker.finish()
    assert [line["kind"] for line in lines(path)] == ["old"] * whole + ["metrics", "finish"]


@pytest.mark.parametrize("room", [0, 40, 150])
def test_a_file_that_takes_no_more_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    """The system refuses a line, or takes a part of it: a warning, whole lines, no error."""
    import resource

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "old"}\n' * 100)
    size, before = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker = JsonlTracker(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, before[1]))
    try:
        use(tracker, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (warning,) = caplog.records
    assert "metrics.jsonl cannot be written: " in warning.getMessage()
    assert tracker.places == ()
    whole = 1 if room == 150 else 0  # the first line has about 80 bytes
    assert [line["kind"] for line in lines(path)] == ["old"] * 100 + ["metrics"] * whole


def test_a_place_without_a_file_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    use(open_tracker(tmp_path, TrackConfig(), {}, "0"), tmp_path)
    assert len(caplog.records) == 1


def test_backends(tmp_path: Path) -> None:
    def opened(backend: str) -> Tracker:
        return open_tracker(tmp_path, TrackConfig(backend=backend), {}, "0")

    assert isinstance(opened("none"), NullTracker)
    use(opened("none"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    jsonl = opened("jsonl")
    assert jsonl.places == (str(tmp_path / "metrics.jsonl"),)
    use(jsonl, tmp_path)
    assert len(lines(tmp_path / "metrics.jsonl")) == 7


def test_several_trackers_get_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    both = Trackers(*(JsonlTracker(path) for path in paths))
    use(both, tmp_path)
    assert both.places == tuple(map(str, paths))
    assert bodies(paths[0]) == bodies(paths[1])
    assert len(lines(paths[0])) == 7


class FakeWandb(SimpleNamespace):
    """The wandb module and its run in one; records calls, and fails at those in `broken`."""

    def __init__(self, *broken: str, key: bool = True) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken = broken
        self.key = key
        self.step = 0
        self.offline = False
        self.url = "https://wandb.example/run"
        self.summary = SimpleNamespace(update=lambda values: self._call("summary", values=values))

    def _call(self, call: str, /, **kwargs: Any) -> Any:
        self.calls.append((call, kwargs))
        if call in self.broken:
            raise OSError(f"{call} is out of reach\nand more")
        return self

    def Settings(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs

    def setup(self, settings: Any) -> None:
        self._call("setup", settings=settings)

    def login(self, prompt: bool) -> bool:
        self._call("login", prompt=prompt)
        return self.key

    def init(self, **kwargs: Any) -> Any:
        return self._call("init", **kwargs)

    def log(self, metrics: Any, step: Any = None) -> None:
        self._call("log", metrics=metrics, step=step)
        self.step = self.step if step is None else step

    def Table(self, **kwargs: Any) -> str:
        self._call("Table", **kwargs)
        return "a table"

    def Histogram(self, np_histogram: Any) -> str:
        self._call("Histogram", np_histogram=np_histogram)
        return "a histogram"

    def Artifact(self, name: str, kind: str) -> Any:
        return self._call("Artifact", name=name, kind=kind)

    def add_file(self, path: str, name: str, policy: str) -> None:
        self._call("add_file", path=path, name=name, policy=policy)

    def log_artifact(self, artifact: Any) -> None:
        assert artifact is self
        self._call("log_artifact")

    def finish(self, exit_code: int) -> None:
        self._call("finish", exit_code=exit_code)


ONLINE = TrackConfig(backend="wandb", mode="online", name="n", tags=("t",), group="g", entity="e")


def test_wandb_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = open_tracker(tmp_path, ONLINE, {"causal": {"seed": 1}}, "abcd1234")
    use(tracker, tmp_path)
    assert tracker.places == (str(tmp_path / "metrics.jsonl"), "https://wandb.example/run")
    assert [name for name, _ in fake.calls] == [
        *("setup", "login", "init", "log", "Histogram", "log", "log", "summary", "Table", "log"),
        *("Artifact", "add_file", "log_artifact", "finish"),
    ]
    calls = dict(fake.calls)
    init = calls["init"]
    assert init["config"] == {"causal": {"seed": 1}}
    assert (init["id"], init["resume"], init["mode"]) == ("abcd1234", "allow", "online")
    assert (init["name"], init["group"], init["entity"], init["tags"]) == ("n", "g", "e", ("t",))
    assert init["dir"] == tmp_path
    assert calls["add_file"]["name"] == "catalog.db"
    assert fake.calls[3] == ("log", {"metrics": {"loss": 1.5, "l0": 32}, "step": 7})
    assert calls["Histogram"] == {"np_histogram": ([3, 0, 5], [-2.0, -1.0, 0.0, 1.0])}
    assert fake.calls[5] == ("log", {"metrics": {"densities": "a histogram"}, "step": 8})
    assert calls["login"] == {"prompt": False}


@pytest.mark.parametrize(
    "broken",
    ["setup", "login", "init", "log", "summary", "Table", "Histogram", "add_file", "finish"],
)
def test_a_failing_wandb_warns_once_and_the_file_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    use(open_tracker(tmp_path, ONLINE, {}, "0"), tmp_path)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{broken} is out of reach; tracking goes on without it" in warning.getMessage()
    assert fake.calls[-1][0] == broken  # it is left alone afterwards
    assert len(lines(tmp_path / "metrics.jsonl")) == 7


def test_steps_that_wandb_has_are_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = open_tracker(tmp_path, ONLINE, {}, "0")
    for step in (1, 2, 1, 2, 3):
        tracker.log({"loss": step}, step)
        tracker.histogram("densities", [1], [0.0, 1.0], step)
    tracker.finish()
    sent = [(c["step"], *c["metrics"]) for name, c in fake.calls if name == "log"]
    assert sent == [
        (1, "loss"), (1, "densities"), (2, "loss"), (2, "densities"), (2, "loss"),
        (2, "densities"), (3, "loss"), (3, "densities"),
    ]  # fmt: skip
    assert len(lines(tmp_path / "metrics.jsonl")) == 11


def test_no_key_is_said_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(key=False))
    use(open_tracker(tmp_path, ONLINE, {}, "0"), tmp_path)
    (warning,) = caplog.records
    assert "wandb login" in warning.getMessage()
    assert "mode offline" in warning.getMessage()


def test_ctrl_c_is_not_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WandbTracker(interrupted)


REAL = f"""
import math, sys
from pathlib import Path
from saes.track import TrackConfig, Tracker, open_tracker
{inspect.getsource(use)}
assert "wandb" not in sys.modules
folder = Path(sys.argv[1])
tracker = open_tracker(folder, TrackConfig(backend="wandb", mode=sys.argv[2]), dict(a=1), "0")
use(tracker, folder)
print(tracker.places[-1], end="")
"""


def real(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> "subprocess.Popen[str]":
    """Use the installed wandb in a process of its own, which has no key and an empty home."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    root = Path(__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", REAL, str(folder), mode], cwd=root, **pipes)


def test_real_wandb_offline_writes_a_run_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real(tmp_path, "offline", monkeypatch) as process:
        out, err = process.communicate()
    assert err == ""
    assert process.returncode == 0
    assert len(lines(tmp_path / "metrics.jsonl")) == 7
    folder = Path(out)
    assert folder.parent == tmp_path / "wandb"
    (data,) = folder.glob("run-*.wandb")
    content = data.read_bytes()
    for text in (b"verdict", b"loss", b"catalog.db", b"l0", b"densities"):
        assert text in content


def test_real_wandb_without_a_key_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real(tmp_path, "online", monkeypatch) as process:
        out, err = process.communicate()
    assert process.returncode == 0
    assert err.count("\n") == 1
    assert "there is no API key: run `wandb login`" in err
    assert out == str(tmp_path / "metrics.jsonl")
    assert len(lines(tmp_path / "metrics.jsonl")) == 7

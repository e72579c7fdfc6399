"""Stages are done once, survive a kill at any moment, and notice damage."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from saes.errors import UserError
from saes.run import Run, open_run
from saes.stage import DONE, Event, Stage, run_stages, stage_keys


@dataclass(frozen=True)
class Config:
    seed: int = 0


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", Config()) as opened:
        yield opened


class Writer:
    """Writes a text into two files and counts how often."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        assert list(folder.iterdir()) == []
        self.calls += 1
        (folder / "a.txt").write_text(self.text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(self.text.encode() * 1000)


def three() -> tuple[list[Stage], list[Writer]]:
    """capture → align → report, and contrast that reads capture only."""
    writers = [Writer(t) for t in ("one", "two", "three", "four")]
    return [
        Stage("capture", writers[0], {"tokens": 5}, external={"model": "aa"}),
        Stage("align", writers[1], Config(), inputs=("capture",)),
        Stage("contrast", writers[2], inputs=("capture",)),
        Stage("report", writers[3], inputs=("align",)),
    ], writers


def states(run: Run, stages: list[Stage]) -> list[str]:
    return [event.state for event in run_stages(run, stages)]


def files(folder: Path) -> dict[str, bytes]:
    """Every stage's files; not the manifest, the config and the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.parent != folder
    }


def test_stages_run_once_in_order_and_report(run: Run) -> None:
    stages, writers = three()
    seen: list[Event] = []
    done = run_stages(run, stages, seen.append)
    assert [(e.stage, e.state) for e in seen[:4]] == [
        *(("capture", "started"), ("capture", "finished"), ("align", "started")),
        ("align", "finished"),
    ]
    assert [e for e in seen if e.state == "finished"] == done
    assert run.manifest().seconds == {e.stage: e.seconds for e in done}
    assert (run.folder / "align" / "a.txt").read_text() == "two"
    first = files(run.folder)

    seen.clear()
    again = run_stages(run, stages, seen.append)
    assert seen == again == [e._replace(state="kept") for e in done]
    assert [w.calls for w in writers] == [1, 1, 1, 1]
    assert files(run.folder) == first


@pytest.mark.parametrize(
    ("index", "change", "redone"),
    [
        (0, {"config": {"tokens": 6}}, "1111"),
        (0, {"external": {"model": "bb"}}, "1111"),
        (1, {"config": Config(seed=1)}, "0101"),
        (1, {"version": 2}, "0101"),
        (2, {"version": 2}, "0010"),
        (3, {"inputs": ("align", "contrast")}, "0001"),
    ],
)
def test_what_depends_on_a_change_is_redone(
    run: Run, index: int, change: dict[str, object], redone: str
) -> None:
    stages, _ = three()
    run_stages(run, stages)
    stages[index] = replace(stages[index], **change)
    expected = ["finished" if flag == "1" else "kept" for flag in redone]
    assert states(run, stages) == expected
    assert states(run, stages) == ["kept"] * 4


def test_a_redone_stage_holds_only_its_new_files(run: Run) -> None:
    stages, _ = three()
    run_stages(run, stages)

    def other(folder: Path) -> None:
        (folder / "c.txt").write_text("new")

    stages[1] = replace(stages[1], write=other, version=2)
    run_stages(run, stages)
    assert sorted(p.name for p in (run.folder / "align").iterdir()) == ["c.txt", DONE]
    assert not list(run.folder.glob(".align*"))


def test_a_deleted_stage_alone_is_made_anew(run: Run) -> None:
    stages, writers = three()
    run_stages(run, stages)
    before = files(run.folder)
    shutil.rmtree(run.folder / "capture")
    assert states(run, stages) == ["finished", "kept", "kept", "kept"]
    assert files(run.folder) == before
    assert writers[0].calls == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.txt", "deep/b.bin", DONE])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip, lambda p: p.write_text("{}")])
def test_damage_is_refused_before_any_work(
    run: Run, name: str, damage: Callable[[Path], object]
) -> None:
    stages, writers = three()
    run_stages(run, stages)
    folder = run.folder / "contrast"
    damage(folder / name)
    stages[1] = replace(stages[1], version=2)  # there is work to do before the damaged stage
    with pytest.raises(UserError) as caught:
        run_stages(run, stages)
    assert str(caught.value).startswith(f"{folder / name} is damaged (")
    assert f"delete {folder} to make this stage anew" in str(caught.value)
    assert writers[1].calls == 1
    shutil.rmtree(folder)
    assert states(run, stages) == ["kept", "finished", "finished", "finished"]


def test_every_flipped_bit_of_done_json_is_noticed(run: Run) -> None:
    stages, _ = three()
    run_stages(run, stages[:1])
    path = run.folder / "capture" / DONE
    content = path.read_bytes()
    for i in range(0, len(content) * 8, 61):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        if flipped.split() != content.split():  # blanks between tokens carry nothing
            with pytest.raises(UserError, match=r"done\.json is damaged"):
                run_stages(run, stages[:1])


@pytest.mark.parametrize("error", [UserError("bad"), KeyboardInterrupt(), RuntimeError("defect")])
def test_a_failed_stage_leaves_nothing_and_the_run_goes_on(run: Run, error: BaseException) -> None:
    stages, writers = three()

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    good = stages[1]
    stages[1] = replace(good, write=fail)
    with pytest.raises(type(error)):
        run_stages(run, stages)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        *(".lock", "capture", "config.yaml", "manifest.json")
    ]
    stages[1] = good
    assert states(run, stages) == ["kept", "finished", "finished", "finished"]
    assert writers[0].calls == 1


def test_a_failed_redo_keeps_the_old_folder(run: Run) -> None:
    stages, _ = three()
    run_stages(run, stages)
    before = files(run.folder)

    def fail(_: Path) -> None:
        raise UserError("bad")

    with pytest.raises(UserError, match="bad"):
        run_stages(run, [replace(stages[0], write=fail, version=2), *stages[1:]])
    assert files(run.folder) == before
    assert states(run, stages) == ["kept"] * 4


def test_keys_are_stable() -> None:
    """A changed key redoes everybody's stages: change it knowingly."""
    stages, _ = three()
    assert stage_keys(stages)["report"][:16] == "6f70e636749bff45"


def test_wrong_plans_are_defects() -> None:
    stages, _ = three()
    with pytest.raises(KeyError):
        stage_keys(stages[1:])  # align reads a stage that does not come before it
    with pytest.raises(AssertionError, match="two stages"):
        stage_keys([stages[0], stages[0]])
    with pytest.raises(AssertionError, match="stage name"):
        stage_keys([replace(stages[0], name="../x")])


SLOW_RUN = """
import sys, time
from dataclasses import make_dataclass
from pathlib import Path
from saes.run import open_run
from saes.stage import Stage, run_stages

def write(n):
    def stage(folder):
        for i in range(4):
            (folder / f"{i}.bin").write_bytes(bytes([n, i]) * 20000)
            time.sleep(0.005)
    return stage

C = make_dataclass("C", [("seed", int, 0)], frozen=True)
stages = [Stage(f"s{n}", write(n), inputs=tuple(f"s{m}" for m in range(n))) for n in range(5)]
print("ready", flush=True)
with open_run(Path(sys.argv[1]), C()) as run:
    print(*(e.state for e in run_stages(run, stages)))
    run.finish()
"""


def start(folder: Path) -> "subprocess.Popen[bytes]":
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(folder)], stdout=subprocess.PIPE, cwd=root
    )


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with start(whole) as process:
        begun = time.perf_counter()
        process.communicate()
        span = time.perf_counter() - begun
    assert process.returncode == 0
    expected = files(whole)
    assert len(expected) == 25

    rng = random.Random(0)
    killed = tmp_path / "killed"
    for _ in range(10):
        with start(killed) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, span / 3))
            process.kill()
    # Whole stages only, at any time.
    for stage in killed.glob("s*"):
        assert {k: v for k, v in expected.items() if k.startswith(stage.name)} == {
            f"{stage.name}/{k}": v for k, v in _inside(stage).items()
        }
    with start(killed) as process:
        process.communicate()
    assert process.returncode == 0
    assert files(killed) == expected
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert json.loads((killed / "manifest.json").read_text())["finished"]
    with start(killed) as process:
        out, _ = process.communicate()
    assert out.split() == [b"ready"] + [b"kept"] * 5


def _inside(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("moment", ["before old", "before new", "before cleaning"])
def test_killed_between_the_renames(run: Run, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three moments of a redo that a random kill seldom meets."""
    stages, _ = three()
    run_stages(run, stages)
    redo = [replace(stages[0], version=2), *stages[1:]]

    class Killed(BaseException):
        pass

    rename = Path.rename

    def dying_rename(path: Path, target: Path) -> Path:
        if moment == "before old" and path.name == "capture":
            raise Killed
        if moment == "before new" and path.name == ".capture.part":
            raise Killed
        return rename(path, target)

    def dying_sync(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_rename)
        if moment == "before cleaning":
            patch.setattr("saes.stage.sync_folder", dying_sync)
        with pytest.raises(Killed):
            run_stages(run, redo)
    expected = "kept" if moment == "before cleaning" else "finished"
    assert states(run, redo) == [expected, "finished", "finished", "finished"]
    assert not [p for p in run.folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]

"""The run folder: made whole, opened again, refused when it is not ours."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from saes import run as run_module
from saes.config import read
from saes.errors import UserError
from saes.run import CONFIG, Environment, check_run, open_run, read_manifest, without_folders


@dataclass(frozen=True)
class Part:
    doses: tuple[float, ...] = (0.1, 0.2)
    seed: int = 3


@dataclass(frozen=True)
class Config:
    model: str = "m"
    seed: int = 1
    part: Part = Part()


def refused(folder: Path, config: Config | None = None) -> str:
    before = listing(folder.parent)
    with pytest.raises(UserError) as caught:
        open_run(folder, config or Config())
    assert listing(folder.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_a_run_folder_is_made_and_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with open_run(folder, Config()) as run:
        made = run.manifest()
    assert (folder / "config.yaml").read_text() == (
        "model: m\nseed: 1\npart:\n  doses: [0.1, 0.2]\n  seed: 3\n"
    )
    assert made.seeds == {"seed": 1, "part.seed": 3}
    assert made.environments[0].packages["pyarrow"]
    assert made.finished is None
    bytes_before = (folder / "manifest.json").read_bytes()
    with open_run(folder, Config()):
        pass
    assert (folder / "manifest.json").read_bytes() == bytes_before
    with open_run(tmp_path / "other", Config()) as other:
        assert other.manifest().id != made.id


def test_an_empty_folder_and_a_begun_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "empty", Config()).close()
    begun = tmp_path / "begun"  # killed before config.yaml was there
    begun.mkdir()
    (begun / ".lock").write_text("1")
    (begun / "manifest.json").write_text("half")
    (begun / ".config.yaml.part").write_text("half")
    with open_run(begun, Config()) as run:
        assert run.manifest().seeds["seed"] == 1


def test_the_manifest_records_inputs_seconds_and_the_end(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", Config()) as run:
        run.record(inputs={"model": "aa"}, seconds={"capture": 1.5})
        run.record(inputs={"corpus": "bb"})
        run.finish()
        finished = run.manifest().finished
        assert finished is not None
        run.record(inputs={"corpus": "bb"})  # nothing new
        assert run.manifest().finished == finished
        run.record(seconds={"align": 2.0})
        manifest = run.manifest()
    assert manifest.finished is None
    assert manifest.inputs == {"model": "aa", "corpus": "bb"}
    assert manifest.seconds == {"capture": 1.5, "align": 2.0}
    assert read_manifest(tmp_path / "run") == manifest


def test_another_environment_is_added_to_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(tmp_path / "run", Config()).close()
    newer = Environment("9.9", "abc", True, "3.99", "Moon", {"torch": "9"})
    monkeypatch.setattr(run_module, "_environment", lambda: newer)
    for _ in range(2):
        open_run(tmp_path / "run", Config()).close()
    assert read_manifest(tmp_path / "run").environments[1:] == (newer,)


def test_another_config_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    open_run(folder, Config()).close()
    (folder / "capture").mkdir()
    (folder / "capture" / "done.json").touch()
    message = refused(folder, Config(part=Part(doses=(0.1, 0.3), seed=4)))
    assert "part.doses is [0.1, 0.2] there and [0.1, 0.3] now, part.seed is 3" in message
    assert f"give its own config, {folder / CONFIG}; for this config choose another" in message
    assert message.count("/run/config.yaml") == 1

    @dataclass(frozen=True)
    class Grown:
        model: str = "m"
        seed: int = 1
        part: Part = Part()
        new: bool = True

    with pytest.raises(UserError, match="new is absent there and true now"):
        open_run(folder, Grown())

    @dataclass(frozen=True)
    class Wider:
        doses: tuple[float, ...] = (0.1, 0.2)
        seed: int = 3
        new: int = 1

    grown = make_dataclass("C", [("model", str, "m"), ("seed", int, 1), ("part", Wider, Wider())])
    with pytest.raises(UserError, match=r"config: part\.new is absent there and 1 now; to go on"):
        open_run(folder, grown())


def test_a_difference_of_long_values_is_told_in_short(tmp_path: Path) -> None:
    def config(*sections: Mapping[str, object], **more: int) -> Any:
        made = make_dataclass("C", ["corpora", *more], frozen=True)
        return made(corpora=list(sections), **more)

    whole, own = {"source": "packaged", "role": "all"}, {"source": "x" * 900, "role": "split"}
    open_run(tmp_path / "run", config(own, whole, a=1, b=1, c=1, d=1)).close()
    (tmp_path / "run" / "capture").mkdir()
    (tmp_path / "run" / "capture" / "done.json").touch()
    with pytest.raises(UserError) as caught:
        check_run(tmp_path / "run", config(own, own | {"role": "all"}, a=2, b=2, c=2, d=2))
    message = str(caught.value)
    assert 'corpora.1.source is "packaged" there and "xxx' in message
    assert "a is 1 there and 2 now, b is 1" in message
    assert "; 2 more settings differ; " in message
    with pytest.raises(UserError, match=r'corpora is \[\{"source": .{40,47}\.\.\. there') as caught:
        check_run(tmp_path / "run", config(whole, a=1, b=1, c=1, d=1))
    assert len(str(caught.value)) < 300 + 2 * len(str(tmp_path))


def test_a_config_for_others_has_no_folders_of_this_machine() -> None:
    tree = {"run": "runs/x", "a": {"b": ["/data/me/texts/mine.csv", "hub/name", 3]}, "c": "/x"}
    assert without_folders(tree) == {
        "run": "runs/x", "a": {"b": ["texts/mine.csv", "hub/name", 3]}, "c": "x",
    }  # fmt: skip


def test_a_run_without_a_finished_stage_takes_another_config(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    open_run(folder, Config()).close()
    check_run(folder, Config(seed=9))
    with open_run(folder, Config(seed=9)) as run:
        assert run.manifest().seeds["seed"] == 9
    assert read(folder / CONFIG)["seed"] == 9
    open_run(folder, Config(seed=9)).close()


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    assert "not a run folder" in refused(tmp_path / "thesis")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("a: 1")
    assert "manifest.json is missing" in refused(tmp_path / "configs")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file")
    assert "cannot write" in refused(tmp_path / "file" / "run")


@pytest.mark.parametrize("call", ["write_text", "_lock", "_environment"])
def test_an_unwritable_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_module, call, fail)
    message = refused(tmp_path / "a" / "b")
    assert "Permission denied; choose another --run folder" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        assert "cannot write the run folder" in refused(tmp_path / "run")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "model: [m\n"),
        ("config.yaml", "model: other\n"),
        ("config.yaml", ""),
        ("manifest.json", ""),
        ("manifest.json", "{"),
        ("manifest.json", "[]"),
        ("manifest.json", "{}"),
        ("manifest.json", '{"id": 3}'),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "run"
    open_run(folder, Config()).close()
    (folder / name).write_text(text)
    message = refused(folder)
    assert f"{folder / name} is damaged" in message
    assert "delete the run folder" in message


def test_two_processes_cannot_hold_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(folder, Config()):
        assert f"in use by process {os.getpid()};" in refused(folder)
    code = (
        "import sys, pathlib, dataclasses, saes.run\n"
        "C = dataclasses.make_dataclass('C', [('a', int, 1)], frozen=True)\n"
        "r = saes.run.open_run(pathlib.Path(sys.argv[1]), C())\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    other = tmp_path / "other"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(other)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert f"in use by process {process.pid};" in refused(other)
        process.kill()
    open_run(other, make_dataclass("C", [("a", int, 1)], frozen=True)()).close()  # let go of


def test_secrets_of_the_environment_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    open_run(tmp_path / "run", Config()).close()
    assert b"sesame" not in b"".join(listing(tmp_path).values())


def test_the_commit_is_that_of_the_checkout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_of = run_module._commit
    assert commit_of(tmp_path) == (None, False)
    (tmp_path / ".git").mkdir()  # not a repository: git fails, the run does not
    assert commit_of(tmp_path) == (None, False)
    (tmp_path / ".git").rmdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert commit_of(tmp_path) == (head.stdout.strip(), False)
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == (head.stdout.strip(), True)
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == (None, False)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    open_run(tmp_path / "run", Config()).close()
    tree = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert list(tree)[:4] == ["id", "config", "created", "seeds"]

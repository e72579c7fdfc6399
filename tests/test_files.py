"""`saes.files`: whole or absent, whatever happens; and how much space there is."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from saes.errors import UserError
from saes.files import RESERVE, check_space, locked, size, write_text, writing


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with writing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with writing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk cannot take may only show when it is synced."""

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full: .*a\.txt could not be written"):
        write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_locked_folder_is_refused_until_it_is_let_go(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another process is writing"):  # noqa: SIM117
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_other_errors_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_text(tmp_path / "nowhere/a.txt", "new")


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a\r\nb\n\u00e9")
    assert (tmp_path / "a.txt").read_bytes() == b"a\r\nb\n\xc3\xa9"


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=RESERVE + 3000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "not/there/yet", 3000, "writing")
    assert asked == [tmp_path]
    with pytest.raises(UserError, match=r"writing needs 2.9 KiB and the disk of .* 256.0 MiB free"):
        check_space(tmp_path, 3001, "writing")


def test_sizes() -> None:
    cases = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.0 KiB", 3 << 29: "1.5 GiB"}
    assert {n: size(n) for n in cases} == cases
    assert size(5 << 40) == "5.0 TiB"

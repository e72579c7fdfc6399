"""The server: where it listens, who can reach it, and what it loads."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn

from labeling.catalog import FILE, build
from labeling.results import Results
from labeling.web.serve import browse, is_loopback, listen
from saes.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    build(tmp_path / FILE, Results(alignments=[], facts={"model": "tiny"}))
    return tmp_path


def test_a_catalog_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no catalog"):
        browse(tmp_path)
    with pytest.raises(UserError, match="no run folder"):
        browse(tmp_path / "missing")


def test_a_port_in_use_names_the_way_out(run: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*--port"):
            browse(run, port=port)
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(UserError, match="port 99999"):
        listen("127.0.0.1", 99999)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_browse_says_where_and_warns_when_others_can_read(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    host: str,
    warned: bool,
) -> None:
    served: list[socket.socket] = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda _server, sockets: served.extend(sockets), raising=True
    )
    browse(run, host=host, port=0)
    assert f"http://{host}:" in capsys.readouterr().out
    assert len(served) == 1
    assert ("other machines" in caplog.text) == warned


def test_loopback_addresses() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("192.168.1.4")
    assert not is_loopback("atlas.example")


def test_browsing_imports_no_torch() -> None:
    code = (
        "import sys, labeling.web.serve\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

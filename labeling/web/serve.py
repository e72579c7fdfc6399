"""Serve a run's pages on this machine until Ctrl-C."""

import contextlib
import errno
import ipaddress
import logging
import socket
import sys
import threading
import webbrowser
from pathlib import Path

import uvicorn

from labeling.catalog import FILE
from labeling.web.app import LOOPBACK, create_app
from saes.errors import UserError

REPORT = "report/report.html"  # inside a run folder

log = logging.getLogger(__name__)


def browse(
    run: Path, host: str = "127.0.0.1", port: int = 8171, *, open_browser: bool = False
) -> None:
    """Serve the catalog and report of a run folder.

    Args:
        host: the address to listen on; anything but loopback lets other machines read the run.
        port: the port, 0 for any free one.
        open_browser: show the first page in the system's browser.

    Raises:
        UserError: no run folder, no readable catalog, or the address cannot be used.
    """
    if not run.is_dir():
        raise UserError(f"no run folder {run}; give the folder that a run wrote")
    local = is_loopback(host)
    every = host in ("0.0.0.0", "::")  # then any name may be a right one
    names = (*LOOPBACK, f"[{host}]" if ":" in host else host)
    app = create_app(run / FILE, run / REPORT, hosts=("*",) if every else names)
    with listen(host, port) as listener:
        port = listener.getsockname()[1]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        if not local:
            log.warning("other machines that reach %s can read this run", host)
        sys.stdout.write(f"Emotion Atlas of {run.name}: {address}  (Ctrl-C ends it)\n")
        sys.stdout.flush()
        if open_browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        UserError: the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; choose another with --port (0: any free one)"
            ) from None
        raise UserError(f"cannot listen on {host} port {port}: {error}") from None
    return listener

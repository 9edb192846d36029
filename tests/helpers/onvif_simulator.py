"""An ONVIF camera that is not ours, from the package `ipycam`, and a command that looks for it.

Whatever its configuration says, it listens on all interfaces. So it runs in a network namespace of
its own, with nothing in it but the loopback interface, and the command runs there, too.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

from tests.helpers.command_line import ROOT, environment
from tests.helpers.milvus_server import ISOLATED, interface_up

FOLDER = ROOT / ".venv" / "ipycam"
INSTALL = "pip install --no-deps --target .venv/ipycam ipycam"
"""Without what it depends on: an OpenCV that would be installed over ours."""


def reason_to_skip() -> str | None:
    if not FOLDER.exists():
        return f"no ONVIF simulator: {INSTALL}"
    if subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode:
        return "this machine allows no network namespace for the ONVIF simulator"
    return None


def run_beside_simulator(
    arguments: Sequence[object], login: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run ``upperson-rt`` where a camera that asks for a login is all there is in the network."""
    folders = os.pathsep.join((environment()["PYTHONPATH"], str(FOLDER)))
    return subprocess.run(
        [*ISOLATED, sys.executable, "-m", __name__, login, *map(str, arguments)],
        env=environment() | {"PYTHONPATH": folders},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _simulate(login: str) -> None:
    import ipycam

    user, _, password = login.partition(":")
    config = ipycam.CameraConfig(
        name="Gate", local_ip="127.0.0.1", onvif_port=8080, username=user, password=password
    )
    service = ipycam.ONVIFService(config)
    ipycam.IPCameraHTTPHandler.camera = SimpleNamespace(config=config, onvif=service)
    server = ThreadingHTTPServer(("127.0.0.1", 8080), ipycam.IPCameraHTTPHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ipycam.WSDiscoveryServer(service).start()


if __name__ == "__main__":
    interface_up(b"lo")
    _simulate(sys.argv[1])
    code = "from upperson_rt.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, *sys.argv[2:]]
    raise SystemExit(subprocess.run(command, check=False).returncode)

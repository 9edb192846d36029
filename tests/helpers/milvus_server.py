"""A real Milvus standalone server for tests, from the package `milvus`, seen by this machine only.

Whatever its configuration says, the server listens on all interfaces, without a password. So it
runs in a network namespace of its own, where nothing but it can reach its ports, and one socket on
127.0.0.1 leads in: made outside, passed on, and relayed to the server from inside. A namespace has
all ports free, too, so that several servers can run side by side.

The process inside ends, and the server with it, when its standard input is closed: a test run that
is killed leaves nothing behind.
"""

import asyncio
import fcntl
import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.command_line import ROOT

ISOLATED = ["unshare", "--user", "--map-root-user", "--net", "--"]
_PORT, _HEALTH_PORT = 19530, 9091
_START_TIMEOUT_S = 180.0  # On a busy machine.
_SETTINGS = {
    # A read waits up to twice this for the writes before it.
    "timeTickInterval: 200": "timeTickInterval: 10",
    "checkInterval: 1000": "checkInterval: 50",
    "distPullInterval: 500": "distPullInterval: 50",
    "ttl: 30 #": "ttl: 3 #",  # After a kill, as long as that is waited for the dead one.
    "serverMaxRecvSize: 67108864": "serverMaxRecvSize: 8388608",
}


def reason_to_skip() -> str | None:
    if importlib.util.find_spec("milvus") is None:
        return "the package 'milvus' (a Milvus server for x86_64 Linux) is not installed"
    if shutil.which("unshare") is None:
        return "no program 'unshare' to keep the Milvus server off the network"
    if subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode:
        return "this machine allows no network namespace to keep the Milvus server off the network"
    return None


class MilvusServer:
    """One server on one data folder. `start` and `kill` it as often as needed, then `close` it.

    Its programs are unpacked to ``binaries`` once, 240 MB. ``isolated`` is what a command begins
    with to run in the server's namespace; a new one each start by default.
    """

    def __init__(self, data: Path, binaries: Path, isolated: Sequence[str] = ISOLATED) -> None:
        self._data = data
        self._binaries = binaries
        self._isolated = isolated
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        """Start it and wait until it is ready."""
        command = [sys.executable, "-m", __name__, str(self._listener.fileno()), str(self._data)]
        self._process = subprocess.Popen(
            [*self._isolated, *command, str(self._binaries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[self._listener.fileno()],
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip() != b"ready":
            rest = line + self._process.communicate(timeout=30)[0]
            raise RuntimeError(f"Milvus did not start: {rest.decode(errors='replace')}")

    def kill(self) -> None:
        """End it the hard way, as a power switch would."""
        if self._process is not None:
            self._process.communicate(timeout=30)  # Closes its standard input, and waits.
            self._process = None

    def close(self) -> None:
        """End it, and remove what it stored."""
        self.kill()
        self._listener.close()
        shutil.rmtree(self._data, ignore_errors=True)


def interface_up(name: bytes) -> None:
    """Do what `ip link set NAME up` does: a new namespace has its loopback down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        get_flags, set_flags, up = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
        answer = fcntl.ioctl(any_socket, get_flags, struct.pack("16sH14x", name, 0))
        flags = struct.unpack_from("16sH", answer)[1]
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", name, flags | up))


@contextmanager
def _milvus(data: Path, binaries: Path) -> Iterator[None]:
    """Run the server's program; it is killed at the end."""
    import milvus

    config = milvus.MilvusServerConfig(data_dir=str(data))
    config.resolve()
    settings = data / "configs" / "milvus.yaml"
    # Without an address the server looks for a network card, of which there is none.
    text = settings.read_text("utf-8").replace("  ip: # if", "  ip: 127.0.0.1 # if")
    for default, ours in _SETTINGS.items():
        assert default in text, default
        text = text.replace(default, ours)
    settings.write_text(text, "utf-8")
    binaries.mkdir(parents=True, exist_ok=True)
    with (binaries / "lock").open("w") as lock:  # Test runs side by side share them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        milvus._initialize_data_files(str(binaries))
    environment = {
        **os.environ,
        "DEPLOY_MODE": "STANDALONE",
        "METRICS_PORT": str(_HEALTH_PORT),
        "MILVUS_RUN_DIR": str(data / "run"),
        "LD_LIBRARY_PATH": str(binaries / "bin"),
    }
    with (data / "logs" / "output.log").open("ab") as log:
        server = subprocess.Popen(
            [binaries / "bin" / "milvus", "run", "standalone"],
            cwd=data,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_healthy(server)
            yield
        finally:
            server.kill()
            server.wait()


def _wait_until_healthy(server: "subprocess.Popen[bytes]") -> None:
    url = f"http://127.0.0.1:{_HEALTH_PORT}/healthz"
    until = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.read() == b"OK":
                    return
        except OSError:
            pass  # Not there yet.
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the server is not healthy, exit code {server.poll()}")
        time.sleep(0.05)


async def _relay(listener: socket.socket) -> None:
    """Pass connections on to the server until standard input is closed."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # Either side may go at any time; the other one then sees the end.
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", _PORT)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    await asyncio.start_server(connected, sock=listener)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


def _main(listener: str, data: str, binaries: str) -> None:
    interface_up(b"lo")
    with _milvus(Path(data), Path(binaries)):
        asyncio.run(_relay(socket.socket(fileno=int(listener))))


if __name__ == "__main__":
    arguments: Any = sys.argv[1:]
    _main(*arguments)

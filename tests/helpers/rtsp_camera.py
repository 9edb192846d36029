"""A real RTSP server: GStreamer's, from Debian, on 127.0.0.1, with a drawn picture that moves.

It runs in a process of the system's Python, which has GStreamer's bindings, does what it reads on
standard input, and ends when that is closed: a test run that is killed leaves nothing behind.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

INSTALL = (
    "apt-get install --no-install-recommends python3-gi gir1.2-gst-rtsp-server-1.0 "
    "gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly"
)
_PYTHON = "/usr/bin/python3"
_FRAMES_A_SECOND = 30


def reason_to_skip() -> str | None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import rtsp_camera; rtsp_camera.gst()"
    if shutil.which(_PYTHON) is None:
        return f"no {_PYTHON} to run GStreamer's RTSP server"
    tried = subprocess.run(
        [_PYTHON, "-c", code, Path(__file__).parent], capture_output=True, check=False
    )
    return f"no RTSP server of GStreamer: {INSTALL}" if tried.returncode else None


class RtspCamera:
    """A camera that can be started, killed, frozen and changed; ``film`` is an MP4 of H.264."""

    def __init__(
        self,
        login: tuple[str, str] | None = None,
        transport: str = "both",
        encoding: str = "h264",
        size: str = "320x240",
        film: Path | None = None,
    ) -> None:
        with socket.socket() as bound:  # The same port after a restart.
            bound.bind(("127.0.0.1", 0))
            self.port: int = bound.getsockname()[1]
        self.path = f"127.0.0.1:{self.port}/stream"
        self.address = f"rtsp://{self.path}"
        self._arguments = [str(self.port), ":".join(login or ()), transport, encoding, size]
        self._arguments += [str(film)] if film else []
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [_PYTHON, __file__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # What Python's bindings of GStreamer import must not come from the tests' own.
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        self._expect("ready")

    def tell(self, command: str) -> str:
        """Send it ``size WxH``, ``rubbish``, ``sound`` (no more rubbish) or ``sent``, a count."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._expect("done")

    def _expect(self, word: str) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line.startswith(word), f"the RTSP server said '{line}', expected '{word}'"
        return line.removeprefix(word).strip()

    def freeze(self) -> None:
        """Have it do nothing any more, without closing a connection."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it as a loss of power would."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def rtsp_camera(**options: Any) -> Iterator[RtspCamera]:
    camera = RtspCamera(**options)
    try:
        camera.start()
        yield camera
    finally:
        camera.kill()


def gst() -> tuple[Any, Any, Any, Any]:
    """Return GStreamer, its RTSP, its server and GLib, if all is there that is used."""
    import gi

    for name in ("Gst", "GstRtsp", "GstRtspServer"):
        gi.require_version(name, "1.0")
    from gi.repository import GLib, Gst, GstRtsp, GstRtspServer

    Gst.init(None)
    used = "videotestsrc videoscale x264enc jpegenc rtph264pay rtpjpegpay rtpbin"
    missing = [name for name in used.split() if Gst.ElementFactory.find(name) is None]
    if missing:
        raise ImportError(f"GStreamer lacks {' '.join(missing)}")
    return Gst, GstRtsp, GstRtspServer, GLib


_ENCODERS = {
    # A key frame every half second, and the sizes before each of them.
    "h264": "x264enc name=enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! "
    "rtph264pay name=pay0 pt=96 config-interval=-1",
    "jpeg": "jpegenc name=enc ! rtpjpegpay name=pay0 pt=26",
}
_FILM = "filesrc location={} ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval=-1"


def _serve(
    port: str, login: str, transport: str, encoding: str, size: str, film: str | None = None
) -> None:
    Gst, Rtsp, Server, GLib = gst()

    def caps(text: str) -> Any:
        width, height = text.split("x")
        return Gst.Caps.from_string(f"video/x-raw,format=I420,width={width},height={height}")

    server = Server.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = Server.RTSPMediaFactory()
    factory.set_shared(film is None)
    drawn = (
        f"videotestsrc is-live=true pattern=ball ! video/x-raw,framerate={_FRAMES_A_SECOND}/1 ! "
        f"videoscale ! capsfilter name=size ! {_ENCODERS[encoding]}"
    )
    factory.set_launch(f"( {_FILM.format(film) if film else drawn} )")
    if transport != "both":
        kinds = {"tcp": Rtsp.RTSPLowerTrans.TCP, "udp": Rtsp.RTSPLowerTrans.UDP}
        factory.set_protocols(kinds[transport])
    state = SimpleNamespace(caps=caps(size), filter=None, rubbish=False, pushes=False, sent=0)

    def encoded(pad: Any, info: Any) -> Any:
        if state.pushes:
            return Gst.PadProbeReturn.OK
        state.sent += 1
        if not state.rubbish:
            return Gst.PadProbeReturn.OK
        buffer = info.get_buffer()
        noise = b"\x00\x00\x00\x01\x65" + os.urandom(buffer.get_size())
        damaged = Gst.Buffer.new_wrapped(noise)
        damaged.pts, damaged.dts, damaged.duration = buffer.pts, buffer.dts, buffer.duration
        state.pushes = True
        pad.push(damaged)
        state.pushes = False
        return Gst.PadProbeReturn.DROP

    def configured(factory: Any, media: Any) -> None:
        pipeline = media.get_element()
        state.filter = pipeline.get_by_name("size")
        state.filter.set_property("caps", state.caps)
        probe = Gst.PadProbeType.BUFFER
        pipeline.get_by_name("enc").get_static_pad("src").add_probe(probe, encoded)

    if film is None:
        factory.connect("media-configure", configured)
    if login:
        role = Server.RTSPToken()
        role.set_string("media.factory.role", "viewer")
        auth = Server.RTSPAuth()
        auth.set_supported_methods(Rtsp.RTSPAuthMethod.DIGEST)
        user, _, password = login.partition(":")
        auth.add_digest(user, password, role)
        server.set_auth(auth)
        permissions = Server.RTSPPermissions()
        for what in ("access", "construct"):
            permissions.add_permission_for_role("viewer", f"media.factory.{what}", True)
        factory.set_permissions(permissions)
    server.get_mount_points().add_factory("/stream", factory)
    loop = GLib.MainLoop()

    def obey(channel: Any, condition: Any) -> bool:
        words = sys.stdin.readline().split()
        if not words:
            loop.quit()
            return False
        if words[0] == "size":
            state.caps = caps(words[1])
            if state.filter is not None:
                state.filter.set_property("caps", state.caps)
        elif words[0] != "sent":
            state.rubbish = words[0] == "rubbish"
        print("done", state.sent, flush=True)
        return True

    GLib.io_add_watch(0, GLib.IO_IN | GLib.IO_HUP, obey)
    if not server.attach(None):
        raise SystemExit(f"no RTSP server on port {port}")
    print("ready", flush=True)
    loop.run()


if __name__ == "__main__":
    _serve(*sys.argv[1:])

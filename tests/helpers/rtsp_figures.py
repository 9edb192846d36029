"""The figures of "RTSP, measured" in docs/dev: a stream for two minutes, then its losses.

``python -m tests.helpers.rtsp_figures tcp`` watches GStreamer's server as a camera of a pipeline
does, without a detector behind it; then the server is killed, and started again after two seconds.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.helpers.fake_camera import Watched, wait_for
from tests.helpers.rtsp_camera import RtspCamera, reason_to_skip, rtsp_camera
from upperson_camera.settings import CaptureRules
from upperson_camera.source import parse_source
from upperson_camera.stream import open_source
from upperson_machine.description import resident_bytes

SIZE = "1280x720"
WARM_S = 10.0
AWAY_S = 2.0


class Clocks(Watched):
    """A camera that keeps the clocks of its pictures, not the pictures."""

    def __init__(self, address: str) -> None:
        self.clocks: list[float] = []
        super().__init__(parse_source(address), open_source, CaptureRules())

    def _deliver(self, image: NDArray[np.generic], unix_time: float, clock: float) -> None:
        if image.size:
            self.clocks.append(clock)


def reached(condition: Callable[[], bool]) -> float:
    """Return the clock when something has become so."""
    wait_for(condition)
    return time.monotonic()


def resident_mib() -> float:
    return round((resident_bytes("VmRSS") or 0) / 2**20, 1)


def steady(camera: RtspCamera, watched: Clocks, seconds: float) -> dict[str, float]:
    wait_for(lambda: len(watched.clocks) > 0)
    sent, seen, used_s = int(camera.tell("sent")), len(watched.clocks), time.process_time()
    time.sleep(WARM_S)
    warm_mib = resident_mib()
    time.sleep(seconds - WARM_S)
    used_s = time.process_time() - used_s
    sent, seen_at_once = int(camera.tell("sent")) - sent, len(watched.clocks)
    # What is under way has not arrived.
    wait_for(lambda: len(watched.clocks) >= seen + sent or len(watched.clocks) > seen_at_once + 30)
    clocks = watched.clocks[seen : seen + sent]
    return {
        "sent": sent,
        "lost": sent - len(clocks),
        "longest_gap_s": round(float(np.diff(clocks).max()), 3),
        "processor_share": round(used_s / seconds, 3),
        "memory_after_10_s_mib": warm_mib,
        "memory_mib": resident_mib(),
    }


def loss(camera: RtspCamera, watched: Clocks) -> tuple[float, float]:
    """Kill the server; return when that was noticed, and when a picture came after it was back."""
    outages, killed = watched.counts.count("outages"), time.monotonic()
    camera.kill()
    noticed = reached(lambda: watched.counts.count("outages") > outages)
    time.sleep(max(0.0, killed + AWAY_S - time.monotonic()))
    camera.start()
    back, seen = time.monotonic(), len(watched.clocks)
    first = reached(lambda: len(watched.clocks) > seen)
    wait_for(lambda: len(watched.clocks) > seen + 30)
    return noticed - killed, first - back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transport", choices=["tcp", "udp"])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    if (reason := reason_to_skip()) is not None:
        raise SystemExit(reason)
    with rtsp_camera(transport=arguments.transport, size=SIZE) as camera:
        watched = Clocks(camera.address)
        found: dict[str, object] = {"transport": arguments.transport}
        found |= steady(camera, watched, arguments.seconds)
        losses = [loss(camera, watched) for _ in range(arguments.kills)]
        watched.stop()
    if losses:
        noticed_s, first_s = (
            sorted(round(one, 2) for one in row) for row in zip(*losses, strict=True)
        )
        found |= {"noticed_s": noticed_s, "first_picture_s": first_s}
    print(json.dumps(found | {"memory_at_end_mib": resident_mib()}))


if __name__ == "__main__":
    main()

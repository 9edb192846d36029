"""Boxes that watch videos into one Milvus collection, each in a network namespace of its own.

    python -m tests.helpers.boxes --trials 20

In each trial two boxes run ``upperson-rt watch``, joined to the server's namespace by a cable each.
One of them gets SIGKILL at a random moment, and so does the server, which is started again. What
was acknowledged on either box must be there afterwards, as it was; anything of `BAD` counts against
it.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from tests.helpers import milvus_server
from tests.helpers.command_line import environment
from tests.helpers.toy_bundle import make_toy_bundle
from tests.helpers.trials import parse, report
from upperson_rt.errors import BackendError
from upperson_rt.gallery import Gallery
from upperson_synthetic.video import VideoSpec, write_video

BAD = ("lost", "altered", "wrong")
_WATCH = (
    *("watch", "--detector", "street.json", "-b", "bundle", "--vectors-only", "--threads", "1"),
    *("--backend", "onnxruntime", "--batch-size", "2", "--every", "0.2", "--realtime", "--json"),
)
_NOTES_WHAT_IS_ACKNOWLEDGED = """
import json, os, sys
from upperson_milvus import MilvusGallery
import upperson_rt.cli

file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
add = MilvusGallery._add

def add_and_note(self, items, vectors_ND, variant):
    replaced = add(self, items, vectors_ND, variant)
    for item, vector in zip(items, vectors_ND):
        os.write(file, json.dumps([item.key, item.camera, vector.tolist()]).encode() + b"\\n")
    return replaced

MilvusGallery._add = add_and_note
sys.argv = ["upperson-rt", *sys.argv[2:]]
upperson_rt.cli.main()
"""


class Network:
    """Namespaces: one for a server, and one for each box, joined to it by a cable."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self.server = _entering(self._hold(milvus_server.ISOLATED))
        """What a command begins with to run where the server is."""
        _run(*self.server, "ip", "link", "set", "lo", "up")

    def join(self, name: str) -> tuple[list[str], str]:
        """Add a box; return what a command on it begins with, and the server's address."""
        number = len(self._holders)
        pid = self._hold([*self.server, "unshare", "--net", "--"])
        box = _entering(pid)
        there = ("peer", "name", "cable", "netns", str(pid))
        _run(*self.server, "ip", "link", "add", name, "type", "veth", *there)
        for inside, end, host in ((self.server, name, 1), (box, "cable", 2)):
            _run(*inside, "ip", "address", "add", f"10.77.{number}.{host}/24", "dev", end)
            _run(*inside, "ip", "link", "set", end, "up")
        _run(*box, "ip", "link", "set", "lo", "up")
        return box, f"10.77.{number}.1"

    def close(self) -> None:
        for holder in reversed(self._holders):
            holder.communicate()
        self._holders.clear()

    def _hold(self, isolated: Sequence[str]) -> int:
        """Start a process that keeps namespaces until its standard input is closed."""
        holder = subprocess.Popen(
            [*isolated, "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise subprocess.CalledProcessError(holder.wait(), isolated)
        return holder.pid


def _entering(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials", "--"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Box:
    """One ``upperson-rt watch`` in a folder of `prepare`, and what was acknowledged to it."""

    def __init__(self, inside: Sequence[str], folder: Path, gallery: str, camera: str) -> None:
        self.camera = camera
        self._notes = folder / f"{camera}.acknowledged"
        self._notes.touch()
        self._output = folder / f"{camera}.output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *(*inside, sys.executable, "-W", "error", "-c", _NOTES_WHAT_IS_ACKNOWLEDGED),
                    *(str(self._notes), *_WATCH, f"{camera}=street.avi", "-g", gallery),
                ],
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def acknowledged(self) -> dict[str, tuple[str, list[float]]]:
        """Return camera and vector by key of all that `add` has returned for."""
        lines = self._notes.read_bytes().split(b"\n")[:-1]
        return {key: (camera, vector) for key, camera, vector in map(json.loads, lines)}

    def wait_for(self, rows: int) -> None:
        while len(self.acknowledged()) < rows:
            assert self._process.poll() is None, self._output.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Let it commit what it has accepted; return the exit code."""
        self._process.terminate()
        return self._process.wait(timeout=120)


def prepare(folder: Path) -> None:
    """Make what boxes work with: a video that lasts longer than a server takes to restart."""
    make_toy_bundle(folder / "bundle")
    spec = VideoSpec(people=14, seconds=100, fps=2, width=320, height=180, seed=5)
    write_video(folder / "street.avi", spec)


def problems(gallery: Gallery, boxes: Sequence[Box]) -> Iterator[str]:
    """Yield what is not there as it was acknowledged, and what should not be there at all."""
    wanted = {key: value for box in boxes for key, value in box.acknowledged().items()}
    found = {
        item.key: (item.camera, vector)
        for items, vectors in gallery.vectors()
        for item, vector in zip(items, vectors, strict=True)
    }
    for key, (camera, vector) in wanted.items():
        if key not in found:
            yield f"lost: {key}"
        elif found[key][0] != camera or not np.array_equal(found[key][1], np.float32(vector)):
            yield f"altered: {key}"
    yield from (f"wrong: {problem}" for problem in gallery.verify())
    if others := {item.camera for item in gallery.items()} - {box.camera for box in boxes}:
        yield f"wrong: pictures of {sorted(map(str, others))}"


def trial(
    server: milvus_server.MilvusServer, reader: Gallery, boxes: Sequence[Box], rng: random.Random
) -> Iterator[str]:
    """Kill the first box and restart the server while both write; yield how each box ended."""
    for box in boxes:
        box.wait_for(rng.randint(1, 6))
    restart = [server.kill, server.start]
    steps: list[Callable[[], None]] = [boxes[0].kill, *restart]
    if rng.random() < 0.5:
        steps = [*restart, boxes[0].kill]
    for step in steps:
        time.sleep(rng.uniform(0, 0.5))
        step()
    for box in boxes[1:]:
        box.wait_for(len(box.acknowledged()) + 1)  # It goes on.
        yield f"the other box ended with exit code {box.end()}"
    try:
        seen = {item.camera for item in reader.items()}  # It was open before the server was killed.
    except BackendError as error:
        yield f"a reader has to open it again: {error}"
        return
    if not seen >= {box.camera for box in boxes}:
        yield f"wrong: a reader sees {sorted(map(str, seen))}"


def try_boxes(trials: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    all_boxes: list[Box] = []
    with tempfile.TemporaryDirectory() as name, closing(Network()) as network:
        folder = Path(name)
        prepare(folder)
        places = [network.join(box) for box in ("gate", "hall")]
        server = milvus_server.MilvusServer(folder / "milvus", folder / "binaries", network.server)
        server.start()
        try:
            for number in range(trials):
                boxes = []
                for camera, (inside, address) in zip("ab", places, strict=True):
                    place = f"milvus://{address}/people?timeout=120"
                    boxes.append(Box(inside, folder, place, f"{camera}{number}"))
                all_boxes += boxes
                for box in boxes:
                    box.wait_for(1)
                location = f"milvus://127.0.0.1:{server.port}/people"
                with Gallery.open(location) as reader:
                    outcomes.update(trial(server, reader, boxes, rng))
                with Gallery.open(location) as reader:
                    outcomes.update(problems(reader, all_boxes))
                outcomes["rows acknowledged"] = sum(len(box.acknowledged()) for box in all_boxes)
                print(number, dict(outcomes), flush=True)
        finally:
            server.close()
    return outcomes


def main() -> int:
    options = parse(__doc__, trials=20, seed=0)
    return report(try_boxes(options.trials, options.seed), BAD)


if __name__ == "__main__":
    sys.exit(main())

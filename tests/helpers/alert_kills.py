"""Kills what raises, delivers and receives alerts, again and again, and counts what arrives.

    python -m tests.helpers.alert_kills --alerts 10000 --kills 100

One process commits pictures that raise alerts; two deliver them, to a webhook and to a broker.
Those three and the webhook get SIGKILL at random moments; the broker is ended with SIGTERM, as it
keeps what it has acknowledged in memory. Each comes back. At the end every message must have
arrived at both, nothing else, and repeated ones with the same content. Anything else is an error.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.helpers.alert_servers import Broker, Subscriber, free_port, is_open, wait_for
from tests.helpers.command_line import environment, start_program
from tests.helpers.toy_bundle import make_toy_bundle
from tests.helpers.trials import parse, report
from upperson_alerts.alerts import add_alert
from upperson_rt.bundle import open_encoder
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.service import Crop, Ingest
from upperson_rt.search.query import QueryEncoder, SearchRequest

SENTENCE = "man in red coat"
_PER_VISIT = 100
START = 1_700_000_000 // 86400 * 86400.0
"""Midnight."""
_BACKGROUND = 4000
_PAUSE_S = 0.2
"""Between commits, so that they go on while the others are killed."""


def vectors_of(
    encoder: Encoder, scores_N: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return (N, D) unit vectors with these cosines to `SENTENCE`."""
    (query,) = QueryEncoder(encoder).embed([SearchRequest(sentence=SENTENCE)])
    text_D = query.vectors_AD[0]
    other_ND = rng.normal(size=(len(scores_N), len(text_D)))
    other_ND -= np.outer(other_ND @ text_D, text_D)
    other_ND /= np.linalg.norm(other_ND, axis=1, keepdims=True)
    wanted_N1 = scores_N[:, None]
    return (wanted_N1 * text_D + np.sqrt(1 - wanted_N1**2) * other_ND).astype(np.float32)


def raise_alerts(folder: Path, visits: int) -> None:
    """Commit one picture after the other, each better than all before, and go on where it was."""
    encoder = open_encoder(folder / "bundle", "fp32", "onnxruntime", threads=1)
    vectors_ND = vectors_of(encoder, np.linspace(0.5, 0.9, visits), np.random.default_rng(0))
    pixels = np.zeros((24, 8, 3), np.uint8)
    with Gallery.open(folder / "gallery", encoder.fingerprint) as gallery:
        there = gallery.ids([f"new-{number}" for number in range(visits)])
        ingest = Ingest(encoder, gallery)
        # The last one that is there is committed once more, as after a crash.
        for number in range(max(0, len(there) - 1), visits):
            time_s = START + 2 * 86400 + number
            item = Item(key=f"new-{number}", camera="gate", time=time_s, track=f"new-{number}")
            ingest.commit([Crop(item=item, pixels=pixels)], vectors_ND[number : number + 1])
            time.sleep(_PAUSE_S)


class Trial:
    """The processes of a trial; each can be killed, and is started again."""

    def __init__(self, folder: Path, alerts: int) -> None:
        self.folder = folder
        self.visits, rest = divmod(alerts, _PER_VISIT)
        assert not rest, f"alerts come in hundreds, found {alerts}"
        make_toy_bundle(folder / "bundle")
        encoder = open_encoder(folder / "bundle", "fp32", "onnxruntime", threads=1)
        space = encoder.fingerprint, encoder.embed_dim
        rng = np.random.default_rng(1)
        scores = rng.uniform(0, 0.4, _BACKGROUND)
        with Gallery.open(folder / "gallery", *space, create=True) as gallery:
            times = START + np.linspace(0, 172_000, _BACKGROUND)
            items = [
                Item(key=f"b{n}", camera="gate", time=time, track=f"b{n}")
                for n, time in enumerate(times.tolist())
            ]
            gallery.add(items, vectors_of(encoder, scores, rng))
            for number in range(_PER_VISIT):
                options = {"rate": 100.0, "cap": 1000, "name": f"alert {number}"}
                add_alert(gallery, encoder, SENTENCE, **options)  # type: ignore[arg-type]
        self.broker = Broker(folder).start()
        self.subscriber = Subscriber(self.broker.port, "alerts/#")
        self.port = free_port()
        self.received = folder / "received"
        self.wrong: list[str] = []
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.starts: dict[str, Callable[[], subprocess.Popen[str]]] = {
            "raise": lambda: self._python("raise", str(self.visits)),
            "webhook": self._webhook,
            "deliver http": lambda: self._deliver(f"http://127.0.0.1:{self.port}/hook"),
            "deliver mqtt": lambda: self._deliver(f"mqtt://127.0.0.1:{self.broker.port}/alerts"),
        }

    def start(self, name: str) -> None:
        code = self.running[name].poll() if name in self.running else -signal.SIGKILL
        if code not in (None, 0, -signal.SIGKILL):
            self.wrong.append(f"{name} ended by itself, exit code {code}")
        if code not in (None, 0):
            self.running[name] = self.starts[name]()

    def kill(self, name: str) -> bool:
        process = self.running.get(name)
        if process is None or process.poll() is not None:
            return False
        process.kill()
        process.wait()
        return True

    def close(self) -> None:
        for name in self.running:
            self.kill(name)
        self.subscriber.close()
        self.broker.stop()

    def _python(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.helpers.alert_kills", *arguments]
        return subprocess.Popen(
            [*command, str(self.folder)], env=environment(), stdin=subprocess.DEVNULL, text=True
        )

    def _webhook(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.helpers.alert_servers", str(self.port)]
        process = subprocess.Popen([*command, str(self.received)], env=environment(), text=True)
        wait_for(lambda: is_open(self.port))
        return process

    def _deliver(self, address: str) -> "subprocess.Popen[str]":
        arguments = ("alert", "deliver", "--to", address, "-g", self.folder / "gallery")
        return start_program("upperson-rt", *arguments, output=self.folder / address[:4])


def run_trial(folder: Path, alerts: int, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Run a trial; return what was counted, and what is wrong."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    trial = Trial(folder, alerts)
    try:
        for name in ("webhook", "deliver http", "deliver mqtt"):
            trial.start(name)
        with Gallery.open(folder / "gallery") as gallery:
            # The first destination would get what is there, a later one only what comes.
            wait_for(lambda: len(_waiting(gallery)) == 2)
        trial.start("raise")
        while counts["kill -9"] < kills:
            time.sleep(float(rng.uniform(0.1, 1.2)))
            names = [name for name, one in trial.running.items() if one.poll() is None]
            chosen = [name for name in ("broker", *names) if rng.uniform() < 0.4]
            for name in chosen:
                if name == "broker":
                    trial.broker.stop()
                    counts["broker ended"] += 1
                elif counts["kill -9"] < kills and trial.kill(name):
                    counts["kill -9"] += 1
                    counts[f"kill -9 of {name}"] += 1
            time.sleep(float(rng.uniform(0, 0.3)))
            if "broker" in chosen:
                trial.broker.start()
            for name in trial.starts:
                trial.start(name)
        assert trial.running["raise"].wait(600) == 0
        with Gallery.open(folder / "gallery") as gallery:
            wait_for(lambda: not any(_waiting(gallery).values()), 600)
            wrong = trial.wrong + list(_problems(trial, gallery, alerts, counts))
    finally:
        trial.close()
    counts["seconds"] = round(time.monotonic() - began)
    return counts, wrong


def _problems(trial: Trial, gallery: Gallery, alerts: int, counts: Counter[str]) -> "list[str]":
    with gallery.outbox() as outbox:
        expected = {one.key for one in outbox.messages(state="ready")}
        dead = outbox.dead()
    wrong = [f"damage: {line}" for line in gallery.verify()]
    wrong += [f"dead letter: {one.key}" for _, one, _ in dead]
    if len(expected) != alerts or gallery.count() != _BACKGROUND + trial.visits:
        wrong.append(f"{len(expected)} messages and {gallery.count()} pictures were committed")
    wait_for(lambda: len({one[1] for one in trial.subscriber.messages}) >= len(expected))
    payloads = [json.loads(payload) for _, payload, _ in trial.subscriber.messages]
    of_id: dict[str, set[str]] = {}
    for one in payloads:
        of_id.setdefault(one["data"]["id"], set()).add(json.dumps(one))
    wrong += [f"two contents of {key}" for key, found in of_id.items() if len(found) > 1]
    arrived = {
        "http": trial.received.read_text().split(),
        "mqtt": [one["data"]["id"] for one in payloads],
    }
    for name, ids in arrived.items():
        counts[f"{name}: arrived"] = len(ids)
        counts[f"{name}: different"] = len(set(ids))
        wrong += [f"{name}: lost {key}" for key in expected - set(ids)]
        wrong += [f"{name}: unknown {key}" for key in set(ids) - expected]
    return wrong


def _waiting(gallery: Gallery) -> dict[str, int]:
    with gallery.outbox() as outbox:
        return outbox.waiting()


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] == "raise":
        raise_alerts(Path(sys.argv[3]), int(sys.argv[2]))
        return 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    options = parse(__doc__, alerts=10_000, kills=100, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = run_trial(Path(folder), options.alerts, options.kills, options.seed)
    report(counts, ())
    print("\n".join(wrong[:20]) or "nothing was lost")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

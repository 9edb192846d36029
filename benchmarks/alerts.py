"""How soon alerts are handed over: from the commit of a picture to the request at a webhook.

Sentences and pictures are random vectors: what is timed is the comparison, the transaction and the
delivery by a process of its own, not the towers. Each sentence may raise one false alarm a day. The
log-odds of one cosine in 20 are computed, as of drawn people.
"""

import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.resources import files
from itertools import product
from typing import Annotated, Any, cast

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.gallery_data import SyntheticPeople
from benchmarks.report import TIMES, conditions, print_report, table
from upperson.data.vocabulary import clip_tokenizer
from upperson_alerts.alerts import Alert
from upperson_alerts.matcher import AlertMatcher
from upperson_autotune.timing import Timing
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.score_calibration import Background, ScoreCalibration
from upperson_rt.strict import read_fields

app = new_app("Time alerts, from the commit of a picture to their delivery.")
_DIM, _BATCH = 512, 8
_PLAIN, _WITH, _HANDED = _ROWS = (
    "commit without alerts", "commit with alerts", "from the commit's begin to the webhook",
)  # fmt: skip
_COLOURS = ("red", "green", "blue", "black", "white", "yellow", "gray", "brown", "pink", "orange")
_WORN = ("coat", "jacket", "shirt", "hoodie", "sweater", "dress", "jeans", "skirt", "cap", "boots")
_CARRIED = ("backpack", "handbag", "suitcase", "umbrella", "box", "bottle", "phone", "book", "cart",
            "dog")  # fmt: skip


class _RandomTexts:
    """As much of an `Encoder` as alerts need, with a random vector for each text."""

    fingerprint, embed_dim, variant = "random", _DIM, "random"
    calibration = None

    def __init__(self) -> None:
        self.tokenizer = clip_tokenizer()
        shipped = json.loads(files("upperson_scores").joinpath("prior.json").read_text("utf-8"))
        # Cosines of random directions have this spread; 1.64 of it are above 2 of the background's.
        background = Background(middle=0.0, spread=1.64 / 2 / _DIM**0.5)
        made = read_fields(ScoreCalibration, shipped, "prior.json")
        self.calibration = replace(made, background=background)
        self._rng = np.random.default_rng(1)

    def encode_texts(self, texts: Any) -> NDArray[np.float32]:
        """Return (T, D) vectors of unit length."""
        return self.encode_tokens(self.tokenizer.encode(texts))

    def encode_tokens(self, tokens: Any) -> NDArray[np.float32]:
        """Return (T, D) vectors of unit length."""
        texts_TD = self._rng.normal(size=(len(tokens.input_ids), _DIM)).astype(np.float32)
        return cast(
            "NDArray[np.float32]", texts_TD / np.linalg.norm(texts_TD, axis=1, keepdims=True)
        )


class _Receiver(http.server.ThreadingHTTPServer):
    """A webhook that notes when each message came."""

    daemon_threads = True

    def __init__(self) -> None:
        self.arrived: dict[str, float] = {}
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Receiver

    def do_POST(self) -> None:
        """Take a message."""
        self.server.arrived.setdefault(self.headers["webhook-id"], time.perf_counter())
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@app.command(cls=Command)
def alerts(
    sentences: Annotated[int, typer.Option(min=1, max=1000, help="Alerts.")] = 1000,
    rows: Annotated[int, typer.Option(min=10, help="Pictures that are there before.")] = 20_000,
    commits: Annotated[int, typer.Option(min=2, help="Commits that are timed.")] = 200,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds from one to the next.")] = 0.25,
    debug: Debug = False,
) -> None:
    """Time alerts, from the commit of a picture to their delivery.

    Example: python -m benchmarks.alerts --sentences 1000 --rows 20000
    """
    encoder = cast(Encoder, _RandomTexts())
    people = SyntheticPeople(rows + 2 * commits * _BATCH, _DIM)
    seconds: dict[str, list[float]] = {name: [] for name in _ROWS}
    with (
        tempfile.TemporaryDirectory() as folder,
        Gallery.open(folder, "random", _DIM, create=True) as gallery,
    ):
        for first in range(0, rows, 4096):
            last = min(rows, first + 4096)
            gallery.add(_items(first, last), people.vectors(first, last))
        starts = range(rows, rows + 2 * commits * _BATCH, _BATCH)
        for first in starts[:commits]:
            began = time.perf_counter()
            gallery.add(_items(first, first + _BATCH), people.vectors(first, first + _BATCH))
            seconds[_PLAIN].append(time.perf_counter() - began)
        _write_alerts(gallery, sentences)
        began = time.perf_counter()
        matcher = AlertMatcher(encoder, gallery)
        opened_s = time.perf_counter() - began
        with _delivered(gallery) as arrived:
            began_at: dict[int, float] = {}
            for number, first in enumerate(starts[commits:]):
                items, vectors = (
                    _items(first, first + _BATCH),
                    people.vectors(first, first + _BATCH),
                )
                began_at[number] = time.perf_counter()
                gallery.add(items, vectors, within=matcher.match(items, vectors))
                seconds[_WITH].append(time.perf_counter() - began_at[number])
                time.sleep(max(0.0, every - seconds[_WITH][-1]))
            with gallery.outbox() as outbox:
                messages = outbox.messages(state="ready")
            while len(arrived) < len(messages):
                time.sleep(0.05)
        number_of = {str(first // _BATCH): number for number, first in enumerate(starts[commits:])}
        seconds[_HANDED] = [
            arrived[one.key] - began_at[number_of[one.body["data"]["track"]]]
            for one in messages
            if "track" in one.body["data"]
        ]
    result = conditions("alerts", "paho-mqtt", threads=None, batch_size=_BATCH, warmup=0)
    result |= {"sentences": sentences, "rows": rows, "opened_s": opened_s}
    result |= {"times": {name: Timing(seconds=one).as_dict() for name, one in seconds.items()}}
    facts = [
        f"{sentences} sentences, {rows} pictures before, {_BATCH} in a commit, one in {every:g} s",
        f"opened in {opened_s:.2f} s; {len(seconds[_HANDED])} messages were delivered",
    ]
    print_report(result, facts, [table("alerts", result["times"], TIMES)])


def _items(first: int, last: int) -> list[Item]:
    """Return items of tracks of eight pictures, 250 tracks a day."""
    return [
        Item(key=str(row), camera="gate", time=1.7e9 + 43.2 * row, track=str(row // _BATCH))
        for row in range(first, last)
    ]


def _write_alerts(gallery: Gallery, count: int) -> None:
    with gallery.outbox(write=True) as outbox:
        for number, words in zip(range(count), product(_COLOURS, _WORN, _CARRIED), strict=False):
            alert = Alert(
                id=f"{number:08x}",
                name=str(number),
                sentence="person in {} {} with {}".format(*words),
                cameras=None,
                rate=1.0,
                cap=10,
                state="active",
                created=0.0,
            )
            outbox.write(f"alert/{alert.id}", asdict(alert))
        outbox.write("alerts/version", 1)


@contextmanager
def _delivered(gallery: Gallery) -> Iterator[dict[str, float]]:
    """Deliver in another process, and give when each message arrived."""
    receiver = _Receiver()
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{receiver.server_address[1]}/"
    code = "from upperson_rt.cli import main; main()"
    command = ["alert", "deliver", "--to", address, "-g", gallery.location]
    deliverer = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.DEVNULL)
    try:
        while not _has_begun(gallery):
            time.sleep(0.05)
        yield receiver.arrived
    finally:
        deliverer.terminate()
        deliverer.wait()
        receiver.shutdown()
        receiver.server_close()


def _has_begun(gallery: Gallery) -> bool:
    with gallery.outbox() as outbox:
        return bool(outbox.waiting())


if __name__ == "__main__":
    run_app(app, "benchmarks.alerts")

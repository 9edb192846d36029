"""The console under load: clients search and look while a camera fills the same gallery.

Every client asks, looks at some of the thumbnails it got, and asks again at once. In the end each
row that `watch` was told is committed must be there, and each answered search in the log.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from upperson_rt.bundle import Bundle
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.log_chain import verify_log

_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown", "pink", "purple")
_CLOTHES = ("coat", "jacket", "shirt", "dress", "hoodie", "sweater")
_PEOPLE = ("woman", "man", "girl", "boy", "person")
_THUMBNAILS = 6
_AT_A_TIME = 10_000
_PICTURES = 200
_ALONE = 100


app = new_app("Load the console.")


@app.command(cls=Command)
def console(
    bundle: BundleOption,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Who ask at a time.")] = 50,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, help="How long.")] = 120.0,
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="Random rows that are there already.")
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let clients search and look while a camera fills the same gallery as fast as it can.

    Before that one client searches and looks by itself. The made-up rows are tracks of five at 20
    cameras, and share 200 pictures of noise. A million of 128 dimensions need 1 GB of disk.

    Example: `python -m benchmarks.console -b demo/bundle --rows 100000`
    """
    with tempfile.TemporaryDirectory() as folder:
        result = _run(bundle, clients, seconds, rows, Path(folder))
    print_result(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    table = new_table("what", "measured")
    for name, value in result.items():
        table.add_row(name, str(value))
    print_table(table)


def _run(
    bundle_path: Path, clients: int, seconds: float, rows: int, folder: Path
) -> dict[str, Any]:
    video = ("synthesize-video", "street.avi", "--people", "12")
    if _start_program("upperson.cli", folder, "data", *video).wait(300):
        raise InputError((folder / "data.err").read_text())
    bundle = Bundle.open(bundle_path)
    prepared_s = _fill(folder / "gallery", bundle, rows)
    common = ["-b", str(bundle_path.absolute()), "-g", "gallery"]
    server = _start(folder, "serve", *common, "--port", "0", "--threads", "1")
    began = time.monotonic()
    while (found := re.search(r"console: (\S+)/\n", (folder / "serve.out").read_text())) is None:
        if server.poll() is not None:
            raise InputError((folder / "serve.err").read_text())
        time.sleep(0.01)
    started_s = time.monotonic() - began
    idle_mb = _resident_mb(server.pid)
    alone, alone_thumbnails = _ask_alone(found[1])
    alone_mb = _resident_mb(server.pid)
    before_s = _processor_s(server.pid)
    watcher = _Watcher(folder, [*common, "street.avi", "--detector", "street.json", "--every", "0"])
    try:
        answered, memory = asyncio.run(_load(found[1], clients, seconds, server.pid, watcher))
        processor_s = _processor_s(server.pid) - before_s
    finally:
        watcher.end()
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    with Gallery.open(folder / "gallery") as gallery:
        there, problems = gallery.count() - rows, gallery.verify()
    report = verify_log(folder / "console" / "query.log")
    searches = sorted(
        seconds for kind, status, seconds in answered if (kind, status) == ("search", 200)
    )
    pictures = sorted(
        seconds for kind, status, seconds in answered if (kind, status) == ("picture", 200)
    )
    statuses = Counter(f"{kind} {status}" for kind, status, _ in answered)
    return {
        "made-up rows": rows,
        "time to add and index them (s)": round(prepared_s, 1),
        "start to first answer (s)": round(started_s, 2),
        "one client: search p50 / p95 / p99 (ms)": _quantiles(alone),
        "one client: thumbnail p50 / p95 / p99 (ms)": _quantiles(alone_thumbnails),
        "memory idle / one client / at 1/4, 1/2, end of the load (MB)": [
            idle_mb, alone_mb, *(memory[len(memory) * part // 4 - 1] for part in (1, 2, 4)),
        ],
        "answers": dict(sorted(statuses.items())),
        "searches a second": round(len(searches) / seconds, 1),
        "server's processor time a search, thumbnails included (ms)": round(
            1000 * processor_s / max(1, len(searches)), 1
        ),
        "search p50 / p95 / p99 (ms)": _quantiles(searches),
        "thumbnail p50 / p95 / p99 (ms)": _quantiles(pictures),
        "rows added meanwhile": there,
        "rows lost": watcher.committed - there,
        "gallery problems": len(problems),
        "lines in the log": report.lines,
        "log problems": len(report.problems),
        "exit code": code,
    }  # fmt: skip


def _fill(place: Path, bundle: Bundle, rows: int) -> float:
    """Make a gallery of random rows, a part at a time; return the seconds that took."""
    began = time.monotonic()
    rng = np.random.default_rng(0)
    dim = bundle.manifest.model.embed_dim
    with Gallery.open(place, bundle.manifest.fingerprint, dim, create=True) as gallery:
        if gallery.crops_dir is None:
            raise InputError(f"gallery {place} keeps no pictures")
        gallery.crops_dir.mkdir(exist_ok=True)
        for number in range(_PICTURES if rows else 0):
            noise = rng.integers(0, 256, (24, 8, 3), np.uint8)
            picture = Image.fromarray(noise).resize((128, 384))
            picture.save(gallery.crops_dir / f"{number}.jpg")
        for start in range(0, rows, _AT_A_TIME):
            count = min(_AT_A_TIME, rows - start)
            vectors = rng.normal(size=(count, dim)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            gallery.add([_item(start + number) for number in range(count)], vectors)
        if rows:
            gallery.rebuild()  # A million and more get their approximate index here, once.
    return time.monotonic() - began


def _item(number: int) -> Item:
    track = number // 5
    return Item(
        key=f"r{number}",
        camera=f"old{track % 20}",
        time=1e9 + number,
        track=str(track),
        crop=f"{number % _PICTURES}.jpg",
    )


def _ask_alone(url: str) -> tuple[list[float], list[float]]:
    """Return the seconds of searches, and of thumbnails, that nobody else asks beside."""
    import httpx

    searches, thumbnails = [], []
    chance = random.Random(0)
    with httpx.Client(base_url=url, timeout=600) as client:
        for number in range(_ALONE + 1):
            began = time.monotonic()
            answer = client.post("/api/v1/search", json={"sentence": _sentence(chance)})
            took = time.monotonic() - began
            answer.raise_for_status()
            if number:  # The first one loads towers and index.
                searches.append(took)
            for hit in answer.json()["hits"][:_THUMBNAILS]:
                if hit["picture"] is not None:
                    began = time.monotonic()
                    client.get(hit["picture"] + "?size=thumb").raise_for_status()
                    thumbnails.append(time.monotonic() - began)
    return sorted(searches), sorted(thumbnails)


def _sentence(chance: random.Random) -> str:
    upper = f"{chance.choice(_COLOURS)} {chance.choice(_CLOTHES)}"
    return f"{chance.choice(_PEOPLE)} in a {upper} and {chance.choice(_COLOURS)} trousers"


class _Watcher:
    """Runs `watch` on the same video again and again, each time as another camera."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder, self._arguments = folder, arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._runs = 0
        self.committed = 0

    def keep_going(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self._count()
            self._runs += 1
            extra = ["--camera", f"camera{self._runs}", "--json", "--threads", "1"]
            self._process = _start(self._folder, "watch", *self._arguments, *extra)

    def end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)
            self._count()
            self._process = None

    def _count(self) -> None:
        if self._process is None:
            return
        told = (self._folder / "watch.out").read_text()
        if told:
            stats = json.loads(told)
            self.committed += sum(camera["committed"] for camera in stats["cameras"].values())
        elif self._process.returncode != 128 + signal.SIGTERM:  # Ended before it had begun.
            raise InputError((self._folder / "watch.err").read_text())


async def _load(
    url: str, clients: int, seconds: float, pid: int, watcher: _Watcher
) -> tuple[list[tuple[str, int, float]], list[int]]:
    import httpx

    answered: list[tuple[str, int, float]] = []
    memory: list[int] = []
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def ask(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until:
                began = time.monotonic()
                answer = await client.post("/api/v1/search", json={"sentence": _sentence(chance)})
                answered.append(("search", answer.status_code, time.monotonic() - began))
                if answer.status_code == 429:
                    await asyncio.sleep(
                        float(answer.headers["retry-after"]) * chance.uniform(0.5, 1)
                    )
                    continue
                for hit in answer.json().get("hits", [])[:_THUMBNAILS]:
                    if hit["picture"] is not None:
                        began = time.monotonic()
                        shown = await client.get(hit["picture"] + "?size=thumb")
                        answered.append(("picture", shown.status_code, time.monotonic() - began))

        async def look() -> None:
            while time.monotonic() < until:
                memory.append(_resident_mb(pid))
                await asyncio.to_thread(watcher.keep_going)
                await asyncio.sleep(1)

        await asyncio.gather(look(), *(ask(number) for number in range(clients)))
    return answered, memory


def _start(folder: Path, command: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return _start_program("upperson_rt.cli", folder, command, *arguments)


def _start_program(
    module: str, folder: Path, command: str, *arguments: str
) -> "subprocess.Popen[bytes]":
    code = f"from {module} import main; main()"
    with open(folder / f"{command}.out", "wb") as out, open(folder / f"{command}.err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-c", code, command, *arguments],
            cwd=folder,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _resident_mb(pid: int) -> int:
    with suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) >> 10
    return 0


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _quantiles(seconds: list[float]) -> list[int]:
    if not seconds:
        return []
    return [round(1000 * float(np.quantile(seconds, part))) for part in (0.5, 0.95, 0.99)]


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.console")

"""The console under load: clients search and look while a camera fills the same gallery.

Every client asks, looks at some of the thumbnails it got, and asks again at once. In the end each
row that `watch` was told is committed must be there, and each answered search in the log.
"""

import asyncio
import json
import os
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

import typer

from benchmarks.console_clients import Load, ask_alone, open_pages, quantiles
from benchmarks.console_made import fill_gallery, write_log
from upperson_rt.bundle import Bundle
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.log_chain import verify_log

_QUARTERS = (0, 1, 2, 3, 4)

app = new_app("Load the console.")


@app.command(cls=Command)
def console(
    bundle: BundleOption,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Who ask at a time.")] = 50,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, help="How long.")] = 120.0,
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="Random rows that are there already.")
    ] = 0,
    log_lines: Annotated[
        int, typer.Option("--log-lines", min=0, help="Lines that the log has already.")
    ] = 0,
    fill: Annotated[
        bool, typer.Option("--fill/--no-fill", help="Whether a camera adds meanwhile.")
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let clients search and look while a camera fills the same gallery as fast as it can.

    Before that one client searches and looks by itself, and opens other pages. The made-up rows are
    tracks of five at 20 cameras, and share 200 pictures of noise. A million of 128 dimensions need
    1 GB of disk.

    Example: `python -m benchmarks.console -b demo/bundle --rows 100000`
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = Bundle.open(bundle)
        prepared_s = fill_gallery(folder / "gallery", opened, rows)
        if log_lines:
            write_log(folder / "console" / "query.log", log_lines)
        common = ["-b", str(bundle.absolute()), "-g", "gallery"]
        with Gallery.open(folder / "gallery") as gallery:
            result = _measured(folder, common, gallery, clients, seconds, fill)
            there, problems = gallery.count() - rows, gallery.verify()
        report = verify_log(folder / "console" / "query.log")
    result = {
        "made-up rows": rows,
        "time to add and index them (s)": round(prepared_s, 1),
        **result,
        "bytes of an added row in the index": 2 * opened.manifest.model.embed_dim + 16,
        "rows added meanwhile": there,
        "rows lost": result["rows told to be in"] - there,
        "gallery problems": len(problems),
        "lines in the log": report.lines,
        "log problems": len(report.problems),
    }
    print_result(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    table = new_table("what", "measured")
    for name, value in result.items():
        table.add_row(name, str(value))
    print_table(table)


def _measured(
    folder: Path,
    common: list[str],
    gallery: Gallery,
    clients: int,
    seconds: float,
    fill: bool,
) -> dict[str, Any]:
    """Start a server over a gallery, ask it, and end it."""
    if fill:
        video = ("synthesize-video", "street.avi", "--people", "12")
        if _start_program("upperson.cli", folder, "data", *video).wait(300):
            raise InputError((folder / "data.err").read_text())
    server = _start(folder, "serve", *common, "--port", "0", "--threads", "1")
    watcher = None
    try:
        began = time.monotonic()
        while (said := re.search(r"console: (\S+)/\n", (folder / "serve.out").read_text())) is None:
            if server.poll() is not None:
                raise InputError((folder / "serve.err").read_text())
            time.sleep(0.01)
        started_s = time.monotonic() - began
        idle_mb = _resident_mb(server.pid)
        first, alone, thumbnails = ask_alone(said[1])
        pages = open_pages(said[1])
        before_s = _processor_s(server.pid)
        added = gallery.count()
        load = Load(said[1], lambda: (_resident_mb(server.pid), gallery.count() - added))
        if fill:
            watching = [*common, "street.avi", "--detector", "street.json", "--every", "0"]
            watcher = _Watcher(folder, watching)
        asyncio.run(load.go(clients, seconds, watcher.keep_going if watcher else lambda: None))
        processor_s = _processor_s(server.pid) - before_s
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
        if watcher is not None:
            watcher.end()
    searches, statuses = load.seconds_of("search"), Counter(load.statuses)
    at = [load.samples[(len(load.samples) - 1) * part // 4] for part in _QUARTERS]
    return {
        "start to first answer (s)": round(started_s, 2),
        "first search, which loads towers and index (s)": round(first, 2),
        "one client: search p50 / p95 / p99 (ms)": quantiles(alone),
        "one client: thumbnail p50 / p95 / p99 (ms)": quantiles(thumbnails),
        "one client: other pages (ms)": pages,
        "answers": dict(sorted(statuses.items())),
        "searches a second": round(len(searches) / seconds, 1),
        "server's processor time a search, thumbnails included (ms)": round(
            1000 * processor_s / max(1, len(searches)), 1
        ),
        "search p50 / p95 / p99 (ms)": quantiles(searches),
        "thumbnail p50 / p95 / p99 (ms)": quantiles(load.seconds_of("picture")),
        "memory before anybody asked (MB)": idle_mb,
        "memory at the start, each quarter and the end of the load (MB)": [
            sample.memory_mb for sample in at
        ],
        "pictures kept ready then (MB)": [round(sample.kept_bytes / 1e6, 1) for sample in at],
        "rows added until then": [sample.rows for sample in at],
        "rows told to be in": 0 if watcher is None else watcher.committed,
        "exit code": code,
    }


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


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.console")

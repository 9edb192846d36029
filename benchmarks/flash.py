"""Bytes that a gallery writes to its disk for each row, from its insertion to its deletion.

Two counts: what this process sent to the disk (``/proc/self/io``), and what all processes and the
file system's journal wrote to the block device.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gallery_data import SyntheticPeople
from benchmarks.report import Column, conditions, print_report, table
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import print_note
from upperson_rt.errors import BackendError
from upperson_rt.gallery import Gallery, Item

_CAMERAS = 20
_OF_TRACK = 5
_ROUNDS = 20
_SEARCH_S = 5.0
_SECTOR_BYTES = 512
PHASES = ("insert", "prune", "close")
COLUMNS = {
    **{f"{phase} B/row": Column(phase, "{:.0f}") for phase in PHASES},
    "all B/row": Column("total", "{:.0f}"),
    "x row": Column("factor", "{:.1f}"),
    "device x row": Column("device_factor", "{:.1f}"),
}

app = new_app("Count the bytes that a gallery writes to flash.")


@app.command(cls=Command)
def flash(
    rows: Annotated[
        int, typer.Option("--rows", min=1000, help="Rows to add, and to delete.")
    ] = 100_000,
    dim: Annotated[int, typer.Option("--dim", min=2, help="Length of a vector.")] = 512,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Rows of a commit.", show_default="16, 2048"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            help="Where galleries are made for a while; must be on a disk.",
            show_default="the system's temporary folder",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Add rows to a gallery as 20 cameras do, and delete as many old ones as were added.

    The gallery has as many rows before, which are not counted. Searches beside keep its index
    up. A row is its float16 vector and its metadata. The device's count is right on a disk that
    nothing else writes to.

    Example: `python -m benchmarks.flash --rows 100000`
    """
    result = conditions("flash", "faiss-cpu", threads=None, batch_size=1, warmup=0)
    people, found = SyntheticPeople(2 * rows, dim), {}
    for size in batch or (16, 2048):
        print_note(f"{rows} rows, {size} a commit")
        with tempfile.TemporaryDirectory(prefix="upperson-bench-", dir=folder) as place:
            found[f"{size} rows a commit"] = measure(people, size, Path(place) / "gallery")
    result |= {"rows": rows, "dim": dim, "batches": found}
    row_bytes = next(iter(found.values()))["row_bytes"]
    facts = [f"{rows} rows of {row_bytes:.0f} bytes, from {_CAMERAS} cameras"]
    print_report(result, facts, [table("written", found, COLUMNS)])


def measure(people: SyntheticPeople, size: int, folder: Path) -> dict[str, Any]:
    """Return bytes a row of each of `PHASES`, their sum, and their ratios to the bytes of a row.

    Args:
        people: What to fill a gallery with; the first half is not counted.
        size: Rows of a commit.
        folder: Where; not there yet.
    """
    rows, row_bytes, values = people.rows // 2, 0, dict.fromkeys(PHASES, 0.0)
    with closing(Gallery.open(folder, "bench", people.dim, create=True)) as gallery:
        _add(gallery, people, 0, rows, 4096)
        gallery.search(people.vectors(0, 1), 10)
        meter = Meter(folder)
        for number in range(_ROUNDS):
            start, stop = (rows + rows * part // _ROUNDS for part in (number, number + 1))
            row_bytes += _add(gallery, people, start, stop, size)
            values["insert"] += meter.lap()
            gallery.prune(keep_newest=rows)
            values["prune"] += meter.lap()
    values["close"] += meter.lap()
    per_row = {name: value / rows for name, value in values.items()}
    row, total = 2 * people.dim + row_bytes / rows, sum(per_row.values())
    return per_row | {
        "row_bytes": row,
        "total": total,
        "factor": total / row,
        "device_factor": None if (device := meter.device_bytes()) is None else device / rows / row,
    }


def _add(gallery: Gallery, people: SyntheticPeople, start: int, stop: int, size: int) -> int:
    """Add rows in commits, and search now and then, as an operator does; return their bytes."""
    row_bytes, searched = 0, time.monotonic()
    for at in range(start, stop, size):
        items = list(_items(at, min(at + size, stop)))
        gallery.add(items, people.vectors(at, at + len(items)), "int8")
        row_bytes += sum(map(_text_bytes, items))
        if time.monotonic() - searched > _SEARCH_S:
            gallery.search(people.vectors(at, at + 1), 10)
            searched = time.monotonic()
    return row_bytes


class Meter:
    """Counts written bytes since it was made."""

    def __init__(self, folder: Path) -> None:
        device = os.stat(folder).st_dev
        self._device = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        os.sync()
        self._before, self._device_before = written_bytes(), self._sectors()

    def lap(self) -> int:
        """Return the bytes that this process wrote since the last call."""
        before, self._before = self._before, written_bytes()
        return self._before - before

    def device_bytes(self) -> int | None:
        """Return the bytes that all processes wrote to the device; None where there is none."""
        os.sync()
        after = self._sectors()
        if after is None or self._device_before is None:
            return None
        return (after - self._device_before) * _SECTOR_BYTES

    def _sectors(self) -> int | None:
        return int(self._device.read_text().split()[6]) if self._device.exists() else None


def written_bytes() -> int:
    """Return the bytes that this process has written to the disk."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError as error:
        raise BackendError(f"written bytes cannot be counted here: {error}") from error
    counts = dict(line.split(": ") for line in lines)
    return int(counts["write_bytes"]) - int(counts["cancelled_write_bytes"])


def _items(start: int, stop: int) -> Iterator[Item]:
    """Yield items as `watch` makes them: five pictures of a track, 20 cameras in turns."""
    for row in range(start, stop):
        camera, picture = f"camera-{row % _CAMERAS:02d}", row // _CAMERAS
        track = f"{camera}/20261130T080000-c0ffee/{picture // _OF_TRACK}"
        day, digits = row // 200_000, f"{row * 0x9E3779B97F4A7C15 % 2**64:016x}" * 2
        yield Item(
            key=f"{camera}|{track}|{picture}|10,20,74,212",
            source=f"rtsp://10.0.0.{row % _CAMERAS}/stream2#time=2026-11-30T09:33:57.123Z",
            camera=camera,
            time=1_790_000_000.0 + row / 2,
            track=track,
            box=(10, 20, 74, 212),
            crop=f"{camera}/2026-{day:05d}/{picture:06d}-123-{digits[:12]}.sha256-{digits}.jpg",
            attributes={"frame": picture, "sharpness": 81.5, "score": 0.8125},
        )


def _text_bytes(item: Item) -> int:
    texts = (item.key, item.source, item.camera, item.track, item.crop, item.attributes, item.box)
    return 8 + sum(len(str(text)) for text in texts)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.flash")

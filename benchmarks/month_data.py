"""Drawn rows of a month of cameras: embeddings as the demo has them, at any number and width.

A drawn person joins four people of the demo, each in a quarter of the dimensions and with less
weight than the one before, so that there are more people than the demo has. Pictures and sentences
of a person stay as far apart as the demo's are.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

import upperson_rt
from upperson_rt.gallery import Gallery, Item

CAMERAS = 20
CROPS = 5  # Of a track.
_PARTS = 4
_WEIGHTS = np.sqrt(np.array([0.64, 0.16, 0.12, 0.08], np.float32))
_TRACKS_A_DAY = 2000 * CAMERAS
_DAY_S = 86_400.0
_NOISE = 0.15
START_S = 1_790_035_200.0  # Midnight.

DemoFolder: TypeAlias = Annotated[
    Path, typer.Option("--demo", help="Folder that upperson demo wrote.")
]


class Month:
    """The same row has the same vector each time.

    Shapes: P people of the demo with V pictures each, and S sentences; D = 4 x the demo's width.
    """

    def __init__(self, demo: Path) -> None:
        """Read the pictures of the demo's test people, and embed their captions."""
        sentences: dict[str, list[str]] = {}
        (folder,) = (demo / "people").glob("street-*")
        for line in (folder / "annotations.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            if record["split"] == "test":
                sentences.setdefault(Path(record["image"]).name, []).append(record["caption"])
        encoder = upperson_rt.open(demo / "bundle", variant="fp32")
        vectors: dict[str, NDArray[np.float32]] = {}
        with Gallery.open(demo / "gallery") as gallery:
            for items, rows in gallery.vectors():
                vectors |= {Path(item.key).name: row for item, row in zip(items, rows, strict=True)}
        names = sorted(set(vectors) & set(sentences))
        people = sorted({name.split("_")[0] for name in names})
        self._pictures = np.stack(
            [
                [vectors[name] for name in names if name.startswith(f"{person}_")]
                for person in people
            ]
        )
        texts = [text for name in names for text in sentences[name]]
        embedded = encoder.encode_texts(texts)
        self._sentences = embedded.reshape(len(people), -1, embedded.shape[1])
        self.dim = _PARTS * embedded.shape[1]
        self._noise = np.float32(_NOISE / self.dim**0.5)

    def _join(
        self, source: NDArray[np.float32], people: NDArray[np.int64], which: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        parts = source[people, which] * _WEIGHTS[:, None]
        return _unit(parts.reshape(len(people), -1))

    def _people(self, tracks: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 4) the people that each track joins, the same each time."""
        return (
            _mixed(tracks[:, None] * _PARTS + np.arange(_PARTS)) % np.uint64(len(self._pictures))
        ).astype(np.int64)

    def vectors(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows start to stop as (N, D)."""
        rows = np.arange(start, stop)
        people = self._people(rows // CROPS)
        which = _mixed(
            rows.astype(np.uint64)[:, None] * np.uint64(7) + np.arange(4, dtype=np.uint64)
        )
        views = (which % np.uint64(self._pictures.shape[1])).astype(np.int64)
        noise = np.random.default_rng((1, start)).standard_normal((len(rows), self.dim), np.float32)
        found = self._join(self._pictures, people, views) + noise * np.float32(
            _NOISE / self.dim**0.5
        )
        return _unit(found)

    @staticmethod
    def items(start: int, stop: int) -> list[Item]:
        """Return the items of these rows: 2,000 tracks a camera and day, nine tenths by day."""
        rows = np.arange(start, stop)
        tracks = rows // CROPS
        cameras = (_mixed(tracks) % np.uint64(CAMERAS)).tolist()
        days, part = np.divmod(tracks / _TRACKS_A_DAY, 1)
        hours = np.interp(part, (0, 0.05, 0.95, 1), (0, 7, 21, 24))
        times = START_S + days * _DAY_S + hours * 3600 + rows % CROPS
        return [
            Item(
                key=f"rtsp://camera-{camera}#{row}",
                source=f"rtsp://camera-{camera}",
                camera=f"camera-{camera}",
                time=time,
                track=f"{track:08d}",
                box=(10, 20, 74, 212),
                attributes={"score": 0.5},
            )
            for row, track, camera, time in zip(
                rows.tolist(), tracks.tolist(), cameras, times.tolist(), strict=True
            )
        ]

    def queries(self, count: int, rows: int) -> NDArray[np.float32]:
        """Return (count, D) sentences, half of people among the rows, half of others."""
        rng = np.random.default_rng(2)
        tracks = rng.integers(0, rows // CROPS, count)
        tracks[count // 2 :] += 2**40
        which = rng.integers(0, self._sentences.shape[1], (count, 4))
        return self._join(self._sentences, self._people(tracks), which)

    def pictures(self, count: int, rows: int) -> NDArray[np.float32]:
        """Return (count, D) other pictures of people among the rows."""
        rng = np.random.default_rng(3)
        people = self._people(rng.integers(0, rows // CROPS, count))
        views = rng.integers(0, self._pictures.shape[1], people.shape)
        noise = rng.standard_normal((count, self.dim), np.float32)
        return _unit(self._join(self._pictures, people, views) + noise * self._noise)


def number_of(key: str) -> int:
    """Return the number of a drawn row by its key."""
    return int(key.rpartition("#")[2])


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _mixed(numbers: NDArray[Any]) -> NDArray[np.uint64]:
    """Splitmix64: numbers that look random, the same each time."""
    values = numbers.astype(np.uint64)
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))

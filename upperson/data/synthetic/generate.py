"""Data sets of synthetic people, on disk or in memory.

Every picture and every caption has a random stream of its own, derived from the seed, the split,
the person and the view, so that neither the order of the work nor its distribution over processes
matters. People do not depend on the look: with one seed, a studio and a street data set of equal
sizes show the same people.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from upperson.data.annotations import SPLITS, Split
from upperson.data.plain_formats import annotations_file
from upperson.data.synthetic.captions import describe
from upperson.data.synthetic.look import LOOKS, Camera, Look
from upperson.data.synthetic.people import Person, sample_people
from upperson.data.synthetic.render import render_person
from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import new_folder

_DOCUMENT = "dataset.json"

#: Rises whenever pictures or captions change, so that no stale data set is reused.
FORMAT = 1

_PEOPLE, _IMAGE, _CAPTION, _CAMERAS = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSpec:
    """What a data set consists of.

    Attributes:
        look: A key of `LOOKS`.
        train_ids: Number of people in the training split.
        val_ids: Number of people in the validation split.
        test_ids: Number of people in the test split.
        views: Pictures of every person.
        captions_per_image: Captions of every picture.
        seed: Any non-negative integer.

    Raises:
        UsageError: On construction, if a number is out of range or the look is unknown.
    """

    look: str
    train_ids: int
    val_ids: int
    test_ids: int
    views: int = 4
    captions_per_image: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.look not in LOOKS:
            raise UsageError(f"unknown look {self.look!r}; there are {', '.join(LOOKS)}")
        for name in ("train_ids", "val_ids", "test_ids", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("views", "captions_per_image"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")


def generate_people(spec: SyntheticSpec, split: Split) -> list[Person]:
    """Samples the people of a split, in the order of their numbers.

    The test people come first and do not depend on the other splits' sizes; the people of `val`
    and `train` are sampled so that nobody of an earlier split occurs among them.

    Args:
        spec: The data set; its look does not matter.
        split: Which people.

    Returns:
        The person at index ``i`` has the number ``first_pid(spec, split) + i``.
    """
    earlier: list[Person] = []
    for current, count in _sizes(spec).items():
        people = sample_people(
            count, _stream(spec, current, 0, 0, _PEOPLE), exclude=frozenset(earlier)
        )
        if current == split:
            return people
        earlier += people
    raise ValueError(f"unknown split {split!r}")


def first_pid(spec: SyntheticSpec, split: Split) -> int:
    """Returns the number of the first person of a split; numbers are unique in a data set."""
    first = 0
    for current, count in _sizes(spec).items():
        if current == split:
            return first
        first += count
    raise ValueError(f"unknown split {split!r}")


def iter_samples(
    spec: SyntheticSpec, split: Split, *, start: int = 0, stop: int | None = None
) -> Iterator[tuple[Image.Image, str, int]]:
    """Yields the samples of a split without touching the disk.

    Args:
        spec: The data set.
        split: The split.
        start: Index within the split of the first person, for sharing the work out.
        stop: Index after the last person, or None for all.

    Yields:
        An RGB image, one of its captions, and the person's number; an image with several captions
        comes several times. The pixels equal those of the file `write_dataset` would write.
    """
    for sample in _views(spec, split, start, stop):
        with Image.open(io.BytesIO(sample.jpeg)) as file:
            image = file.convert("RGB")
        for caption in sample.captions:
            yield image, caption, sample.pid


def write_dataset(
    root: Path, spec: SyntheticSpec, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Writes a data set, or finds it there already.

    The folder gets ``images/<split>/<pid>_<view>.jpg``, ``annotations.jsonl`` with one object per
    caption (``image``, ``pid``, ``caption``, ``split``, ``camera``), and ``dataset.json`` with the
    specification. It appears under its name only when it is complete.

    Args:
        root: The folder.
        spec: What to write.
        progress: Called after every picture with the number of pictures done and of all.

    Returns:
        ``root``.

    Raises:
        InputError: If ``root`` exists and is not this very data set, or cannot be written.
    """
    if not _is_written(root, spec):
        with new_folder(root) as folder:
            _write_content(folder, spec, progress)
    return root


@dataclass(frozen=True, slots=True)
class _View:
    pid: int
    view: int
    camera: str
    jpeg: bytes
    captions: list[str]


def _sizes(spec: SyntheticSpec) -> dict[Split, int]:
    # Test comes first: its people and numbers stay when more training people are asked for.
    return {"test": spec.test_ids, "val": spec.val_ids, "train": spec.train_ids}


def _stream(
    spec: SyntheticSpec, split: Split, pid: int, view: int, purpose: int, index: int = 0
) -> np.random.Generator:
    key = (SPLITS.index(split), pid, view, purpose, index)
    return np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=key))


def _views(
    spec: SyntheticSpec, split: Split, start: int = 0, stop: int | None = None
) -> Iterator[_View]:
    look = LOOKS[spec.look]
    first = first_pid(spec, split)
    for index, person in enumerate(generate_people(spec, split)[start:stop], start):
        pid = first + index
        for view in range(spec.views):
            camera = _camera(spec, look, split, pid, view)
            image = render_person(person, look, _stream(spec, split, pid, view, _IMAGE), camera)
            captions = [
                describe(person, look, _stream(spec, split, pid, view, _CAPTION, number))
                for number in range(spec.captions_per_image)
            ]
            yield _View(pid, view, camera.name, _encode(image, camera), captions)


def _camera(spec: SyntheticSpec, look: Look, split: Split, pid: int, view: int) -> Camera:
    # As many different cameras as there are: retrieval across cameras is the point.
    order = _stream(spec, split, pid, 0, _CAMERAS).permutation(len(look.cameras))
    return look.cameras[int(order[view % len(order)])]


def _encode(image: Image.Image, camera: Camera) -> bytes:
    buffer = io.BytesIO()
    # Every setting is written out, so that a change of Pillow's defaults changes no bytes.
    image.save(
        buffer,
        format="JPEG",
        quality=camera.jpeg_quality,
        subsampling="4:2:0",
        optimize=False,
        progressive=False,
    )
    return buffer.getvalue()


def _document(spec: SyntheticSpec) -> dict[str, object]:
    return {"format": FORMAT, "spec": dataclasses.asdict(spec)}


def _is_written(root: Path, spec: SyntheticSpec) -> bool:
    if not root.exists():
        return False
    try:
        found: Mapping[str, object] = json.loads((root / _DOCUMENT).read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{root} exists and is not a synthetic data set (no readable {_DOCUMENT} in it): "
            "choose another folder"
        ) from None
    if found != _document(spec):
        raise InputError(
            f"{root} holds another data set than asked for, {found}: choose another folder, or "
            "delete this one"
        )
    return True


def _write_content(
    root: Path, spec: SyntheticSpec, progress: Callable[[int, int], None] | None
) -> None:
    total = sum(_sizes(spec).values()) * spec.views
    done = 0
    path = root / annotations_file("jsonl")
    with path.open("w", encoding="utf-8", newline="\n") as annotations:
        for split in SPLITS:
            (root / "images" / split).mkdir(parents=True)
            for sample in _views(spec, split):
                name = f"images/{split}/{sample.pid:05d}_{sample.view}.jpg"
                (root / name).write_bytes(sample.jpeg)
                for caption in sample.captions:
                    record = {
                        "image": name,
                        "pid": sample.pid,
                        "caption": caption,
                        "split": split,
                        "camera": sample.camera,
                    }
                    annotations.write(json.dumps(record) + "\n")
                done += 1
                if progress is not None:
                    progress(done, total)
    (root / _DOCUMENT).write_text(json.dumps(_document(spec), indent=2) + "\n", "utf-8")

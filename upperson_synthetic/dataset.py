"""Data sets of synthetic people, on disk or in memory.

Every picture and every caption has a random stream of its own, derived from the seed, the split,
the person and the view, so that neither the order of the work nor its distribution over processes
matters. People do not depend on the look, but for the things of a site: with one seed, a studio
and a street data set of equal sizes show the same people.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import all_names, new_folder
from upperson_rt.strict import read_json
from upperson_synthetic.captions import describe
from upperson_synthetic.look import LOOKS
from upperson_synthetic.people import Person, equip, sample_people
from upperson_synthetic.scene import encode_jpeg, render_person

FORMAT = 3
"""Rises whenever pictures, captions or attributes change, so that no stale set is reused."""

_DOCUMENT = "dataset.json"
_IMAGES = "images"

# Parts and file of the data set format ``jsonl``, see docs/reference/formats.md.
Split: TypeAlias = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = get_args(Split)
_ANNOTATIONS = "annotations.jsonl"
_ORDER: tuple[Split, ...] = ("test", "val", "train")
"""Test comes first: its people and numbers do not depend on the training size."""

_PEOPLE, _IMAGE, _CAPTION, _CAMERAS, _THINGS = range(5)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSpec:
    """What a data set consists of.

    Raises:
        UsageError: On construction, if a number is out of range or the look is unknown.
    """

    look: str  # A key of `LOOKS`.
    train_ids: int  # Number of people in the training split.
    val_ids: int
    test_ids: int

    views: int = 4  # Pictures of every person.
    captions_per_image: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.look not in LOOKS:
            raise UsageError(
                f"unknown look {self.look!r}; there are {', '.join(LOOKS)}",
                code="setting_out_of_range",
                setting="look",
            )
        for name in ("train_ids", "val_ids", "test_ids", "seed", "views", "captions_per_image"):
            least = 1 if name in {"views", "captions_per_image"} else 0
            if (value := getattr(self, name)) < least:
                raise UsageError(
                    f"{name} must be at least {least}, found {value}",
                    code="setting_out_of_range",
                    setting=name,
                )

    def people(self, split: Split) -> int:
        """Return the number of people in a split."""
        count: int = getattr(self, f"{split}_ids")
        return count

    def first_pid(self, split: Split) -> int:
        """Return the number of the first person of a split; numbers are unique in a data set."""
        return sum(self.people(earlier) for earlier in _ORDER[: _ORDER.index(split)])


def generate_people(spec: SyntheticSpec, split: Split) -> list[Person]:
    """Sample the people of a split; their numbers begin with ``spec.first_pid(split)``.

    No person of an earlier split is among them. The look matters for the things of a site alone.
    """
    things = LOOKS[spec.look].things
    equipped: list[Person] = []
    people: list[Person] = []
    earlier: list[Person] = []
    for current in _ORDER[: _ORDER.index(split) + 1]:
        rng = _stream(spec, current, 0, 0, _PEOPLE)
        people = sample_people(spec.people(current), rng, exclude=frozenset(earlier))
        equipped = people
        if things:
            rng = _stream(spec, current, 0, 0, _THINGS)
            equipped = equip(people, things, rng, exclude=earlier)
        earlier += people if people is equipped else [*people, *equipped]
    return equipped


def iter_samples(
    spec: SyntheticSpec, split: Split, *, start: int = 0, stop: int | None = None
) -> Iterator[tuple[Image.Image, str, int]]:
    """Yield (RGB image, caption, number of the person) without touching the disk.

    An image with several captions comes several times. The pixels equal those of the file that
    `write_dataset` would write. ``start`` and ``stop`` bound the people of the split by their
    index in it, for sharing the work out.
    """
    for view in _views(spec, split, start, stop):
        with JpegImageFile(io.BytesIO(view.jpeg)) as file:
            image = file.convert("RGB")
        for caption in view.captions:
            yield image, caption, view.pid


def write_dataset(
    root: Path,
    spec: SyntheticSpec,
    progress: Callable[[int, int], None] | None = None,
    *,
    replace_older: bool = False,
) -> Path:
    """Write a data set, or find it there already, and return its folder.

    The folder gets ``images/<split>/<pid>_<view>.jpg``, ``annotations.jsonl`` with one object per
    caption (``image``, ``pid``, ``caption``, ``split``, ``camera``, and ``attributes``, which are
    the fields of `Person`), and ``dataset.json`` with the specification. It appears under its name
    only when it is complete.

    Args:
        root: The folder.
        spec: What to render.
        progress: Called after every picture with the number of pictures done and of all.
        replace_older: Whether to replace what an earlier version made of the same specification,
            unless something else lies there, too.

    Raises:
        InputError: ``root`` exists and is not this very data set, or cannot be written.
    """
    found = _written_format(root, spec)
    if found == FORMAT:
        return root
    if found is not None and not (replace_older and found < FORMAT):
        raise InputError(
            f"{root} holds this data set as another version made it (format {found}, this version "
            f"makes {FORMAT}): delete it to have it rendered anew, or choose another folder",
            code="dataset_of_another_version",
            path=root,
            found=found,
            expected=FORMAT,
        )
    with new_folder(root, all_names if found is None else _unowned) as folder:
        _write_content(folder, spec, progress)
    return root


@dataclass(frozen=True, slots=True)
class _View:
    """One picture of one person, as it is written."""

    pid: int
    person: Person
    number: int
    camera: str
    jpeg: bytes
    captions: list[str]


def _stream(
    spec: SyntheticSpec, split: Split, pid: int, view: int, purpose: int, index: int = 0
) -> np.random.Generator:
    key = (_SPLITS.index(split), pid, view, purpose, index)
    return np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=key))


def _views(
    spec: SyntheticSpec, split: Split, start: int = 0, stop: int | None = None
) -> Iterator[_View]:
    look = LOOKS[spec.look]
    for index, person in enumerate(generate_people(spec, split)[start:stop], start):
        pid = spec.first_pid(split) + index
        # As many different cameras as there are: retrieval across cameras is the point.
        order = _stream(spec, split, pid, 0, _CAMERAS).permutation(len(look.cameras))
        for view in range(spec.views):
            camera = look.cameras[int(order[view % len(order)])]
            image = render_person(person, look, _stream(spec, split, pid, view, _IMAGE), camera)
            captions = [
                describe(person, look, _stream(spec, split, pid, view, _CAPTION, number))
                for number in range(spec.captions_per_image)
            ]
            yield _View(pid, person, view, camera.name, encode_jpeg(image, camera), captions)


def _document(spec: SyntheticSpec) -> dict[str, object]:
    return {"format": FORMAT, "spec": dataclasses.asdict(spec)}


def _written_format(root: Path, spec: SyntheticSpec) -> int | None:
    """Return the format of the data set that is there; None for nothing."""
    if not root.exists():
        return None
    try:
        found = read_json(root / _DOCUMENT)
    except InputError:
        raise InputError(
            f"{root} exists and is not a synthetic data set (no readable {_DOCUMENT} in it): "
            "choose another folder",
            code="not_synthetic",
            path=root,
        ) from None
    made = found.get("format") if isinstance(found, dict) else None
    if not isinstance(made, int) or found != _document(spec) | {"format": made}:
        differences = _differences(found, spec)
        raise InputError(
            f"{root} holds another data set{differences}: choose another folder, or "
            "delete this one",
            code="another_dataset",
            path=root,
            differences=differences,
        )
    return made


def _unowned(root: Path) -> set[str]:
    """Return what a folder holds beside a data set."""
    return set(all_names(root)) - {_DOCUMENT, _ANNOTATIONS, _IMAGES}


def _differences(found: object, spec: SyntheticSpec) -> str:
    """Return what differs, such as ``: train_ids is 40, not 500``; empty if unknown."""
    there = found.get("spec") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        return ""
    differing = [
        f"{name} is {there[name]}, not {value}"
        for name, value in dataclasses.asdict(spec).items()
        if name in there and there[name] != value
    ]
    return f" ({'; '.join(differing)})" if differing else ""


def _write_content(
    root: Path, spec: SyntheticSpec, progress: Callable[[int, int], None] | None
) -> None:
    total = sum(spec.people(split) for split in _SPLITS) * spec.views
    done = 0
    path = root / _ANNOTATIONS
    with path.open("w", encoding="utf-8", newline="\n") as annotations:
        for split in _SPLITS:
            (root / _IMAGES / split).mkdir(parents=True)
            for view in _views(spec, split):
                name = f"{_IMAGES}/{split}/{view.pid:05d}_{view.number}.jpg"
                (root / name).write_bytes(view.jpeg)
                truth = dataclasses.asdict(view.person)
                for caption in view.captions:
                    record = {
                        "image": name,
                        "pid": view.pid,
                        "caption": caption,
                        "split": split,
                        "camera": view.camera,
                        "attributes": truth,
                    }
                    annotations.write(json.dumps(record) + "\n")
                done += 1
                if progress is not None:
                    progress(done, total)
    (root / _DOCUMENT).write_text(json.dumps(_document(spec), indent=2) + "\n", "utf-8")

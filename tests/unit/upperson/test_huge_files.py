"""Files that would fill the memory are refused before they do."""

import json
import os
import resource

import pytest

from upperson.config import read_recipe
from upperson.data.annotations import open_plain_format
from upperson.data.records import read_dataset
from upperson_camera.detectors.naming import BoxesFile
from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded
from upperson_rt.strict import read_json

SPARSE_BYTES = 20_000_000_000
MOST_BYTES = 64 << 20


def sparse(path, start=b""):
    """Write a file of which only its beginning takes room on the disk."""
    path.write_bytes(start)
    os.truncate(path, SPARSE_BYTES)
    return path


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_lines_may_be_long_but_not_without_an_end(tmp_path):
    path = tmp_path / "annotations.jsonl"
    entry = {"image": "a.png", "pid": 1, "caption": "A person. " * 100_000}
    path.write_text(json.dumps(entry) + "\n")
    (found,) = open_plain_format("jsonl", tmp_path).entries
    assert len(found.captions[0]) == 1_000_000
    sparse(path, json.dumps(entry | {"caption": "A person."}).encode() + b"\n")
    before = peak_bytes()
    with pytest.raises(InputError, match="line 2"):
        list(open_plain_format("jsonl", tmp_path).entries)
    assert peak_bytes() - before < MOST_BYTES


def test_a_file_that_is_read_as_a_whole_has_a_largest_size(tmp_path):
    before = peak_bytes()
    for name, read in {
        "annotations.csv": lambda path: open_plain_format("csv", path.parent),
        "a.json": read_json,
        "a.yaml": lambda path: read_recipe(str(path), {}),
        "boxes.json": BoxesFile,
        "reid_raw.json": lambda path: read_dataset("cuhk-pedes", path.parent),
    }.items():
        with pytest.raises(InputError):
            read(sparse(tmp_path / name))
    with pytest.raises(InputError):
        read_bounded("/dev/zero", 1 << 20)
    assert peak_bytes() - before < MOST_BYTES

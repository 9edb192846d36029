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


def test_a_line_without_an_end_is_refused_with_its_number(tmp_path):
    entry = {"image": "a.png", "pid": 1, "caption": "A person."}
    sparse(tmp_path / "annotations.jsonl", json.dumps(entry).encode() + b"\n")
    before = peak_bytes()
    with pytest.raises(InputError, match="line 2"):
        list(open_plain_format("jsonl", tmp_path).entries)
    assert peak_bytes() - before < MOST_BYTES


def test_a_device_without_an_end_is_refused() -> None:
    with pytest.raises(InputError):
        read_bounded("/dev/zero", 1 << 20)


def test_a_line_may_be_long(tmp_path):
    entry = {"image": "a.png", "pid": 1, "caption": "A person. " * 100_000}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(entry) + "\n")
    (found,) = open_plain_format("jsonl", tmp_path).entries
    assert len(found.captions[0]) == 1_000_000


def test_a_file_that_is_read_as_a_whole_has_a_largest_size(tmp_path):
    before = peak_bytes()
    with pytest.raises(InputError):
        open_plain_format("csv", sparse(tmp_path / "annotations.csv").parent)
    with pytest.raises(InputError):
        read_json(sparse(tmp_path / "a.json"))
    with pytest.raises(InputError):
        read_recipe(str(sparse(tmp_path / "a.yaml")), {})
    with pytest.raises(InputError):
        BoxesFile(sparse(tmp_path / "boxes.json"))
    (tmp_path / "imgs").mkdir()
    sparse(tmp_path / "reid_raw.json")
    with pytest.raises(InputError):
        read_dataset("cuhk-pedes", tmp_path)
    assert peak_bytes() - before < MOST_BYTES

"""Files that would fill the memory are refused before they do, and links to secrets unquoted."""

import json
import os
import resource

import pytest

from upperson.config import TrainConfig, read_yaml
from upperson.data.annotations import open_plain_format
from upperson.data.records import read_dataset
from upperson_camera.detectors.naming import BoxesFile
from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded
from upperson_rt.preprocess import load_image
from upperson_rt.strict import read_json

SPARSE_BYTES = 20_000_000_000
MOST_BYTES = 64 << 20
WHOLE = {
    "annotations.csv": lambda path: read_dataset("csv", path.parent),
    "reid_raw.json": lambda path: read_dataset("cuhk-pedes", path.parent),
    "config.yaml": lambda path: read_yaml(TrainConfig, path),
    "users.json": read_json,
    "boxes.json": BoxesFile,
}
"""Readers of files that are read as a whole."""

READERS = WHOLE | {
    "a.png": load_image,
    "annotations.jsonl": lambda path: read_dataset("jsonl", path.parent),
}
SECRETS = (
    "root:$y$SECRET:19000:0:99999:7:::\ndaemon:*:SECRET:0:99999:7:::\n",
    "SECRET=x\nSECRET: b: c\n",
    "- SECRET: [SECRET\n",
    "a: *SECRET\n",
    "a: !SECRET b\n",
    "SECRET,SECRET\n1,2\n",
    "[SECRET]\nSECRET = 1\n",
)


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
    for name, read in WHOLE.items():
        with pytest.raises(InputError):
            read(sparse(tmp_path / name))
    with pytest.raises(InputError):
        read_bounded("/dev/zero", 1 << 20)
    assert peak_bytes() - before < MOST_BYTES


@pytest.mark.parametrize("name", READERS)
def test_no_word_of_a_linked_file_is_in_the_message(tmp_path, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    for secret in SECRETS:
        (tmp_path / "elsewhere").write_text(secret)
        with pytest.raises(InputError) as caught:
            READERS[name](tmp_path / "set" / name)
        message = str(caught.value).replace(str(tmp_path), "")
        assert "SECRET" not in message
        assert "root:" not in message

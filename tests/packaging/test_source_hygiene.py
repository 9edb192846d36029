import re

from tests.helpers.command_line import ROOT, SOURCES

FOLDERS = [
    ROOT / "upperson",
    ROOT / "benchmarks",
    *(source for source in SOURCES if source != ROOT),
]
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
MOST_LINES = 600
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "misc", "tools", "util", "utils"}


def test_no_source_file_is_too_long():
    assert len(FILES) > 100
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_source_files_are_named_after_what_they_do():
    assert [path for path in FILES if path.stem in VAGUE_NAMES] == []


def test_picture_files_are_opened_in_one_place():
    """The linter refuses Pillow's `open`; OpenCV, torchvision and matplotlib open pictures, too."""
    opening = re.compile(r"\bImage\.open\(|\b(?:imread|imreadmulti|imdecode|read_image)\(")
    assert [path for path in FILES if opening.search(path.read_text("utf-8"))] == []

"""The Python of the pages about the runtime runs as it stands."""

import re
import runpy
import sys

import pytest

from tests.helpers.command_line import ROOT
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.gallery import Gallery


def run_page(name, **names):
    """Return how many blocks of a page ran, in order, and the names they leave."""
    page = (ROOT / "docs/how-to" / name).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
    return len(blocks), names


def test_the_page_of_the_runtime(tmp_path, monkeypatch, capsys):
    make_toy_bundle(tmp_path / "bundle")
    (tmp_path / "crops").mkdir()
    for colour in COLOURS:
        draw_person(tmp_path / "crops" / f"{colour}.jpg", colour)
    monkeypatch.chdir(tmp_path)
    count, names = run_page("embed.md")
    assert count == 6
    assert capsys.readouterr().out.startswith(f"{len(COLOURS)} [(")
    assert len(names["hits"]) == 3
    assert (len(names["found"].hits), names["found"].verdict.word) == (3, "uncalibrated")
    assert len((tmp_path / "queries.jsonl").read_text().splitlines()) == 3


def test_the_page_of_galleries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count, _ = run_page("gallery.md")
    assert count == 5
    with Gallery.open("gallery") as gallery:
        assert gallery.count() == 600 - 100 - 1 - 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "gallery"]


def test_the_page_of_milvus(tmp_path):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    count, names = run_page("milvus.md", folder=tmp_path)
    assert count == 1
    assert names["gallery"].location == f"milvus://{tmp_path}/people.db/people"


@pytest.mark.parametrize("name", ["gstreamer_source", "index_on_ray", "opencv_loop"])
def test_examples_print_their_usage(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *["a"] * 9])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"docs/examples/{name}.py"), run_name="__main__")
    assert str(ended.value).startswith(f"usage: {name}.py ")

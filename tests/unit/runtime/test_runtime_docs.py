"""The Python of docs/runtime.md runs as it stands."""

import re

from tests.helpers.command_line import ROOT
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    make_toy_bundle(tmp_path / "bundle")
    (tmp_path / "crops").mkdir()
    for colour in COLOURS:
        draw_person(tmp_path / "crops" / f"{colour}.png", colour)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "runtime.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"block {number}", "exec"), names)
    assert capsys.readouterr().out.startswith(f"{len(COLOURS)} [(")
    assert len(names["hits"]) == 3
    assert len((tmp_path / "asked.jsonl").read_text().splitlines()) == 3

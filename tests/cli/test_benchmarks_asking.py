"""``python -m benchmarks.asking`` on the quick demo."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import asking
from benchmarks.marks import people_of
from upperson_rt.phrases import parse
from upperson_rt.phrases.evidence import paraphrases


@pytest.fixture(scope="module")
def command(demo_folder: Path) -> list[str]:
    options = ["-b", demo_folder / "bundle", "-g", demo_folder / "gallery"]
    return [*map(str, options), "--root", str(demo_folder / "people"), "--queries", "3"]


def test_every_number_of_wordings_is_ranked_and_timed(demo_folder, command):
    result = CliRunner().invoke(asking.app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    ways = found["by_wordings"]
    assert list(ways) == ["1", "2", "4", "8", "16"]
    assert found["query_ms"].keys() == {*ways, *asking.DENIALS}
    assert min(found["query_ms"].values()) > 0
    asked = [{length: row["questions"] for length, row in way.items()} for way in ways.values()]
    assert asked == [asked[0]] * 5
    people = people_of(demo_folder / "bundle", str(demo_folder / "gallery"), demo_folder / "people")
    assert asked[0]["as written"] == len(people.captions)
    one = 100 / len(people.captions)  # Batches of another size round otherwise: one may differ.
    assert r1(people, 4) == pytest.approx(ways["4"]["as written"]["R@1"], abs=1.1 * one)


def r1(people, count):
    """Return R@1 of all captions, each the mean of its wordings, one after the other."""
    right = []
    for pid, caption in people.captions:
        texts_TD = people.encoder.encode_texts(paraphrases(parse(caption), count))
        best = (people.vectors_ND @ texts_TD.mean(axis=0)).argmax()
        right.append(people.pids_N[best] == pid)
    return 100 * float(np.mean(right))


def test_people_get_tables(command):
    result = CliRunner().invoke(asking.app, command)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "R@1: things 1 2 4 8 16" in lines
    assert "wordings ms a query times" in lines
    (plain,) = (line for line in lines if line.startswith("1 ") and line.endswith("x"))
    assert plain.endswith(" 1.00x")

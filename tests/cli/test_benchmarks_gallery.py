"""``python -m benchmarks.gallery`` on small galleries."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import gallery
from benchmarks.gallery_data import SyntheticPeople, without_checksums
from upperson_rt.gallery import Filter, Gallery


def run(folder, *arguments):
    options = ("--dim", "32", "--seconds", "0.05", "--folder", folder, *arguments)
    return CliRunner().invoke(gallery.app, [*map(str, options)])


def test_adding_and_searching_are_measured_beside_the_engines_below(tmp_path):
    result = run(tmp_path, "--rows", "1500", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["benchmark"], found["rows"], found["dim"], found["k"]) == (
        "gallery",
        1500,
        32,
        10,
    )
    assert found["recall_at_10"] == 1.0
    assert list(found["batch"]) == ["gallery", "faiss flat fp16 alone"]
    assert found["single"]["gallery"]["ratio"] == 1
    others = {"faiss flat fp16 alone", "no checksums", "no checksums, one camera"}
    assert others < set(found["single"])
    assert 0 <= found["database_bytes"] - found["database_without_checksums_bytes"] < 1500 * 100
    assert [one["rows_per_commit"] for one in found["insertions"]] == [256, 1]
    assert sum(one["rows"] for one in found["insertions"]) == 1500
    for one in found["insertions"]:
        assert one["rows_per_s"] == pytest.approx(one["rows"] / one["seconds"])
    start = found["start"]
    assert 0 < start["open_s"] < 60
    assert start["first_search_s"] > 0
    assert start["peak_rss_bytes"] is None or start["peak_rss_bytes"] > 10e6
    assert "gallery, one camera (1 %)" in result.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_approximate_index_is_compared_with_itself_and_what_it_misses_is_counted(
    tmp_path, monkeypatch
):
    """Recall comes from comparing answers: one list of many finds little."""
    from upperson_rt.gallery.sqlite import segments

    monkeypatch.setattr("upperson_rt.gallery.sqlite.index.APPROXIMATE_FROM", 1000)
    monkeypatch.setattr(segments, "_NPROBES", (1,))
    result = run(tmp_path, "--rows", "2000", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "faiss IVF-SQ8 alone" in found["single"]
    assert 0.05 < found["recall_at_10"] < 0.95
    assert found["index"]["kind"] == "ivf-sq8"
    assert abs(found["recall_at_10"] - found["index"]["recall_at_10"]) < 0.25
    assert "making the index" in result.stderr


@pytest.mark.parametrize("rows", [1000, 9000], ids=["without a file", "with a file"])
def test_bare_faiss_finds_the_same_pictures(tmp_path, rows):
    people = SyntheticPeople(rows, 16)
    with Gallery.open(tmp_path / "gallery", "bench", 16, create=True) as store:
        store.add(people.items(0, rows), people.vectors(0, rows))
        queries = people.queries(5)
        expected = [[int(hit.item.key) for hit in hits] for hits in store.search(queries, 10)]
        name, search = gallery.bare_faiss(store)
        _, found = search(queries)
    assert (tmp_path / "gallery" / "gallery.index").exists() == (rows > 8192)
    assert name == "faiss flat fp16 alone"
    assert found.tolist() == expected


def test_a_copy_without_checksums_gives_the_same_answers(tmp_path):
    people = SyntheticPeople(1000, 16)
    queries = people.queries(5)
    with Gallery.open(tmp_path / "gallery", "bench", 16, create=True) as store:
        store.add(people.items(0, 1000), people.vectors(0, 1000))
        copy = without_checksums(tmp_path / "gallery", tmp_path / "copy")
        with Gallery.open(copy) as without:
            assert (store.info().schema_version, without.info().schema_version) == (3, 2)
            for where in (None, Filter(camera="camera-7")):
                found, expected = (one.search(queries, 10, where) for one in (without, store))
                assert found == expected


def test_numbers_out_of_range_are_refused(tmp_path):
    for wrong in (("--rows", "999"), ("--dim", "1"), ("--seconds", "inf"), ("--seconds", "-1")):
        result = run(tmp_path, *wrong)
        assert result.exit_code == 2, wrong
        assert result.stdout == ""

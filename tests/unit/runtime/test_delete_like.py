import json
from pathlib import Path

import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS, draw_person
from upperson_log.query_log import QueryLog
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.ingest.files import index_images
from upperson_rt.retriever import Retriever


@pytest.fixture
def gallery(tmp_path, encoder):
    """Six colours and three more in red at the gate, one in red in the hall."""
    space = encoder.fingerprint, encoder.embed_dim
    pictures = [draw_person(tmp_path / f"{colour}.png", colour) for colour in COLOURS]
    twins = [draw_person(tmp_path / f"twin{i}.png", "red", seed=i) for i in range(1, 4)]
    with Gallery.open(tmp_path / "gallery", *space, create=True) as store:
        index_images(encoder, store, [*pictures, *twins], camera="gate")
        index_images(encoder, store, [draw_person(tmp_path / "hall.png", "red")], camera="hall")
        yield store


def test_what_looks_alike_goes_after_a_dry_run(encoder, gallery, tmp_path, monkeypatch):
    log = QueryLog(tmp_path / "asked.log", user="officer")
    retriever = Retriever(encoder, gallery, log)
    red, at_gate = tmp_path / "red.png", Filter(camera="gate")
    ranked = retriever.query(red, k=20, where=at_gate)
    least = next(hit.score for hit in ranked if Path(hit.item.source).stem == "twin1") - 1e-3
    alike = [(hit.id, hit.item.key) for hit in ranked if hit.score >= least]
    assert {str(red), str(tmp_path / "twin1.png")} <= {key for _, key in alike}

    # An approximate index may miss what has to go.
    monkeypatch.setattr(type(gallery), "search", lambda *_, **__: pytest.fail("asks the index"))
    seen = retriever.delete_like(red, least, at_gate, dry_run=True)
    assert sorted((hit.id, hit.item.key) for hit in seen) == sorted(alike)
    scores = [hit.score for hit in seen]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([hit.score for hit in ranked[: len(alike)]], abs=2e-3)
    assert gallery.count() == len(COLOURS) + 4

    assert retriever.delete_like(str(red), least, at_gate) == seen
    assert gallery.count() == len(COLOURS) + 4 - len(alike)
    assert gallery.count(Filter(camera="hall")) == 1
    assert retriever.delete_like(red, least, at_gate) == []

    lines = [json.loads(line) for line in (tmp_path / "asked.log").read_text().splitlines()]
    actions = ["query", "dry run of delete_like", "delete_like", "delete_like"]
    assert [line["action"] for line in lines] == actions
    assert lines[2]["ids"] == [hit.id for hit in seen]
    assert lines[2]["picture"]["file"] == str(red)
    log.close()
    with refused("log_unwritable", InputError):
        retriever.delete_like(tmp_path / "hall.png", -1.0)
    for score in (1.5, -1.5, float("nan")):
        with refused("out_of_range", UsageError, what="min_score"):
            retriever.delete_like(tmp_path / "hall.png", score)
    assert gallery.count() == len(COLOURS) + 4 - len(alike)


def test_what_goes_meanwhile_is_no_error(encoder, gallery, tmp_path, monkeypatch):
    vectors = type(gallery).vectors

    def another_process_deletes(self, where=None, batch_size=1024):
        found = list(vectors(self, where, batch_size))
        self.delete([str(tmp_path / "red.png")])
        yield from found

    monkeypatch.setattr(type(gallery), "vectors", another_process_deletes)
    gone = Retriever(encoder, gallery).delete_like(tmp_path / "hall.png", 0.9999)
    sources = {Path(hit.item.source).name for hit in gone}
    assert ("hall.png" in sources, "red.png" in sources) == (True, False), "the same picture"

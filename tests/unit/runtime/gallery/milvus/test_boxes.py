"""Several boxes that watch into one collection; `tests.helpers.boxes` tries it again and again."""

import random

import pytest

from tests.helpers import boxes
from tests.helpers.boxes import Box
from tests.helpers.gallery_places import some_vectors
from upperson_camera.commit import OtherWriters
from upperson_camera.stats import Counters
from upperson_rt.gallery import Filter, Gallery, Item

pytestmark = pytest.mark.timeout(180, func_only=True)  # Four processes, and a server's restart.


@pytest.fixture
def places(server_place, shared_server):
    """What the commands on two boxes begin with, and the collection as each of them sees it."""
    if (reason := boxes.reason_to_skip()) is not None:
        pytest.skip(reason)
    collection = server_place.unused().rpartition("/")[2]
    joined = [shared_server.network.join(f"box{number}") for number in range(2)]
    # A busy machine may take longer than the usual 30 s to start a server.
    return [(inside, f"milvus://{address}/{collection}?timeout=120") for inside, address in joined]


def test_a_box_and_the_server_are_killed(places, server_place, shared_server, tmp_path):
    boxes.prepare(tmp_path)
    watching = [
        Box(inside, tmp_path, location, camera)
        for (inside, location), camera in zip(places, ("gate", "hall"), strict=True)
    ]
    for box in watching:
        box.wait_for(1)
    seen_here = f"{server_place.address}/{places[0][1].rpartition('/')[2]}"
    with Gallery.open(seen_here) as reader:
        outcomes = list(boxes.trial(shared_server.server, reader, watching, random.Random(0)))
    assert outcomes == ["the other box ended with exit code 0"]
    with Gallery.open(seen_here) as gallery:
        assert list(boxes.problems(gallery, watching)) == []
        for box in watching:
            assert gallery.count(Filter(camera=box.camera)) >= len(box.acknowledged()) > 0


def test_a_camera_of_the_same_name_on_another_box_is_told(server_place):
    location = server_place.empty()
    counters = Counters()
    with server_place.open(location) as ours, server_place.open(location) as theirs:
        theirs.add([Item(key="before", camera="gate")], some_vectors(1))
        others = OtherWriters(ours, counters)
        items = [Item(key=f"ours {n}", camera="gate") for n in range(3)]
        others.count_existing(["gate"])
        others.count_ours(items, ours.add(items, some_vectors(3)))
        others.check()
        assert counters.of("gate")["added_by_others"] == 0
        theirs.add([Item(key=f"theirs {n}", camera="gate") for n in range(5)], some_vectors(5))
        theirs.add([Item(key="another camera's", camera="hall")], some_vectors(1))
        others.check()
        assert counters.of("gate")["added_by_others"] == 5
        others.count_ours(items, ours.add(items, some_vectors(3)))
        others.check()
    assert counters.of("gate") == {"added_by_others": 5, "replaced": 3}

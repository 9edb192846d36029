"""Several boxes that watch into one collection; `tests.helpers.boxes` tries it again and again."""

import random

import pytest

from tests.helpers import boxes
from tests.helpers.boxes import Box
from upperson_rt.gallery import Filter, Gallery

pytestmark = pytest.mark.timeout(180)  # Four processes, and a server's restart.


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

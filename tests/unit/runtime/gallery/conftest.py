"""Where the tests of galleries keep them: folders, memory, milvus-lite, and a Milvus server.

The server costs 40 % of a core while it idles, so it runs only while its tests do: those come first
in the whole run, where no other worker steals them, and after the last of them in a row it stops.
"""

import pytest
from filelock import FileLock

from tests.helpers import milvus_server
from tests.helpers.extensions import examples
from tests.helpers.gallery_places import Milvus, Place


def needs_server(item):
    place = item.callspec.params.get("place") if hasattr(item, "callspec") else None
    return place == "milvus-server" or "server_place" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not needs_server(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    try:
        return (yield)
    finally:
        server = item.config.stash.get(SERVER, None)
        if server is not None and (nextitem is None or not needs_server(nextitem)):
            server.stop()


class SharedServer:
    """The server of one worker; another worker that needs one waits until this is stopped."""

    def __init__(self, folder, binaries, lock):
        self.server = milvus_server.MilvusServer(folder, binaries)
        address = f"127.0.0.1:{self.server.port}"
        self.place = Milvus(f"milvus://{address}", f"http://{address}")
        self._lock = lock

    def start(self):
        if self._lock.is_locked:
            return
        self._lock.acquire()
        try:
            self.server.start()
        except BaseException:
            self._lock.release()
            raise

    def stop(self):
        if self._lock.is_locked:
            self.server.kill()
            self._lock.release()


SERVER = pytest.StashKey[SharedServer]()


@pytest.fixture(params=["sqlite", "memory", "milvus-lite", "milvus-server"])
def place(request, tmp_path):
    """Every store in turn."""
    if request.param == "sqlite":
        return Place(f"{tmp_path}/")
    return request.getfixturevalue(f"{request.param.removeprefix('milvus-')}_place")


@pytest.fixture
def memory_place(tmp_path):
    """The store of docs/examples/extensions."""
    with examples(tmp_path):
        yield Place("memory://contract_")


@pytest.fixture
def gallery(place):
    with place.open(place.empty()) as opened:
        yield opened


@pytest.fixture
def server_place(shared_server):
    shared_server.start()
    return shared_server.place


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory, pytestconfig, worker_id):
    reason = milvus_server.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    own = tmp_path_factory.getbasetemp()
    lock = FileLock((own if worker_id == "master" else own.parent) / "milvus-server.lock")
    binaries = pytestconfig.cache.mkdir("milvus-server")
    server = SharedServer(tmp_path_factory.mktemp("milvus") / "data", binaries, lock)
    pytestconfig.stash[SERVER] = server
    yield server
    server.stop()
    server.server.close()


@pytest.fixture(scope="session")
def lite_place(tmp_path_factory):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    folder = tmp_path_factory.mktemp("milvus_lite") / "people.db"
    return Milvus(f"milvus://{folder}", str(folder))

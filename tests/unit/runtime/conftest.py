"""Milvus for the tests of galleries: a server and a folder, made once a session."""

import pytest

from tests.helpers import milvus_server
from tests.helpers.gallery_places import Milvus, run_server


@pytest.fixture(scope="session")
def server_place(tmp_path_factory, pytestconfig):
    reason = milvus_server.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    binaries = pytestconfig.cache.mkdir("milvus-server")
    for server in run_server(tmp_path_factory.mktemp("milvus") / "data", binaries):
        address = f"127.0.0.1:{server.port}"
        yield Milvus(f"milvus://{address}", f"http://{address}", server)


@pytest.fixture(scope="session")
def lite_place(tmp_path_factory):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    folder = tmp_path_factory.mktemp("milvus_lite") / "people.db"
    return Milvus(f"milvus://{folder}", str(folder))

"""Servers that are away, and those that answer and refuse: the first may pass, the others not."""

import socket
from concurrent import futures
from contextlib import contextmanager

import pytest

from tests.helpers.gallery_places import open_new
from tests.helpers.refused import refused
from tests.helpers.small_servers import no_server
from upperson_rt.errors import BackendError

grpc = pytest.importorskip("grpc", reason="pymilvus is not installed: extra 'milvus'")


@contextmanager
def server_that_says(code):
    """Give the port of a server that ends each request with a code of gRPC."""

    class Refuse(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: context.abort(grpc.StatusCode[code], "as the test says")
            )

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Refuse()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def silent_server():
    """Give the port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_an_answer_of_the_server_says_whether_it_may_pass():
    for says, code in (
        ("UNAVAILABLE", "server_away"), ("DEADLINE_EXCEEDED", "server_away"),
        ("PERMISSION_DENIED", "user_refused"), ("INTERNAL", "server_failed"),
    ):  # fmt: skip
        with server_that_says(says) as port, refused(code, BackendError):
            open_new(f"milvus://127.0.0.1:{port}/people?timeout=5")


@pytest.mark.parametrize(
    ("server", "tls"), [(no_server, ""), (silent_server, ""), (silent_server, "&tls=true")]
)
def test_a_server_that_does_not_answer_is_away_and_its_gallery_named(server, tls):
    with server() as port:
        location = f"milvus://127.0.0.1:{port}/people?timeout=0.5{tls}"
        named = location.replace("//", "//ann@")
        with refused("server_away", BackendError, location=named) as error:
            open_new(location.replace("//", "//ann:secret@"))
        assert "secret" not in str(error.value)

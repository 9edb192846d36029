"""The addresses of Milvus galleries."""

import pytest

from tests.helpers.refused import refused
from upperson_milvus.connection import TOKEN_VARIABLE, parse
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Gallery


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def test_a_location_of_a_server():
    place = parse("milvus://host/people")
    assert (place.uri, place.collection, place.database) == ("http://host:19530", "people", "")
    assert place.text == "milvus://host:19530/people"
    assert place.token == ""
    assert place.file is None
    place = parse("milvus://[::1]:7/shop/people?tls=true&index=hnsw&timeout=2.5")
    assert (place.uri, place.collection, place.database) == ("https://[::1]:7", "people", "shop")
    assert place.text == "milvus://[::1]:7/shop/people?tls=true&index=hnsw&timeout=2.5"
    assert (place.options.index, place.options.timeout_s) == ("hnsw", 2.5)


def test_a_location_of_a_folder():
    place = parse("milvus:///data/a%20b/people.db/front?index=ivf_sq8")
    assert str(place.file) == place.uri == "/data/a b/people.db"
    assert place.collection == "front"
    assert parse(place.text) == place


def test_passwords_are_taken_and_never_shown(monkeypatch):
    place = parse("milvus://ann:s3%3Acret@host/people")
    assert place.token == "ann:s3:cret"
    assert place.text == "milvus://ann@host:19530/people"
    assert "cret" not in repr(place)
    with refused("password_missing", UsageError, user="ann"):
        parse(place.text)
    monkeypatch.setenv(TOKEN_VARIABLE, "ann:other")
    assert parse(place.text).token == "ann:other"
    assert parse("milvus://host/people").token == "ann:other"
    with refused("password_missing", UsageError, user="bob"):
        parse("milvus://bob@host/people")


@pytest.mark.parametrize(
    "place",
    ["host", "host/", "host/a-b", "host/1a", "host/a/b/c", "host:port/a", "host:99999/a",
     "/people.db", "/data/people/front"],
)  # fmt: skip
def test_malformed_locations(place):
    with refused("location_malformed", UsageError):
        Gallery.open(f"milvus://{place}")


@pytest.mark.parametrize(
    "query",
    ["colour=red", "index=tree", "consistency=eventually", "tls=yes", "timeout=soon", "timeout=0",
     "timeout=nan"],
)  # fmt: skip
def test_malformed_options(query):
    with refused("option_invalid", UsageError, option=query.partition("=")[0]):
        Gallery.open(f"milvus://host/a?{query}")


@pytest.mark.parametrize("password", ["12/s3cret", "s3cret/12", "1?s3cret", "#s3cret"])
def test_a_password_that_is_not_escaped_is_not_shown(password):
    with refused("location_malformed", UsageError) as raised:
        parse(f"milvus://ann:{password}@host/people")
    assert "s3cret" not in str(raised.value)

"""The addresses of Milvus galleries."""

import pytest

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
    with pytest.raises(UsageError, match=f"{TOKEN_VARIABLE}=ann:PASSWORD"):
        parse(place.text)
    monkeypatch.setenv(TOKEN_VARIABLE, "ann:other")
    assert parse(place.text).token == "ann:other"
    assert parse("milvus://host/people").token == "ann:other"
    with pytest.raises(UsageError, match="no password for the Milvus user 'bob'"):
        parse("milvus://bob@host/people")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("milvus://host", "not the name of a Milvus collection"),
        ("milvus://host/", "not the name of a Milvus collection"),
        ("milvus://host/a-b", "not the name of a Milvus collection"),
        ("milvus://host/1a", "not the name of a Milvus collection"),
        ("milvus://host/a/b/c", "milvus://host/database/collection"),
        ("milvus://host:port/a", "malformed address"),
        ("milvus://host:99999/a", "malformed address"),
        ("milvus:///people.db", "not the name of a Milvus collection"),
        ("milvus:///data/people/front", "ends in .db"),
        ("milvus://host/a?colour=red", "unknown option 'colour'"),
        ("milvus://host/a?index=tree", "option index .* not 'tree'"),
        ("milvus://host/a?consistency=eventually", "option consistency"),
        ("milvus://host/a?tls=yes", "option tls"),
        ("milvus://host/a?timeout=soon", "option timeout"),
        ("milvus://host/a?timeout=0", "option timeout"),
        ("milvus://host/a?timeout=nan", "option timeout"),
    ],
)
def test_malformed_locations(location, message):
    with pytest.raises(UsageError, match=message):
        Gallery.open(location)


@pytest.mark.parametrize("password", ["12/s3cret", "s3cret/12", "1?s3cret", "#s3cret"])
def test_a_password_that_is_not_escaped_is_not_shown(password):
    with pytest.raises(UsageError, match="a password wants %2F for /") as raised:
        parse(f"milvus://ann:{password}@host/people")
    assert "s3cret" not in str(raised.value)

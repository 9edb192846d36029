"""The API against its own description: generated requests of every kind, and none may break it."""

import base64
import os
import warnings
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests.helpers.console import id_of, problem

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")

EXAMPLES = int(os.environ.get("UPPERSON_TEST_SCHEMA_EXAMPLES", "2"))
"""Of each operation and kind; hours of more find more."""
BEYOND_SCHEMAS = [openapi_checks.positive_data_acceptance]
"""The check that cannot hold: no schema says that a file must be a picture, a cursor of this very
search, or that a sentence needs a word."""
JSON, PROBLEM = {"content-type": "application/json"}, "application/problem+json"


def codes_of(strategy):
    """Send generated requests, check each answer, and return their status codes."""
    codes = []

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def send(case):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Its own.
            response = case.call()
            case.validate_response(response, excluded_checks=BEYOND_SCHEMAS)
        codes.append(response.status_code)

    send()
    return codes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_breaks_the_api(make_console, mode):
    console = make_console(names=["testserver"])
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", console.app)
    tried = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
        with suppress(Unsatisfiable):  # Nothing about it can be wrong.
            tried[operation.label] = codes_of(strategy)
    assert len(tried) >= (25 if mode == "positive" else 18)
    assert max(map(max, tried.values())) < 500


def test_the_description_is_openapi_3_1_with_examples(console, guarded):
    document = console.client.get("/api/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert "securitySchemes" not in document["components"]
    schemas = document["components"]["schemas"]
    assert schemas["SearchIn"]["examples"]
    assert "code" in schemas["ProblemOut"]["required"]
    for operations in document["paths"].values():
        for operation in operations.values():
            problems = operation["responses"]["default"]["content"]
            assert (list(problems), bool(operation["summary"])) == ([PROBLEM], True), operation
    secured = guarded.viewer.get("/api/v1/openapi.json").json()
    assert secured["paths"]["/api/v1/search"]["post"]["security"] == [{"token": []}]
    assert "security" not in secured["paths"]["/api/v1/health"]["get"]


def test_a_wrong_method_is_answered_with_all_right_ones(reader):
    for path, methods in {
        "/api/v1/items/1": "DELETE, GET, HEAD",
        "/api/v1/marks": "PUT",
        "/alerts": "GET, POST, HEAD",
        "/live/events": "GET",
        "/static/console.css": "GET, HEAD",
    }.items():
        answer = reader.client("PATCH", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_head_is_answered_like_get(reader):
    id_ = id_of(reader, "red-0")
    paths = ["/", "/?q=red", "/live", "/login", f"/people/{id_}", f"/people/{id_}/picture"]
    paths += [f"/api/v1/items/{id_}", f"/api/v1/items/{id_}/picture", "/api/v1/openapi.json"]
    for path in (*paths, "/api/v1/items/999", "/static/console.css"):
        head, get = reader.client("HEAD", path), reader.client.get(path)
        assert head.content == b""
        assert (head.status_code, head.headers) == (get.status_code, get.headers), path


def test_each_kind_of_wrong_request_is_a_problem(reader):
    client = reader.client
    problem(client.get("/api/v1/search"), 405, "method_not_allowed")
    problem(client.get("/api/v1/nowhere"), 404, "not_found")
    broken = client.post("/api/v1/search", content=b'{"sentence": red}', headers=JSON)
    assert "character 13" in problem(broken, 422, "request_invalid")
    problem(client.search(), 422, "query_empty")
    problem(client("PUT", "/api/v1/marks", json={}), 422, "query_empty")
    problem(client.search(picture="0" * 32, like="3"), 422, "two_pictures")


def test_a_value_of_another_type_is_not_converted(reader):
    """A number would be seconds or milliseconds of unix time, by its size, and *off* no dry run."""
    for path, body, field in (
        ("search", {"limit": 0}, "limit"),
        ("search", {"sentence": "woman in red " * 800}, "sentence"),
        ("search", {"filter": {"since": 1790000000}}, "filter.since"),
        ("search", {"filter": {"until": "1790000000"}}, "filter.until"),
        ("search", {"filter": {"since": "2026-11-26T08:00:00"}}, "filter.since"),
        ("search", {"limit": "3"}, "limit"),
        ("search", {"by_track": "yes"}, "by_track"),
        ("prune", {"older_than": -339473}, "older_than"),
        ("prune", {"keep_newest": True}, "keep_newest"),
        ("prune", {"keep_newest": 1, "dry_run": "off"}, "dry_run"),
    ):
        query = {"sentence": "red"} if path == "search" else {}
        answer = reader.client.post(f"/api/v1/{path}", json=query | body)
        assert problem(answer, 422, "request_invalid").startswith(f"{field}: ")


def test_embeddings_are_the_gallerys(reader, red_jpeg, monkeypatch):
    def embed(**body):
        return reader.client.post("/v1/embeddings", json=body)

    url = "data:image/jpeg;base64," + base64.b64encode(red_jpeg).decode()
    body = {"input": ["a red coat", url], "model": "any"}
    answer = embed(**body).json()
    assert (answer["object"], [one["index"] for one in answer["data"]]) == ("list", [0, 1])
    text_D = reader.service.encoder.encode_texts(["a red coat"])[0]
    np.testing.assert_allclose(answer["data"][0]["embedding"], text_D, atol=1e-6)
    packed = embed(**body, encoding_format="base64").json()["data"]
    unpacked = np.frombuffer(base64.b64decode(packed[1]["embedding"]), "<f4")
    np.testing.assert_allclose(unpacked, answer["data"][1]["embedding"], atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == 5
    # Base64 is decoded in pieces.
    monkeypatch.setattr("upperson_console.api.PIECE_BYTES", 64)
    assert embed(**body, encoding_format="base64").json()["data"] == packed
    for wrong in (url[:100] + "=" + url[101:], "data:image/jpeg;base64,***", "data:text/plain,x"):
        problem(embed(input=wrong), 422, "data_url_malformed")
    problem(embed(input=""), 422)
    pauses = []  # Others run between the parts of a long request.
    monkeypatch.setattr(reader.service.queue, "pause", lambda: pauses.append(1))
    assert embed(input=["red"] * 9).status_code == 200
    assert len(pauses) == 3
    # A sentence has the same limit as in a search.
    assert embed(input=["r" * 2000, "red"]).status_code == 200
    problem(embed(input=["r" * 2001, "red"]), 422, "sentence_too_long")

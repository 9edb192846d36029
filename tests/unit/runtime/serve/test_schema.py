"""The API against its own description: made-up requests of every kind, and none may break it."""

import os
import warnings
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests.helpers.console import problem

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")

EXAMPLES = int(os.environ.get("UPPERSON_TEST_SCHEMA_EXAMPLES", "3"))
"""Of each operation and kind; hours of more find more."""


BEYOND_SCHEMAS = [openapi_checks.positive_data_acceptance]
"""Of all checks the one that cannot hold: no schema says that a file must be a picture, a cursor of
this very search, or that a sentence needs a word."""


def codes_of(strategy):
    """Send what a strategy makes up, check each answer, and return their status codes."""
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
    generation = schemathesis.GenerationMode(mode)
    tried = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = operation.as_strategy(generation_mode=generation)
        with suppress(Unsatisfiable):  # Nothing about it can be wrong.
            tried[operation.label] = codes_of(strategy)
    print({label: dict(sorted(Counter(codes).items())) for label, codes in tried.items()})
    assert len(tried) >= (18 if mode == "positive" else 12)
    assert max(code for codes in tried.values() for code in codes) < 500


def test_the_description_is_openapi_3_1_with_examples(console, guarded):
    document = console.client.get("/api/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert "securitySchemes" not in document["components"]
    schemas = document["components"]["schemas"]
    assert schemas["SearchIn"]["examples"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]["default"]["content"]
            assert list(told) == ["application/problem+json"], (path, method)
            assert operation["summary"]
    asked = guarded.viewer.get("/api/v1/openapi.json").json()
    assert asked["paths"]["/api/v1/search"]["post"]["security"] == [{"token": []}]
    assert "security" not in asked["paths"]["/api/v1/health"]["get"]


def test_problems_are_told_for_every_kind_of_request(reader):
    assert "Method Not Allowed" in problem(reader.client.get("/api/v1/search"), 405)
    assert problem(reader.client.get("/api/v1/nowhere"), 404) == "there is nothing at this address"
    broken = reader.client.post(
        "/api/v1/search", content=b'{"sentence"', headers={"content-type": "application/json"}
    )
    assert "JSON" in problem(broken, 422)
    assert "limit" in problem(reader.client.search(sentence="red", limit=0), 422)
    assert "describe the person" in problem(reader.client.search(), 422)


@pytest.mark.parametrize(
    ("path", "asked", "words"),
    [
        (
            "search",
            {"filter": {"since": 1790000000}},
            "filter.since: expected a time with",
        ),
        ("search", {"filter": {"until": "1790000000"}}, "filter.until: expected a time with"),
        ("search", {"filter": {"since": "2026-11-26T08:00:00"}}, "should have timezone info"),
        ("search", {"limit": "3"}, "limit: Input should be a valid integer"),
        ("search", {"by_track": "yes"}, "by_track: Input should be a valid boolean"),
        ("prune", {"older_than": -339473}, "older_than: expected a time with its zone, such as"),
        ("prune", {"keep_newest": True}, "keep_newest: Input should be a valid integer"),
        ("prune", {"keep_newest": 1, "dry_run": "off"}, "dry_run: Input should be a valid boolean"),
    ],
)
def test_what_is_of_another_type_is_not_made_fit(reader, path, asked, words):
    """A number would be seconds or milliseconds of unix time, by its size, and *off* no dry run."""
    sentence = {"sentence": "red"} if path == "search" else {}
    answer = reader.client.post(f"/api/v1/{path}", json=sentence | asked)
    assert words in problem(answer, 422)


def test_a_body_that_is_no_json_is_called_so(reader):
    answer = reader.client.post(
        "/api/v1/search", content=b'{"sentence": red}', headers={"content-type": "application/json"}
    )
    assert problem(answer, 422) == "the body is no JSON: Expecting value at character 13"


def test_embeddings_are_the_galleries(reader, red_jpeg):
    import base64

    import numpy as np

    url = "data:image/jpeg;base64," + base64.b64encode(red_jpeg).decode()
    asked = {"input": ["a red coat", url], "model": "any"}
    answer = reader.client.post("/v1/embeddings", json=asked).json()
    assert answer["object"] == "list"
    assert [one["index"] for one in answer["data"]] == [0, 1]
    text_D = reader.desk.encoder.encode_texts(["a red coat"])[0]
    np.testing.assert_allclose(answer["data"][0]["embedding"], text_D, atol=1e-6)
    packed = reader.client.post(
        "/v1/embeddings", json={**asked, "encoding_format": "base64"}
    ).json()
    unpacked = np.frombuffer(base64.b64decode(packed["data"][1]["embedding"]), "<f4")
    np.testing.assert_allclose(unpacked, answer["data"][1]["embedding"], atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == 5
    for wrong in ("data:image/jpeg;base64,***", "data:text/plain,x", ""):
        problem(reader.client.post("/v1/embeddings", json={"input": wrong}), 422)

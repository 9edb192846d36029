"""Bundles with right hashes that no export writes: no library gets what is in them."""

from types import SimpleNamespace

import pytest

from tests.helpers.hostile_bundles import BACKENDS, HOSTILE, try_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.printable import escape_for_display

REASONS = {
    "canaries: an empty file": "no_archive",
    "canaries: a bare array": "no_archive",
    "canaries: nothing in the archive": "array_missing",
    "canaries: strongly encrypted": "packed_otherwise",
    "canaries: a shape of 3,000 digits": "array_too_large",
    "canaries: a shape that overflows to what is there": "array_too_large",
    "canaries: a shape of truths": "array_cut",
    "canaries: elements that are arrays": "array_unfit",
    "canaries: a header of brackets": "library",
    "canaries: patched data": "library",
    "graph: whole constants that an attribute calls floating ones": "attributes",
    "graph: whole numbers that a cast's tensor calls floating ones": "attributes",
    "graph: whole constants that are floating inputs": "name_reused",
    "graph: places far outside, of several axes": "gather_places",
    "graph: places found and then moved far outside": "gather_places",
    "graph: variances of nothing": "operator",
    "graph: operators of another domain": "operator_domain",
    "graph: a function in it": "functions",
    "graph: training in it": "functions",
    "graph: a graph in an attribute": "graph_inside",
    "graph: graphs in a list": "graph_inside",
    "graph: a sparse tensor in an attribute": "sparse",
    "graph: a tensor in two parts, which readers put together": "tensor_parts",
    "graph: a tensor whose sizes come to 2^64": "tensor_size",
    "graph: a tensor elsewhere, in an attribute": "other_file",
    "graph: a tensor elsewhere, in a list": "other_file",
    "graph: a division of whole numbers by zero": "whole_division",
    "graph: a name of a megabyte": "name_too_long",
    "graph: a number without an end": "no_field",
    "graph: another one behind it": "graph_count",
    "graph: no output": "ends_differ",
}
"""Why some are refused, a case or two of each kind."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sound_one_is_taken(toy_bundle, backend):
    assert try_bundle(toy_bundle, backend) == ("taken", None)


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(folder, monkeypatch, name):
    HOSTILE[name](folder)
    loaded, load = [], Bundle._load
    monkeypatch.setattr(Bundle, "_load", lambda *args: loaded.append(args) or load(*args))
    if name.startswith("tokenizer: "):
        never = SimpleNamespace(from_str=lambda _: pytest.fail("the library read it"))
        monkeypatch.setattr("tokenizers.Tokenizer", never)
    for backend in BACKENDS:
        outcome, reason = try_bundle(folder, backend)
        assert outcome.startswith(("5 ", "6 ")), outcome
        assert len(escape_for_display(outcome)) < 2000
        assert reason == REASONS.get(name, reason)
        if not loaded:  # Another library would get it just as little.
            break

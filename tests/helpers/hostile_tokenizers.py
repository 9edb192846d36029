"""Descriptions of tokenizers with right hashes that no export writes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.helpers.hostile_changes import Change, changed_json, changed_text

_tokenizer = partial(changed_json, "tokenizer.json")
_text = partial(changed_text, "tokenizer.json")


def _model(**fields: Any) -> Change:
    return _tokenizer(lambda content: content["model"].update(fields))


def _bpe(**fields: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []} | fields

    return _tokenizer(change)


def _renamed(name: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary[name] = vocabulary.pop("coat")

    return _tokenizer(change)


def _framed(change: Callable[[list[Any]], None]) -> Change:
    return _tokenizer(lambda content: change(content["post_processor"]["single"]))


def _part(key: str, value: Any) -> Change:
    return _tokenizer(lambda content: content.update({key: value}))


def _sequence(*parts: Any) -> Change:
    return _part("normalizer", {"type": "Sequence", "normalizers": [*parts]})


_LOWER = {"type": "Lowercase"}
_SPLIT = {"type": "Split", "behavior": "Removed", "invert": False}

TOKENIZERS = {
    "tokenizer: eight megabytes of brackets": _text(lambda _: "[" * ((8 << 20) - 1)),
    "tokenizer: eight megabytes of a number": _text(lambda _: "9" * ((8 << 20) - 1)),
    "tokenizer: an object of 700,000 equal keys": _text(lambda _: "{" + '"a":1,' * 700_000),
    "tokenizer: a mark of byte order": _text(lambda text: "\ufeff" + text),
    "tokenizer: UTF-16": _text(lambda text: text.encode("utf-16")),
    "tokenizer: half a character": _text(lambda text: text.replace("coat", "\ud800")),
    "tokenizer: not a number": _text(lambda text: text.replace('"id":', '"id":NaN,"x":', 1)),
    "tokenizer: a list": _text(lambda text: f"[{text}]"),
    "tokenizer: nothing": _text(lambda _: "null"),
    "tokenizer: a token of half a character": _renamed("\ud800"),
    "tokenizer: replacements that take turns": _sequence(
        *[{"type": "Replace", "pattern": {"String": a}, "content": b * 99} for a, b in ("ab", "ba")]
    ),
    "tokenizer: a pattern that looks back": _sequence(
        {"type": "Replace", "pattern": {"Regex": r"(?<=(a+)+)b"}, "content": ""}
    ),
    "tokenizer: a pattern that names itself": _part(
        "pre_tokenizer", _SPLIT | {"pattern": {"Regex": r"(?<x>a\g<x>?b)"}}
    ),
    "tokenizer: a pattern of both kinds": _sequence(
        {"type": "Replace", "pattern": {"String": "_", "Regex": "_"}, "content": " "}
    ),
    "tokenizer: a sequence in a sequence": _sequence({"type": "Sequence", "normalizers": [_LOWER]}),
    "tokenizer: a million parts": _sequence(*[_LOWER] * 100_000),
    "tokenizer: a prefix of a megabyte": _sequence({"type": "Prepend", "prepend": "a" * (1 << 20)}),
    "tokenizer: letters made of bytes": _sequence({"type": "ByteLevel"}),
    "tokenizer: a normalizer that is a text": _part("normalizer", "Lowercase"),
    "tokenizer: a part of no kind": _part("pre_tokenizer", {}),
    "tokenizer: pieces of a length": _part("pre_tokenizer", {"type": "FixedLength", "length": 1}),
    "tokenizer: a kind that is a list": _model(type=["BPE"]),
    "tokenizer: a vocabulary of pairs": _model(vocab=[["a", 0]]),
    "tokenizer: ids that are truths": _tokenizer(lambda c: c["model"]["vocab"].update(red=True)),
    "tokenizer: ids of 5,000 digits": _text(
        lambda text: text.replace('"red":', f'"red":{"9" * 5000},"x":')
    ),
    "tokenizer: one id twice": _tokenizer(lambda c: c["model"]["vocab"].update(red=3, green=3)),
    "tokenizer: an unknown token that is a number": _model(unk_token=1),
    "tokenizer: merges that are texts of three": _bpe(merges=["r e d"]),
    "tokenizer: merges of numbers": _bpe(merges=[[1, 2]]),
    "tokenizer: merges that are no list": _bpe(merges={"a": "n"}),
    "tokenizer: merges of lists": _bpe(merges=[[["a"], ["n"]]]),
    "tokenizer: merges of what is not there": _bpe(merges=[["zz", "y"]]),
    "tokenizer: merges into what is not there": _bpe(merges=[["red", "coat"]]),
    "tokenizer: merges that are empty": _bpe(merges=[["", ""]]),
    "tokenizer: a cache of its own": _bpe(cache_capacity=1 << 60),
    "tokenizer: words that end in a megabyte": _bpe(end_of_word_suffix="a" * (1 << 20)),
    "tokenizer: a suffix that is a number": _bpe(end_of_word_suffix=7),
    "tokenizer: merges are ignored": _bpe(ignore_merges=True),
    "tokenizer: pieces of a model of other kind": _tokenizer(
        lambda c: c.update(model={"type": "WordPiece", "vocab": c["model"]["vocab"]})
    ),
    "tokenizer: a frame of a thousand tokens": _framed(lambda s: s.extend([s[0]] * 1000)),
    "tokenizer: a frame without a sentence": _framed(lambda s: s.pop(1)),
    "tokenizer: a frame of two sentences": _framed(lambda s: s.insert(1, s[1])),
    "tokenizer: a frame of the second sentence": _framed(lambda s: s[1]["Sequence"].update(id="B")),
    "tokenizer: a frame of what is not there": _framed(
        lambda s: s[0]["SpecialToken"].update(id="q")
    ),
    "tokenizer: a frame of numbers": _framed(lambda s: s[0]["SpecialToken"].update(id=3)),
    "tokenizer: a frame of lists": _framed(lambda s: s[0]["SpecialToken"].update(id=[])),
    "tokenizer: a frame in frames": _tokenizer(
        lambda c: c.update(
            post_processor={"type": "Sequence", "processors": [c["post_processor"]] * 9}
        )
    ),
    "tokenizer: added tokens for each letter": _part(
        "added_tokens", [{"id": n, "content": chr(97 + n), "special": True} for n in range(26)]
    ),
    "tokenizer: added tokens that are an object": _part("added_tokens", {"0": "a"}),
    "tokenizer: more added tokens than tokens": _tokenizer(
        lambda c: c.update(added_tokens=c["added_tokens"] * 100_000)
    ),
    "tokenizer: a cut to 10**30": _part("truncation", {"max_length": 10**30}),
    "tokenizer: a cut to less than its frame": _part("truncation", {"max_length": -1}),
}  # fmt: skip

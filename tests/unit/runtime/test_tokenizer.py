import json

import numpy as np
import pytest
import tokenizers

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import EOT, SOT, make_toy_tokenizer_json
from upperson.data.vocabulary import clip_tokenizer_json
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.tokenizer import Tokenizer, token_lengths

JSON = make_toy_tokenizer_json()
IDS = json.loads(JSON)["model"]["vocab"]


def padded(sequences):
    longest = max(map(len, sequences))
    return [ids + [0] * (longest - len(ids)) for ids in sequences]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_json(JSON, context_length=6)


def test_special_ids_are_read_from_the_file(tokenizer):
    assert (tokenizer.sot_id, tokenizer.eot_id) == (IDS[SOT], IDS[EOT])
    assert Tokenizer.from_json(JSON).context_length == 77
    assert Tokenizer.from_json(make_toy_tokenizer_json(9)).context_length == 9


@pytest.mark.parametrize(
    ("texts", "words", "truncated"),
    [
        (["Red", "a man in", "Blue coat"], ["red", "a man in", "blue coat"], []),
        (["red", "a man in a red", "a man in a", "red " * 50],
         ["red", "a man in a", "a man in a", "red red red red"], [1, 3]),
        (["  red \t\n &amp;amp;  coat "], ["red & coat"], []),
    ],
    ids=["as long as the longest", "cut to the context", "entities and white space"],
)  # fmt: skip
def test_ids_of_a_batch(tokenizer, texts, words, truncated):
    batch = tokenizer.encode(texts)
    assert batch.input_ids.dtype == np.int32
    rows = [[IDS[word] for word in (SOT, *one.split(), EOT)] for one in words]
    assert (batch.input_ids.tolist(), batch.truncated) == (padded(rows), truncated)


def test_special_tokens_in_a_sentence_and_zeros_before_its_end_are_ordinary(tokenizer):
    ids = tokenizer.encode([f"red {EOT} coat"]).input_ids[0].tolist()
    assert ids.index(IDS[EOT]) == len(ids) - 1
    batch = tokenizer.encode(["red ! coat", "red"])
    assert IDS["!"] == 0
    assert token_lengths(batch.input_ids).tolist() == [5, 3]
    assert [tokenizer.is_broken(["x"] * count) for count in (1, 2, 3)] == [False, False, True]


def test_bad_arguments_are_refused(tokenizer):
    for text in ("", " \t\n", "&nbsp;"):
        with refused("sentence_empty", InputError, index=1):
            tokenizer.encode(["red", text])
    with refused("no_sentence", InputError):
        tokenizer.encode([])
    with refused("no_list", InputError, what="sentences"):
        tokenizer.encode("red")
    with refused("no_unicode", InputError, what="sentence 0"):
        tokenizer.encode(["red \udc80"])
    with refused("out_of_range", InputError, what="context_length"):
        Tokenizer.from_json(JSON, context_length=2)


def test_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with refused("tokenizer_unreadable", InputError):
        Tokenizer.from_file(path)
    path.write_text(JSON, encoding="utf-8")
    assert Tokenizer.from_file(path).eot_id == IDS[EOT]
    for content, code in ((JSON[:100].encode(), "no_json"), (b"\xff\xfe{", "no_utf8")):
        path.write_bytes(content)
        with refused(code, IntegrityError):
            Tokenizer.from_file(path)


HOSTILE = {
    "merges by chance": ("model", {"type": "BPE", "vocab": IDS, "merges": [], "dropout": 0.5}),
    "no such unknown token": ("model", {"type": "WordLevel", "vocab": IDS, "unk_token": "x"}),
    "no id": ("model", {"type": "WordLevel", "vocab": {}, "unk_token": None}),
    "an added token of its own": ("added_tokens", [{"id": 40, "content": ""}]),
    "padding": ("padding", {"strategy": {"Fixed": 1 << 40}}),
    "a key of its own": ("more", {}),
}
"""Beside `tests.helpers.hostile_tokenizers`."""


@pytest.mark.parametrize("key_and_value", HOSTILE.values(), ids=HOSTILE)
def test_what_exports_do_not_write_never_reaches_the_library(key_and_value):
    key, value = key_and_value
    with refused("tokenizer_unfit", IntegrityError):
        Tokenizer.from_json(json.dumps(json.loads(JSON) | {key: value}), context_length=12)


@pytest.mark.parametrize("number", [-1, 5000, 1, 2.0, True, "2"])
def test_ids_are_those_of_a_table(number):
    assert IDS["red"] == 2
    what = "model.vocab, tokens with the ids from 0 on,"
    with refused("tokenizer_unfit", IntegrityError, what=what):
        Tokenizer.from_json(JSON.replace('"red":2', f'"red":{json.dumps(number)}'))


def test_a_tokenizer_is_put_together_as_the_library_reads_it():
    odd = "It\u2019s \u201c42\u201d \n caf\u00e9s & a na\u0308ive <|endoftext|> dog"
    texts = ["A woman in a red coat.", odd]
    library = tokenizers.Tokenizer.from_str(clip_tokenizer_json())
    library.encode_special_tokens = True
    found = library.encode_batch([" ".join(text.split()) for text in texts])
    ours = Tokenizer.from_json(clip_tokenizer_json()).encode(texts)
    assert ours.input_ids.tolist() == padded([encoding.ids for encoding in found])

"""Sentences to token ids, by a `tokenizer.json` of the Hugging Face `tokenizers` library."""

import gc
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from upperson_rt.arguments import check_count, check_list, check_path, check_text
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.printable import one_line, safe_repr
from upperson_rt.strict import parse_json

# --- `tokenizer.json`, read as what it may hold rather than as what the library can do
#
# The library runs whatever a file describes: replacements inside replacements, patterns that search
# for years, ids beyond the model's, and some descriptions end the process. So it never gets the
# file. The file is parsed and compared with a short table of parts, those that exports write, and
# the tokenizer is put together from them. Their time grows with the length of a sentence and no
# faster.

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP's word pattern splits on: contractions, letters, single digits, runs of the rest."""

_QUOTES = {"[\u2018\u2019]": "'", "[\u201c\u201d]": '"'}
REPLACED = {**_QUOTES, r"\s+": " "}
"""Patterns and what takes the place of their matches: of what CLIP has ftfy repair, this is what
people really type or paste; then white space."""


def _replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


_LOWERCASE: dict[str, Any] = {"type": "Lowercase"}
_UNDERSCORES = _replaced({"String": "_"}, " ")
_PUNCTUATION = _replaced({"Regex": r"[!-/:-@\[-^`{-~]"}, "")
_WHITE_SPACE = _replaced({"Regex": r"\s+"}, " ")
_STRIPPED: dict[str, Any] = {"type": "Strip", "strip_left": True, "strip_right": True}

SPACES = _replaced({"String": " "}, "\u2581")
"""Gemma's vocabulary writes spaces so."""

REPAIRED: list[dict[str, Any]] = [
    {"type": "NFC"},
    *(_replaced({"Regex": pattern}, quote) for pattern, quote in _QUOTES.items()),
]
"""What stands before it, of what open_clip has ftfy repair."""

CLEANED: dict[str, list[dict[str, Any]]] = {
    "whitespace": [_WHITE_SPACE, _STRIPPED],
    "lower": [_WHITE_SPACE, _STRIPPED, _LOWERCASE],
    "canonicalize": [_UNDERSCORES, _PUNCTUATION, _LOWERCASE, _WHITE_SPACE, _STRIPPED],
}
"""What open_clip does to text before Gemma's vocabulary, by its names: no ASCII punctuation in the
last one."""

# A row for each part that a tokenizer may have, as the library writes it. Another base may need
# another row: one whose time is linear in the text.
_NORMALIZERS: list[dict[str, Any]] = [*REPAIRED, *CLEANED["canonicalize"], SPACES]
_PRE_TOKENIZERS: list[dict[str, Any]] = [
    {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    {"type": "Whitespace"},
]
_BPE = {
    "dropout": (None,),  # It would split by chance.
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, "", "</w>"),
    "fuse_unk": (False, True),
    "byte_fallback": (False, True),
    "ignore_merges": (False,),
}
_KEYS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
    "post_processor", "decoder", "model",
}  # fmt: skip
_MOST_PARTS = 10
_FRAME = "the tokenizer must frame a sentence as SOT, tokens, EOT, or as tokens, EOT"


@lru_cache(maxsize=2)  # A bundle that is opened again and those of one base need no second one.
def read_tokenizer(text: str) -> tuple[tokenizers.Tokenizer, int | None]:
    """Build the tokenizer that a `tokenizer.json` describes, and return it with its context length.

    It is shared and must not be changed: it neither cuts nor pads, and special tokens in a sentence
    are ordinary text.
    """
    with _no_collection():
        try:
            content = parse_json(text, "tokenizer.json")
        except InputError as error:
            raise IntegrityError(str(error), code=error.code) from error
        _require(isinstance(content, dict) and content.keys() <= _KEYS, "the keys", content)
        model = _model(content.get("model"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    frame = _frame(content.get("post_processor"), vocabulary)
    for token in _list(content.get("added_tokens"), "added_tokens", len(vocabulary)):
        known = isinstance(token, dict) and isinstance(token.get("content"), str)
        known = known and token.get("id") == vocabulary.get(token["content"])
        _require(known, "added_tokens, which the vocabulary must have", token)
    _require(content.get("padding") is None, "padding", content.get("padding"))
    context_length = _truncation(content.get("truncation"))
    parts = {
        "normalizer": _sequence(content, "normalizer", "normalizers", _NORMALIZERS),
        "pre_tokenizer": _sequence(content, "pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS),
        "post_processor": frame,
    }
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    shell: dict[str, Any] = {"version": "1.0", "added_tokens": [], **parts, "model": empty}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(shell))
    except Exception as error:  # The Rust side raises nothing narrower.
        raise IntegrityError(f"tokenizer.json {_not_readable(error)}") from error
    tokenizer.model = model
    tokenizer.encode_special_tokens = True
    return tokenizer, context_length


def _model(content: Any) -> models.Model:
    kind = content.get("type") if isinstance(content, dict) else None
    _require(kind in ("BPE", "WordLevel"), "model, BPE or WordLevel,", kind)
    vocabulary, unknown = content.get("vocab"), content.get("unk_token")
    # Each id once and none beyond their number: nothing that the model's table lacks comes out.
    counted = (
        isinstance(vocabulary, dict)
        and set(map(type, vocabulary.values())) == {int}
        and sorted(vocabulary.values()) == list(range(len(vocabulary)))
    )
    _require(counted, "model.vocab, tokens with the ids from 0 on,", "others")
    _require(
        unknown in vocabulary if isinstance(unknown, str) else unknown is None and kind == "BPE",
        "model.unk_token, a token of the vocabulary,",
        unknown,
    )
    rest = content.keys() - {"type", "vocab", "unk_token"}
    try:
        if kind == "WordLevel":
            _require(not rest, "model, without further keys,", rest)
            return models.WordLevel(vocabulary, unk_token=unknown)
        _require(rest <= {*_BPE, "merges"}, "model, with the keys of BPE,", rest)
        for name, allowed in _BPE.items():
            _require(content.get(name) in (None, *allowed), f"model.{name}", content.get(name))
        merges = content.get("merges")
        _require(isinstance(merges, list), "model.merges, a list,", merges)
        # Before tokenizers 0.20 a pair was one string.
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        options = ("unk_token", "end_of_word_suffix", "fuse_unk", "byte_fallback")
        given = {name: content[name] for name in options if content.get(name)}
        return models.BPE(vocab=vocabulary, merges=pairs, **given)
    except IntegrityError:
        raise
    except Exception as error:  # The Rust side raises nothing narrower.
        message = f"tokenizer.json: the model {_not_readable(error)}"
        raise IntegrityError(message, code="tokenizer_unreadable") from error


def _not_readable(error: Exception) -> str:
    return f"is not readable by tokenizers {tokenizers.__version__}: {one_line(error)}"


def _frame(content: Any, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Return the post-processor that puts a token after a sentence and, if any, one before."""
    try:
        pieces = content["single"]
        tokens = [piece["SpecialToken"]["id"] for piece in (*pieces[:-2], pieces[-1])]
        special = {
            name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in tokens
        }
        found = content["type"], pieces[-2]["Sequence"]["id"], content["special_tokens"]
    except (TypeError, LookupError):
        special, found = {}, ("", "", {})
    if len(special) not in (1, 2) or found != ("TemplateProcessing", "A", special):
        message = (
            f"tokenizer.json: {_FRAME}, by its post-processor, with tokens of the vocabulary: "
            "export the bundle again"
        )
        raise IntegrityError(message, code="frame_unfit")
    single: list[Any] = [{"SpecialToken": {"id": name, "type_id": 0}} for name in tokens]
    single.insert(-1, {"Sequence": {"id": "A", "type_id": 0}})
    pair = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _sequence(
    content: dict[str, Any], key: str, inner: str, table: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return a part, or a sequence of them, each of which is in the table."""
    found = content.get(key)
    if found is None:
        return None
    in_sequence = isinstance(found, dict) and found.get("type") == "Sequence"
    parts = _list(found.get(inner), f"{key}.{inner}", _MOST_PARTS) if in_sequence else [found]
    for part in parts:
        _require(part in table, f"{key}, parts", part)
    return {"type": "Sequence", inner: [table[table.index(part)] for part in parts]}


def _truncation(content: Any) -> int | None:
    if content is None:
        return None
    length: Any = content.get("max_length") if isinstance(content, dict) else None
    _require(type(length) is int and 3 <= length <= 4096, "truncation.max_length", length)
    return int(length)


def _list(found: Any, key: str, most: int) -> list[Any]:
    found = [] if found is None else found
    _require(isinstance(found, list) and len(found) <= most, f"{key}, a list of {most} at most", "")
    return list(found)


def _require(holds: bool, what: str, found: Any) -> None:
    if not holds:
        message = f"tokenizer.json: expected {what} as exports write it, found {safe_repr(found)}"
        message += ": export the bundle again"
        raise IntegrityError(message, code="tokenizer_unfit", what=what)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking a hundred thousand new tuples again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- Sentences to token ids, by a `tokenizer.json` of the Hugging Face `tokenizers` library


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of a batch of sentences."""

    input_ids: NDArray[np.int32]
    """(N, L) tokens framed by SOT, if there is one, and EOT, then zeros; L is the longest sentence
    of the batch."""
    truncated: list[int]
    """Indices of the sentences that were longer than the context and have been cut."""
    _encoded: list[tuple[str, tokenizers.Encoding]] = field(default_factory=list, repr=False)
    """Each sentence as it was read, whole, with its tokens."""

    def words(self, row: int) -> dict[str, list[str]]:
        """Return the words of a sentence, each once, with the tokens that each is read as."""
        text, encoding = self._encoded[row]
        tokens = list(zip(encoding.tokens, encoding.offsets, strict=True))
        found: dict[str, list[str]] = {}
        for match in re.finditer(r"[^\W\d_]+", text):
            first, last = match.span()
            own = [token for token, (begin, end) in tokens if begin < last and first < end]
            found.setdefault(match[0], own)
        return found


class Tokenizer:
    """The text side's input: SOT + byte-pair tokens + EOT, zero-padded to the longest sentence.

    Some vocabularies have no SOT. A tower that was trained on captions padded to its context pads
    inside; how long a caption is has one answer here: up to its EOT.

    Lower-casing and the byte-pair merges live in `tokenizer.json`. Before it, HTML entities are
    unescaped twice, white space is collapsed and stripped, as CLIP does. CLIP also repairs broken
    encodings with the package `ftfy`; the runtime leaves that out, so captions with mojibake
    should be repaired before they get here. Special tokens written in a sentence count as
    ordinary text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        context_length: int = 77,
        sot_id: int | None = None,
        eot_id: int | None = None,
    ) -> None:
        """Wrap a loaded tokenizer; `from_file` and `from_json` are the usual way.

        Its post-processor must add an end token, and may add a start token, of the ids given, if
        any. Its truncation and padding are switched off, since this class does them. The context
        length counts special tokens.
        """
        # One that is shared is as it must be: another thread may encode with it at this moment.
        if tokenizer.truncation is not None:
            tokenizer.no_truncation()
        if tokenizer.padding is not None:
            tokenizer.no_padding()
        if not tokenizer.encode_special_tokens:
            tokenizer.encode_special_tokens = True
        frame = tokenizer.encode("").ids
        start = frame[0] if len(frame) == 2 else None
        is_fit = len(frame) in (1, 2) and sot_id in (None, start)
        if not is_fit or eot_id not in (None, frame[-1]):
            message = (
                f"{_FRAME}, but it encodes an empty sentence as {frame}: export tokenizer.json"
            )
            raise InputError(f"{message} again, with its post-processor")
        self.context_length = check_count(context_length, "context_length", InputError, least=3)
        self._tokenizer = tokenizer
        self._frame = len(frame)
        self.sot_id: int | None = start
        self.eot_id: int = frame[-1]

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], context_length: int | None = None
    ) -> "Tokenizer":
        """Load a `tokenizer.json`.

        The context length is by default the one that the file gives under `truncation`, or else 77.
        """
        try:
            with open(check_path(path, "a tokenizer"), encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            message = f"cannot read tokenizer {os.fspath(path)}: {error}"
            raise InputError(message, code="tokenizer_unreadable") from error
        except UnicodeDecodeError as error:
            message = f"{os.fspath(path)} is no text in UTF-8: {error}"
            raise IntegrityError(message, code="no_utf8") from error
        return cls.from_json(text, context_length)

    @classmethod
    def from_json(cls, text: str, context_length: int | None = None) -> "Tokenizer":
        """Load from the text of a `tokenizer.json`, as `from_file` does."""
        tokenizer, written = read_tokenizer(text)
        return cls(tokenizer, (written or 77) if context_length is None else context_length)

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Encode sentences, each with at least one character that the model reads."""
        sentences = check_list(texts, "sentences")
        if not sentences:
            raise InputError("no sentence to encode", code="no_sentence")
        cleaned = [_clean(text, index) for index, text in enumerate(sentences)]
        encodings = self._tokenizer.encode_batch(cleaned)
        sequences: list[list[int]] = [encoding.ids for encoding in encodings]
        for index, ids in enumerate(sequences):
            if len(ids) == self._frame:
                problem = f"has nothing that this model reads ({safe_repr(texts[index])})"
                raise _empty_sentence(index, problem)
        truncated = [i for i, ids in enumerate(sequences) if len(ids) > self.context_length]
        for i in truncated:
            sequences[i] = [*sequences[i][: self.context_length - 1], self.eot_id]
        input_ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int32)
        for row, ids in zip(input_ids, sequences, strict=True):
            row[: len(ids)] = ids
        encoded = list(zip(cleaned, encodings, strict=True))
        return TokenBatch(input_ids=input_ids, truncated=truncated, _encoded=encoded)

    def count(self, texts: Sequence[str]) -> int:
        """Return how many tokens some sentences have together, none for no sentence."""
        return int(token_lengths(self.encode(texts).input_ids).sum()) if texts else 0

    def is_broken(self, pieces: Sequence[str]) -> bool:
        """Whether a word of `TokenBatch.words` is in tokens that the model probably never learned.

        The vocabulary has no entry for it, and it is not two of its words either: it is read as
        three or more pieces.
        """
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        return len(pieces) > 2 or unknown in pieces


def token_lengths(input_ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return (N,) how many tokens of each zero-padded caption (N, L) count: up to its end token.

    The end token is never 0, and a zero before it is a token (CLIP's ``!``).
    """
    lengths: NDArray[np.int64] = input_ids.shape[1] - np.argmax(input_ids[:, ::-1] != 0, axis=1)
    return lengths


def _clean(text: object, index: int) -> str:
    text = check_text(text, f"sentence {index}")
    cleaned = " ".join(html.unescape(html.unescape(text)).split())
    if not cleaned:
        raise _empty_sentence(index, "is empty")
    # An entity such as &#xD800; may have become half a character.
    return check_text(cleaned, f"sentence {index}")


def _empty_sentence(index: int, problem: str) -> InputError:
    message = f"sentence {index} {problem}: describe the person in a few words"
    return InputError(message, code="sentence_empty", index=index)

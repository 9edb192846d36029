"""Sentences to token ids, by a `tokenizer.json` of the Hugging Face `tokenizers` library."""

import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from upperson_rt.arguments import check_count, check_list, check_path, check_text
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.printable import shown
from upperson_rt.tokenizer_file import read_tokenizer

__all__ = ["TokenBatch", "Tokenizer", "token_lengths"]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of a batch of sentences."""

    input_ids: NDArray[np.int32]
    """(N, L) tokens framed by SOT, if there is one, and EOT, then zeros; L is the longest sentence
    of the batch."""
    truncated: list[int]
    """Indices of the sentences that were longer than the context and have been cut."""


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

        Args:
            tokenizer: Its post-processor must add an end token, and may add a start token. It is
                changed: truncation and padding are switched off, since this class does them.
            context_length: Longest sequence of ids, the two special ones included.
            sot_id: Id of the start token; read off the post-processor when not given.
            eot_id: Id of the end token; likewise.

        Raises:
            InputError: The tokenizer does not frame a sentence with these tokens.
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
        if (
            len(frame) not in (1, 2)
            or sot_id not in (None, start)
            or eot_id not in (None, frame[-1])
        ):
            raise InputError(
                f"the tokenizer must frame a sentence as SOT, tokens, EOT, or as tokens, EOT, but "
                f"it encodes an empty sentence as {frame}: export tokenizer.json again, with its "
                "post-processor"
            )
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

        Args:
            path: The file.
            context_length: Longest sequence of ids; by default the one the file itself gives
                under `truncation`, or else 77.

        Raises:
            InputError: The file cannot be read.
            IntegrityError: It is not a tokenizer, or one that exports do not write; see
                `upperson_rt.tokenizer_file`.
        """
        try:
            with open(check_path(path, "a tokenizer"), encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            raise InputError(f"cannot read tokenizer {os.fspath(path)}: {error}") from error
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{os.fspath(path)} is no text in UTF-8: {error}") from error
        return cls.from_json(text, context_length)

    @classmethod
    def from_json(cls, text: str, context_length: int | None = None) -> "Tokenizer":
        """Load from the text of a `tokenizer.json`; arguments and errors as for `from_file`."""
        tokenizer, written = read_tokenizer(text)
        return cls(tokenizer, (written or 77) if context_length is None else context_length)

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Encode sentences.

        Args:
            texts: N sentences, each with at least one character that is not white space, or not
                punctuation where the model reads none.

        Returns:
            The ids, int32 (N, L) with L at most `context_length`, and which sentences were cut.

        Raises:
            InputError: No sentence at all, an empty one, or one that is not valid Unicode.
        """
        sentences = check_list(texts, "sentences")
        if not sentences:
            raise InputError("no sentence to encode")
        cleaned = [_clean(text, index) for index, text in enumerate(sentences)]
        sequences: list[list[int]] = [
            encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)
        ]
        for index, ids in enumerate(sequences):
            if len(ids) == self._frame:
                raise InputError(
                    f"sentence {index} has nothing that this model reads ({shown(texts[index])}): "
                    "describe the person in a few words"
                )
        truncated = [i for i, ids in enumerate(sequences) if len(ids) > self.context_length]
        for i in truncated:
            sequences[i] = [*sequences[i][: self.context_length - 1], self.eot_id]
        input_ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int32)
        for row, ids in zip(input_ids, sequences, strict=True):
            row[: len(ids)] = ids
        return TokenBatch(input_ids=input_ids, truncated=truncated)

    def count(self, texts: Sequence[str]) -> int:
        """Return how many tokens some sentences have together, none for no sentence."""
        return int(token_lengths(self.encode(texts).input_ids).sum()) if texts else 0

    def unfamiliar(self, text: str) -> list[str]:
        """Return the words of a sentence, each once, that are broken, see `is_broken`."""
        return [word for word, pieces in self.words(text).items() if self.is_broken(pieces)]

    def words(self, text: str) -> dict[str, list[str]]:
        """Return the words of a sentence, each once, with the pieces that each is read as."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", html.unescape(text)))
        return {
            word: self._tokenizer.encode(word, add_special_tokens=False).tokens for word in words
        }

    def is_broken(self, pieces: Sequence[str]) -> bool:
        """Tell whether a word of `words` is in pieces that the model hardly can have learned from.

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
        raise InputError(f"sentence {index} is empty: describe the person in a few words")
    # An entity such as &#xD800; may have become half a character.
    return check_text(cleaned, f"sentence {index}")

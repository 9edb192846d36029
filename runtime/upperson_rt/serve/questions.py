"""From a search to the vector that is looked for: sentence, picture, both, and what was marked.

Here the encoder works, a few requests at a time; sentences that were embedded are kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Filter, Gallery, Hit
from upperson_rt.phrases import ParsedSentence, Phrase, parse
from upperson_rt.phrases.evidence import Evidence
from upperson_rt.retriever import search_without
from upperson_rt.serve.memory import AskedPicture, Memory
from upperson_rt.serve.pictures import as_jpeg, read_upload
from upperson_rt.serve.problems import ProblemError
from upperson_rt.serve.scale import ORDINARY, Vocabulary
from upperson_rt.serve.search import Search
from upperson_rt.serve.turns import Turns
from upperson_rt.towers import batch_slices

__all__ = [
    "Question",
    "Questions",
    "refined",
    "share_of_yes",
]

# --- Yes and no: a search moved towards what somebody said is right, and no further than a bound

_TOWARDS = 0.8
"""Of the way from the question to what is right, at most: the question always has its say."""
_SOON = 0.3
"""The first yes goes most of that way: a picture says more than a sentence."""
_AWAY = 0.4
"""Of the length of the question, at most, away from what is not right."""
_LATER = 3.0
"""One no says little, several of a kind say more."""


def refined(
    query_D: NDArray[np.float32], yes_ND: NDArray[np.float32], no_ND: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the (D,) query of unit length moved by marks; without any the same bits.

    As in Rocchio's rule the query goes towards the mean of what is right and away from the mean of
    what is not. But both moves have a bound that depends on the number of marks alone, so that
    some wrong clicks among others cannot carry a search away.

    Args:
        query_D: (D,) of unit length.
        yes_ND: (N, D) of unit length, what is right; the same marks in the same order give the
            same bits.
        no_ND: (N, D) of unit length, what is not.
    """
    if not len(yes_ND) and not len(no_ND):
        return query_D
    moved = query_D.astype(np.float64)
    if len(yes_ND):
        share = share_of_yes(len(yes_ND))
        moved = (1 - share) * moved + share * _of_unit_length(yes_ND.mean(axis=0, dtype=np.float64))
    if len(no_ND):
        share = _AWAY * len(no_ND) / (len(no_ND) + _LATER)
        moved = _of_unit_length(moved) - share * no_ND.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(moved))
    if length < 1e-6:  # The marks cancel the question out.
        return query_D
    return (moved / length).astype(np.float32)


def share_of_yes(count: int) -> float:
    """Return how much of a refined query is what so many marks say is right."""
    return _TOWARDS * count / (count + _SOON)


def _of_unit_length(vector_D: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector_D))
    return vector_D / length if length > 1e-12 else vector_D


# --- From a search to the vector that is looked for: sentence, picture, both, and what was marked


_KEPT_SENTENCES = 2000
_SENTENCES_AT_ONCE = 4
"""Of one request, before another client has its turn."""
_MOST_DECODING = 4
"""Pictures that wait to be decoded. With those that wait for the encoder they are fewer than the
threads of the server, so that it shows pictures meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search looks for."""

    vector_D: NDArray[np.float32]
    """(D,) of unit length."""
    picture_share: float
    """Of pictures in it, 0 for a sentence to 1 for a picture; what was marked is a picture, too."""
    denied: tuple[Phrase, ...]
    """What its sentence does not want."""
    sentence: ParsedSentence | None
    """What is asked in words alone; None where a picture is asked with."""
    is_cut: bool
    """Whether the end of its sentence was cut off."""
    unfamiliar: Sequence[str]
    """Words of its sentence that the model hardly can know, see `Vocabulary`."""
    lost: int
    """Marks on items that are not there any more."""


@dataclass(frozen=True)
class _Sentence:
    """A sentence as grammar and encoder know it."""

    parsed: ParsedSentence
    vector_D: NDArray[np.float32]
    is_cut: bool
    unfamiliar: Sequence[str]


class Questions:
    """Makes questions of searches. Safe to use from several threads."""

    def __init__(self, encoder: Encoder, memory: Memory) -> None:
        """Ask with an encoder, whose towers are loaded when they are first needed.

        Args:
            encoder: Of the bundle.
            memory: Keeps the pictures that somebody asks with.
        """
        self.turns = Turns()
        self.decoding = Turns(waiting=_MOST_DECODING)
        """Pictures are decoded beside the encoder, and do not hold it."""
        self._encoder = encoder
        self._memory = memory
        self._evidence = Evidence(encoder.encode_texts)
        self._vocabulary = Vocabulary(encoder)
        self._sentences: OrderedDict[str, _Sentence] = OrderedDict()
        self._ordinary_SD: NDArray[np.float32] | None = None
        self._lock = threading.Lock()

    def of(
        self,
        search: Search,
        like_D: NDArray[np.float32] | None,
        marked: Mapping[int, NDArray[np.float32]],
    ) -> Question:
        """Return what a search looks for.

        Args:
            search: It asks for something.
            like_D: (D,) of the item that it likes, if it does.
            marked: (D,) of each item that is marked, there, and seen by whoever asks.

        Raises:
            InputError: The sentence cannot be used.
            ProblemError: The picture is not kept any more.
            BusyError: Too many wait for the encoder.
        """
        parts: list[NDArray[np.float32]] = []
        sentence = self._sentence(search.sentence) if search.sentence.strip() else None
        if sentence is not None:
            own_D = sentence.vector_D
            parts.append((1 - search.share) * own_D if search.has_both else own_D)
        if search.picture is not None:
            like_D = self.asked_picture(search.picture).vector_D
        if like_D is not None:
            parts.append(search.share * like_D if search.has_both else like_D)
        query_D = parts[0] if len(parts) == 1 else _unit(parts[0] + parts[1])

        def vectors(ids: Sequence[int]) -> NDArray[np.float32]:
            # In one order, whoever marked what first: the same marks give the same bits.
            there = [marked[id_] for id_ in sorted(ids) if id_ in marked]
            return np.array(there, np.float32).reshape(-1, len(query_D))

        yes_ND = vectors(search.yes)
        own_share = 0.0 if like_D is None else search.share if search.has_both else 1.0
        return Question(
            vector_D=refined(query_D, yes_ND, vectors(search.no)),
            picture_share=1 - (1 - own_share) * (1 - share_of_yes(len(yes_ND))),
            denied=() if sentence is None else sentence.parsed.denied,
            sentence=None if sentence is None or search.has_both else sentence.parsed,
            is_cut=sentence is not None and sentence.is_cut,
            unfamiliar=() if sentence is None else sentence.unfamiliar,
            lost=sum(id_ not in marked for id_ in (*search.yes, *search.no)),
        )

    def hits(
        self, question: Question, gallery: Gallery, k: int, where: Filter, by_track: bool
    ) -> list[Hit]:
        """Return the k best hits of a question; pictures lose for what it does not want.

        Raises:
            BusyError: It does not want something, and too many wait for the encoder.
        """
        if not question.denied:
            return gallery.search(question.vector_D[None], k, where, by_track)[0]
        with self.turns.turn():
            return search_without(
                gallery, self._evidence, question.vector_D, question.denied, k, where, by_track
            )

    def score(self, question: Question, vector_D: NDArray[np.float32]) -> float:
        """Return the score of one picture, as `hits` has it.

        Raises:
            BusyError: The question does not want something, and too many wait for the encoder.
        """
        score = float(vector_D.astype(np.float64) @ question.vector_D.astype(np.float64))
        if not question.denied:
            return score
        with self.turns.turn():
            return score - float(self._evidence.against(question.denied, vector_D[None])[0])

    def ask_with(self, content: IO[bytes]) -> AskedPicture:
        """Embed a picture that was sent, and keep it to ask with.

        Args:
            content: Its file, read in pieces.

        Raises:
            InputError: It is no picture.
            BusyError: Too many wait for the encoder.
        """
        with self.decoding.turn():
            upload = read_upload(content)
        with self.turns.turn():
            vector_D = self._encoder.encode_images([upload.pixels])[0]
        jpeg, size = as_jpeg(upload.pixels, "thumb")
        picture = AskedPicture(
            id=upload.sha256[:32], sha256=upload.sha256, vector_D=vector_D, jpeg=jpeg, size=size
        )
        self._memory.keep_picture(picture, self._encoder.fingerprint)
        return picture

    def asked_picture(self, id_: str) -> AskedPicture:
        """Return a picture that was given to ask with.

        Raises:
            ProblemError: There is none.
        """
        picture = self._memory.picture(id_, self._encoder.fingerprint)
        if picture is None:
            raise ProblemError(
                404, "the picture of this search is not kept any more: give it again"
            )
        return picture

    def embed(self, inputs: Sequence[str | IO[bytes]]) -> NDArray[np.float32]:
        """Return (N, D) embeddings of sentences and files of pictures, mixed.

        Raises:
            InputError: One cannot be used.
            BusyError: Too many wait for the encoder.
        """
        embeds_ND = np.empty((len(inputs), self._encoder.embed_dim), np.float32)
        texts = [place for place, one in enumerate(inputs) if isinstance(one, str)]
        with self.turns.turn():
            for rows in batch_slices(len(texts), _SENTENCES_AT_ONCE):
                part = texts[rows]
                embeds_ND[part] = self._encoder.encode_texts([str(inputs[n]) for n in part])
                self.turns.pause()
        for place, one in enumerate(inputs):
            if isinstance(one, str):
                continue
            with self.decoding.turn():
                pixels = read_upload(one).pixels
            with self.turns.turn():
                embeds_ND[place] = self._encoder.encode_images([pixels])[0]
        return embeds_ND

    def ordinary(self) -> NDArray[np.float32]:
        """Return the (S, D) embeddings of `ORDINARY`, which are made once.

        Raises:
            BusyError: Too many wait for the encoder.
        """
        if self._ordinary_SD is None:
            with self.turns.turn():
                self._ordinary_SD = self._encoder.encode_texts(ORDINARY)
        return self._ordinary_SD

    def _sentence(self, text: str) -> _Sentence:
        with self._lock:
            if text in self._sentences:
                self._sentences.move_to_end(text)
                return self._sentences[text]
        parsed = parse(text)
        is_cut = bool(self._encoder.tokenizer.encode([text]).truncated)
        with self.turns.turn():
            # What it denies is no part of what it asks for, as everywhere in the runtime.
            vector_D = self._encoder.encode_texts([parsed.wanted])[0]
            unfamiliar = self._vocabulary.unfamiliar(text)
        sentence = _Sentence(parsed, vector_D, is_cut, unfamiliar)
        with self._lock:
            self._sentences[text] = sentence
            while len(self._sentences) > _KEPT_SENTENCES:
                self._sentences.popitem(last=False)
        return sentence


def _unit(vector_D: NDArray[np.float32]) -> NDArray[np.float32]:
    length = float(np.linalg.norm(vector_D))
    if not length:
        raise IntegrityError("sentence and picture cancel each other out: move the slider")
    unit: NDArray[np.float32] = (vector_D / length).astype(np.float32)
    return unit

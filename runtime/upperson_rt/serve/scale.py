"""How well a picture matches, in a word, and whether a sentence tells people apart at all.

A score is a cosine, and says little by itself: every search has a best hit, and the more pictures
there are the better it is. It says more beside the scores that other questions of the same kind
get: ordinary sentences, pictures of other people, or both in the same shares. Those questions are
the same for one picture and for a million, so a word means the same in every gallery of a model.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery
from upperson_rt.phrases import ParsedSentence
from upperson_rt.phrases.lexicon import SMALL_WORDS

__all__ = [
    "LIKELY",
    "ORDINARY",
    "WORDS",
    "Scale",
    "Vocabulary",
    "Word",
]

Word: TypeAlias = Literal["very close", "close", "similar", "loose", ""]
WORDS: dict[float, Word] = {3.5: "very close", 3.0: "close", 2.5: "similar"}
"""By how many standard deviations a score lies above those of other questions."""
_ELSE: Word = "loose"
LIKELY = ((4.6, 3.5), (3.8, 4.4))
"""Slope and middle of a logistic curve over the same deviations, for a sentence and for a picture,
fitted to a gallery of 300 drawn people (docs/onvif.md, Likelihood): of more people fewer with the
same score are right."""
_COLOURS = ("red", "blue", "black", "white", "green", "grey", "yellow", "brown")
_UPPER = ("coat", "jacket", "shirt", "hoodie", "dress", "sweater", "top", "t-shirt")
_LOWER = ("black trousers", "blue jeans", "grey shorts", "a white skirt")
_PEOPLE = ("a woman", "a man", "a girl", "a boy")
ORDINARY = tuple(
    f"{_PEOPLE[n % 4]} in a {_COLOURS[(5 * n + n // 8) % 8]} {_UPPER[(n + n // 8) % 8]} and "
    f"{_LOWER[n // 2 % 4]}"
    for n in range(32)
)
"""Sentences to compare others with."""
_SAMPLE = 2048
_LEAST = 50
"""People from whom on a gallery shows by itself how alike they are."""
_COMPARED = 512
_QUESTIONS = 64
_FEWEST_SCORES = 16
_SMALLEST_SPREAD = 0.01
_NEARLY_ITSELF = 0.9
"""Of the way from a usual score of two pictures to that of a picture with itself."""
_GROWN = 1.1
_UNCLEAR_BELOW = 0.45
"""Of the spread that ordinary sentences have: sentences about anything but people have less."""


@dataclass
class _Sample:
    """Some pictures of a gallery."""

    vectors_ND: NDArray[np.float32]
    people_N: NDArray[np.int64]
    """Who they are, as far as tracks tell: two with the same number are the same person."""
    count: int
    """How many pictures the gallery had."""
    usual: dict[float, tuple[float, float] | None] = field(default_factory=dict)
    """By the share of the picture: middle and spread of the scores of other questions."""
    usual_unlike: float | None = None
    """How far the scores of one ordinary sentence usually differ between pictures."""


class Scale:
    """What is usual in one gallery. Safe to use from several threads."""

    def __init__(
        self,
        gallery: Gallery,
        strangers_KD: NDArray[np.float32],
        sentences: Callable[[], NDArray[np.float32]],
    ) -> None:
        """Compare scores of a gallery.

        Args:
            gallery: A sample of it is read when it is first needed.
            strangers_KD: (K, D) pictures of people who are not in it: a small gallery does not
                show how alike different people are.
            sentences: Returns the embeddings of `ORDINARY`.
        """
        self._gallery = gallery
        norms = np.linalg.norm(strangers_KD, axis=1, keepdims=True)
        self._strangers_KD = strangers_KD / np.maximum(norms, 1e-12)
        self._sentences = sentences
        self._lock = threading.Lock()
        self._read: _Sample | None = None

    def words(self, picture_share: float, scores: Sequence[float]) -> list[Word]:
        """Return a word for each score; empty ones where there is nothing to compare with.

        Args:
            picture_share: Of pictures in the question, 0 for a sentence to 1 for a picture.
            scores: Cosines of the question with pictures.
        """
        usual = self._usual(round(picture_share, 2)) if scores else None
        if usual is None:
            return [""] * len(scores)
        middle, spread = usual
        itself = middle + _NEARLY_ITSELF * (1 - middle) if picture_share == 1 else np.inf
        return [
            "very close"
            if score >= itself
            else next((w for least, w in WORDS.items() if score - middle >= least * spread), _ELSE)
            for score in scores
        ]

    def likelihoods(self, picture_share: float, scores: Sequence[float]) -> list[float]:
        """Return how likely each score is that of the right person, 0 to 1; arguments as `words`.

        Where there is nothing to compare with it is the cosine, 0 for opposites.
        """
        above_N = self.deviations(picture_share, scores)
        if above_N is None:
            return [min(max((score + 1) / 2, 0.0), 1.0) for score in scores]
        by_sentence, by_picture = np.array(LIKELY)
        slope, half = by_sentence + picture_share * (by_picture - by_sentence)
        likely: list[float] = (1 / (1 + np.exp(-slope * (above_N - half)))).tolist()
        return likely

    def deviations(
        self, picture_share: float, scores: Sequence[float]
    ) -> NDArray[np.float64] | None:
        """Return by how many standard deviations (N,) scores lie above those of other questions.

        Arguments as `words`; None where there is nothing to compare with.
        """
        usual = self._usual(round(picture_share, 2)) if len(scores) else None
        if usual is None:
            return None
        middle, spread = usual
        above_N: NDArray[np.float64] = (np.asarray(scores, np.float64) - middle) / spread
        return above_N

    def is_unclear(
        self, sentence: ParsedSentence, vector: Callable[[], NDArray[np.float32]]
    ) -> bool:
        """Whether a sentence's scores hardly differ between pictures, beside ordinary ones.

        Never of one in which a garment, a woman or the like is understood: nothing is compared for
        it. A colour by itself is none of these.

        Args:
            sentence: What is asked.
            vector: Returns its (D,) embedding.
        """
        if any(phrase.noun != "person" or phrase.colours for phrase in sentence.understood):
            return False
        sample = self._sample()
        if len(sample.vectors_ND) < _LEAST:
            return False
        if sample.usual_unlike is None:
            spreads_S = (sample.vectors_ND @ self._sentences().T).std(axis=0)
            sample.usual_unlike = float(np.median(spreads_S))
        unlike = float((sample.vectors_ND @ vector()).std())
        return unlike < _UNCLEAR_BELOW * sample.usual_unlike

    def _usual(self, share: float) -> tuple[float, float] | None:
        sample = self._sample()
        if share not in sample.usual:
            sample.usual[share] = self._measured(sample, share)
        return sample.usual[share]

    def _measured(self, sample: _Sample, share: float) -> tuple[float, float] | None:
        """Return middle and spread of the scores of questions about others."""
        some = _spread(len(sample.vectors_ND), _COMPARED)
        pictures_ND, people_N = sample.vectors_ND[some], sample.people_N[some]
        asked = _spread(len(some), _QUESTIONS)
        if share and len(np.unique(people_N)) < _LEAST:
            asked = len(some) + np.arange(len(self._strangers_KD))
            pictures_ND = np.concatenate([pictures_ND, self._strangers_KD])
            people_N = np.concatenate([people_N, -1 - np.arange(len(self._strangers_KD))])
        if 0 < share < 1:
            asked = asked[np.arange(_QUESTIONS) % len(asked)]
        scores_QN = self._others(share, pictures_ND[asked]) @ pictures_ND.T
        of_others = np.ones(scores_QN.shape, np.bool_)
        if share:
            of_others = people_N[asked][:, None] != people_N[None]
        scores = scores_QN[of_others]
        if len(scores) < _FEWEST_SCORES:
            return None
        # From the lower half: in the upper one may be the same person in another track.
        low, middle = np.quantile(scores, [0.1587, 0.5])
        return float(middle), max(float(middle - low), _SMALLEST_SPREAD)

    def _others(self, share: float, pictures_QD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (Q, D) questions: sentences, pictures, or both in the same shares."""
        if share == 1:
            return pictures_QD
        sentences_SD = self._sentences()
        if share == 0:
            return sentences_SD
        texts_QD = sentences_SD[np.arange(len(pictures_QD)) % len(sentences_SD)]
        mixed_QD = (1 - share) * texts_QD + share * pictures_QD
        mixed_QD /= np.linalg.norm(mixed_QD, axis=1, keepdims=True)
        return mixed_QD

    def _sample(self) -> _Sample:
        with self._lock:
            if self._read is None or self._is_outgrown(self._read):
                items, vectors_ND = next(
                    self._gallery.vectors(batch_size=_SAMPLE),
                    ([], np.empty((0, self._gallery.embed_dim), np.float32)),
                )
                people: dict[object, int] = {}
                tracks = [
                    item.key if item.track is None else (item.camera, item.track) for item in items
                ]
                numbers = [people.setdefault(track, len(people)) for track in tracks]
                self._read = _Sample(vectors_ND, np.array(numbers, np.int64), self._gallery.count())
            return self._read

    def _is_outgrown(self, sample: _Sample) -> bool:
        if len(sample.vectors_ND) >= _SAMPLE:
            return False
        count = self._gallery.count()
        fewer, more = sorted((count, sample.count))
        return more > fewer if more < _LEAST else more > _GROWN * fewer


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Return places spread evenly over so many, ``most`` at most."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).astype(np.int64))


# --- Words that a model cannot have learned: by its vocabulary, and by what it makes of them
#
# A model that was trained on few texts has entries that no text has reached. To it such a word is
# the same as any other of them; to a model that knows both, two words are never the same.

_OF_NOBODY = ("parliament", "molecule", "theorem", "orchestra", "volcano", "inflation")
"""Words by which nobody is described."""
_ASKING = frozenset({"find", "look", "looking", "please", "search", "show"})
"""Words that say nothing about a person, beside the grammar's small words."""
_SAME = 1e-3
"""Distance of embeddings of unit length below which two words are the same to a model."""
_KEPT = 10_000


class Vocabulary:
    """Which words a model has learned. Whoever asks has a turn at the encoder."""

    def __init__(self, encoder: Encoder) -> None:
        """Ask an encoder, whose text tower is loaded when it is first needed."""
        self._encoder = encoder
        self._has_learned: dict[str, bool] = {}
        self._stand_in: str | None = None
        """A word that the model has not learned; None where none is known, or not looked for."""
        self._was_looked_for = False

    def unfamiliar(self, sentence: str) -> list[str]:
        """Return the words of a sentence, each once, that the model hardly can have learned."""
        tokenizer = self._encoder.tokenizer
        pieces = tokenizer.words(sentence)
        broken = {word for word, parts in pieces.items() if tokenizer.is_broken(parts)}
        whole = {
            word: len(parts)
            for word, parts in pieces.items()
            if word not in broken and word.lower() not in SMALL_WORDS | _ASKING
        }
        if len(self._has_learned) + len(whole) > _KEPT:
            self._has_learned.clear()
        self._learn({word: count for word, count in whole.items() if word not in self._has_learned})
        return [word for word in pieces if word in broken or not self._has_learned.get(word, True)]

    def _learn(self, words: dict[str, int]) -> None:
        """Find out whether words of so many pieces are the same as the stand-in."""
        stand_in = self._found_stand_in()
        if stand_in is None or not words:
            return
        lengths = sorted(set(words.values()))
        others = [" ".join([stand_in] * length) for length in lengths]
        # All at once: a tower may compute a little otherwise in another batch.
        embeds_ND = self._encoder.encode_texts([*others, *words])
        for (word, length), own_D in zip(words.items(), embeds_ND[len(others) :], strict=True):
            apart = np.linalg.norm(own_D - embeds_ND[lengths.index(length)])
            self._has_learned[word] = bool(apart > _SAME)

    def _found_stand_in(self) -> str | None:
        if not self._was_looked_for:
            tokenizer = self._encoder.tokenizer
            single = [
                word
                for word, parts in tokenizer.words(" ".join(_OF_NOBODY)).items()
                if len(parts) == 1 and not tokenizer.is_broken(parts)
            ]
            if len(single) > 1:
                embeds_ND = self._encoder.encode_texts(single)
                apart_NN = np.linalg.norm(embeds_ND[:, None] - embeds_ND[None], axis=-1)
                alike_N = (apart_NN < _SAME).sum(axis=1)
                if alike_N.max() > 1:
                    self._stand_in = single[int(alike_N.argmax())]
            self._was_looked_for = True
        return self._stand_in

"""How well a picture matches, in a word, and whether a sentence tells people apart at all.

A score is a cosine, and says little by itself: every search has a best hit. It says more beside
the scores that the same question has with ordinary pictures of the same gallery.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Gallery

__all__ = ["WORDS", "Scale", "Word"]

Word: TypeAlias = Literal["very close", "close", "similar", "loose", ""]
WORDS: dict[float, Word] = {3.5: "very close", 3.0: "close", 2.5: "similar"}
"""By how many standard deviations a score lies above those of ordinary pictures."""
_ELSE: Word = "loose"
_SAMPLE = 2048
_LEAST = 50
"""Pictures from which a sample says something."""
_ORDINARY = (
    "a woman in a red coat",
    "a man in a black jacket and blue jeans",
    "a person wearing a white shirt",
    "a girl in a green dress",
    "a man with a grey hoodie and black trousers",
    "an old man in a brown coat",
    "a woman with a yellow top and a blue skirt",
)
_UNCLEAR_BELOW = 0.45
"""Of the spread that ordinary sentences have: sentences about anything but people have less."""


class Scale:
    """A sample of a gallery, read once. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sample_ND: NDArray[np.float32] | None = None
        self._ordinary_ND: NDArray[np.float32] | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` has been called."""
        return self._ordinary_ND is not None

    def calibrate(self, encode: Callable[[list[str]], NDArray[np.float32]]) -> None:
        """Embed ordinary sentences, to compare others with."""
        self._ordinary_ND = encode(list(_ORDINARY))

    def words(
        self, query_D: NDArray[np.float32], scores: Sequence[float], gallery: Gallery
    ) -> list[Word]:
        """Return a word for each score; an empty one where a gallery is too small to say."""
        sample_ND = self._sample(gallery)
        if len(sample_ND) < _LEAST:
            return [""] * len(scores)
        ordinary = sample_ND @ query_D
        mean, spread = float(ordinary.mean()), float(ordinary.std()) or 1.0
        return [
            next((word for least, word in WORDS.items() if (score - mean) / spread >= least), _ELSE)
            for score in scores
        ]

    def is_unclear(self, query_D: NDArray[np.float32], gallery: Gallery) -> bool:
        """Whether a sentence's scores hardly differ between pictures, beside ordinary ones."""
        sample_ND = self._sample(gallery)
        if len(sample_ND) < _LEAST or self._ordinary_ND is None:
            return False
        usual = float(np.median((sample_ND @ self._ordinary_ND.T).std(axis=0)))
        return float((sample_ND @ query_D).std()) < _UNCLEAR_BELOW * usual

    def _sample(self, gallery: Gallery) -> NDArray[np.float32]:
        with self._lock:
            if self._sample_ND is None or len(self._sample_ND) < _SAMPLE:
                first = next(gallery.vectors(batch_size=_SAMPLE), None)
                if first is None:
                    return np.empty((0, gallery.embed_dim), np.float32)
                self._sample_ND = first[1]
            return self._sample_ND

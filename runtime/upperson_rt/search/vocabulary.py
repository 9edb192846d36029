"""Words that a model has not learned, by its vocabulary and by what it makes of them.

A model that was trained on few texts has entries that no text has reached. To it such a word is the
same as any other of them; to a model that knows both, two words are never the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from upperson_rt.encoder import Encoder
from upperson_rt.phrases.lexicon import SMALL_WORDS

__all__ = ["Vocabulary"]

_OFF_TOPIC = ("parliament", "molecule", "theorem", "orchestra", "volcano", "inflation")
"""Words that describe no person."""
_REQUESTS = frozenset({"find", "look", "looking", "please", "search", "show"})
"""Words that say nothing about a person, beside the grammar's small words."""
_SAME = 1e-3
"""Distance of embeddings of unit length below which two words are the same to a model."""
_KEPT = 10_000


class Vocabulary:
    """Which words a model has learned. Safe to use from several threads."""

    def __init__(self, encoder: Encoder) -> None:
        """Use an encoder, whose text tower is loaded when it is first needed."""
        self._encoder = encoder
        self._has_learned: dict[str, bool] = {}
        self._untrained: str | None = None
        """A word that the model has not learned; None where none is known, or not looked for."""
        self._was_looked_for = False

    def unknown(self, words: Mapping[str, Sequence[str]]) -> list[str]:
        """Return the words, with their tokens (`TokenBatch.words`), that the model does not know.

        Raises:
            BackendError: The text tower cannot be loaded or fails.
        """
        tokenizer = self._encoder.tokenizer
        broken = {word for word, tokens in words.items() if tokenizer.is_broken(tokens)}
        whole = {
            word: len(tokens)
            for word, tokens in words.items()
            if word not in broken and word.lower() not in SMALL_WORDS | _REQUESTS
        }
        if len(self._has_learned) + len(whole) > _KEPT:
            self._has_learned.clear()
        self._learn({word: count for word, count in whole.items() if word not in self._has_learned})
        return [word for word in words if word in broken or not self._has_learned.get(word, True)]

    def _learn(self, words: dict[str, int]) -> None:
        """Compare words of so many tokens with the untrained word."""
        untrained = self._untrained_word()
        if untrained is None or not words:
            return
        lengths = sorted(set(words.values()))
        others = [" ".join([untrained] * length) for length in lengths]
        # All at once: a tower may compute a little otherwise in another batch.
        embeds_ND = self._encoder.encode_texts([*others, *words])
        for (word, length), own_D in zip(words.items(), embeds_ND[len(others) :], strict=True):
            apart = np.linalg.norm(own_D - embeds_ND[lengths.index(length)])
            self._has_learned[word] = bool(apart > _SAME)

    def _untrained_word(self) -> str | None:
        if not self._was_looked_for:
            tokenizer = self._encoder.tokenizer
            words = tokenizer.encode([" ".join(_OFF_TOPIC)]).words(0)
            single = [
                word
                for word, tokens in words.items()
                if len(tokens) == 1 and not tokenizer.is_broken(tokens)
            ]
            if len(single) > 1:
                embeds_ND = self._encoder.encode_texts(single)
                apart_NN = np.linalg.norm(embeds_ND[:, None] - embeds_ND[None], axis=-1)
                alike_N = (apart_NN < _SAME).sum(axis=1)
                if alike_N.max() > 1:
                    self._untrained = single[int(alike_N.argmax())]
            self._was_looked_for = True
        return self._untrained

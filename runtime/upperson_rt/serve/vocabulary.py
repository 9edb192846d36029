"""Words that a model cannot have learned: by its vocabulary, and by what it makes of them.

A model that was trained on few texts has entries that no text has reached. To it such a word is the
same as any other of them; to a model that knows both, two words are never the same.
"""

import numpy as np

from upperson_rt.encoder import Encoder
from upperson_rt.phrases.lexicon import SMALL_WORDS

__all__ = ["Vocabulary"]

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

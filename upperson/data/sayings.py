"""Of whom a caption is true, as far as captions say it.

*Red coat* is true of everybody who wears one. In a batch it competes with pictures of other people,
and without this they would all count as wrong.

Shapes: N captions of a batch, P pairs of a data set, I identities, K facts.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from upperson_rt.phrases import Phrase, parse

Fact = tuple[str, ...]
"""One thing that a phrase says, such as a coat, or that this coat is red."""


class Sayings:
    """What the captions of a data set say, as columns of a table.

    A caption is true of a person whose own captions say all that it says. One that says something
    else, or something that the grammar does not understand, is true of nobody but its own person,
    who need not be told here.

    Args:
        captions: Of the training split.
        labels_P: Identity of each, from 0.
    """

    def __init__(self, captions: Sequence[str], labels_P: npt.NDArray[np.int64]) -> None:
        facts = [[*_facts(parse(caption).phrases)] for caption in captions]
        first_said_of: dict[Fact, int] = {}
        shared: set[Fact] = set()
        for label, each in zip(labels_P.tolist(), facts, strict=True):
            shared.update(fact for fact in each if first_said_of.setdefault(fact, label) != label)
        self._column = {fact: number for number, fact in enumerate(sorted(shared))}
        known_IK = np.zeros((int(labels_P.max(initial=-1)) + 1, self.width), dtype=bool)
        for label, each in zip(labels_P, facts, strict=True):
            known_IK[label, [self._column[fact] for fact in each if fact in shared]] = True
        # Loader processes get a copy: a bit for each fact.
        self._known = np.packbits(known_IK, axis=1)

    @property
    def width(self) -> int:
        """Columns K: facts about several people, and a last one that is true of nobody else."""
        return len(self._column) + 1

    def said_by(self, captions: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return what captions say, [N, K]."""
        said_NK = np.zeros((len(captions), self.width), dtype=bool)
        for row_K, caption in zip(said_NK, captions, strict=True):
            phrases = parse(caption).phrases
            understood = all(phrase.kind != "other" for phrase in phrases)
            facts = [*_facts(phrases)] if understood else []
            row_K[[self._column.get(fact, -1) for fact in facts] or [-1]] = True
        return said_NK

    def known_of(self, labels_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return what all captions of some people say of them, [N, K]."""
        known = np.unpackbits(self._known[labels_N], axis=1, count=self.width)
        return known.astype(bool)


def _facts(phrases: Iterable[Phrase]) -> Iterator[Fact]:
    for phrase in phrases:
        if phrase.kind in {"action", "other"} or phrase.noun == "person":
            continue  # What somebody does passes, and everybody is a person.
        # The style of hair has no name of its own: it counts as it is written.
        name = phrase.text.lower() if phrase.kind == "hair" else phrase.noun
        thing = (phrase.kind, name, "denied" if phrase.negated else "")
        yield thing
        for colour in phrase.colours:
            yield (*thing, colour)
        if phrase.pattern:
            yield (*thing, phrase.pattern)

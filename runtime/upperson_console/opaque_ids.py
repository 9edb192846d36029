"""Opaque ids: what the console shows in place of row ids.

Row ids of a gallery are one sequence, so a viewer of one camera could count the rows of all others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Gallery, Hit, Item

KEY_BYTES = 32
_ROUNDS = 6
_HIGH_BITS, _LOW_BITS = 32, 31


class IdPermutation:
    """A keyed permutation of the whole numbers below 2**63: a Feistel network of BLAKE2b."""

    def __init__(self, key: bytes) -> None:
        """Use a key of `KEY_BYTES` random bytes."""
        self._rounds = [
            blake2b(key=key, digest_size=4, salt=bytes([number])) for number in range(_ROUNDS)
        ]

    def opaque(self, row: int) -> int:
        """Return the opaque id of a row id."""
        return self._permuted(row, range(_ROUNDS))

    def row(self, opaque: int) -> int:
        """Return the row id of an opaque id, whether or not there is such a row."""
        return self._permuted(opaque, reversed(range(_ROUNDS)))

    def _permuted(self, number: int, rounds: Iterable[int]) -> int:
        high, low = number >> _LOW_BITS, number & ((1 << _LOW_BITS) - 1)
        for one in rounds:  # Each is its own inverse.
            mixed = self._rounds[one].copy()
            if one % 2:
                mixed.update(high.to_bytes(4, "big"))
                low ^= int.from_bytes(mixed.digest(), "big") >> (_HIGH_BITS - _LOW_BITS)
            else:
                mixed.update(low.to_bytes(4, "big"))
                high ^= int.from_bytes(mixed.digest(), "big")
        return high << _LOW_BITS | low


def with_opaque_ids(gallery: Gallery, ids: IdPermutation) -> Gallery:
    """Return a gallery with opaque ids; all but ids is that of the given one."""
    return cast("Gallery", _OpaqueGallery(gallery, ids))


class _OpaqueGallery:
    """The methods of `Gallery` that take or return ids; the others are the wrapped gallery's."""

    def __init__(self, gallery: Gallery, ids: IdPermutation) -> None:
        self._gallery, self._ids = gallery, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gallery, name)

    def search(self, *given: Any, **more: Any) -> list[list[Hit]]:
        return [self._opaque(hits) for hits in self._gallery.search(*given, **more)]

    def search_with_vectors(
        self, *given: Any, **more: Any
    ) -> tuple[list[Hit], NDArray[np.float32]]:
        hits, vectors_KD = self._gallery.search_with_vectors(*given, **more)
        return self._opaque(hits), vectors_KD

    def vectors_of(self, hits: Sequence[Hit]) -> dict[int, NDArray[np.float32]]:
        own = {hit.id: replace(hit, id=self._ids.row(hit.id)) for hit in hits}
        found = self._gallery.vectors_of([*own.values()])
        return {id_: found[hit.id] for id_, hit in own.items() if hit.id in found}

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        return {key: self._ids.opaque(row) for key, row in self._gallery.ids(keys).items()}

    def get(self, ids: Sequence[int]) -> dict[int, tuple[Item, NDArray[np.float32]]]:
        rows = {self._ids.row(id_): id_ for id_ in ids if 0 <= id_ < 1 << 63}
        return {rows[row]: one for row, one in self._gallery.get([*rows]).items()}

    def _opaque(self, hits: Iterable[Hit]) -> list[Hit]:
        return [replace(hit, id=self._ids.opaque(hit.id)) for hit in hits]

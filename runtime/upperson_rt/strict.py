"""Strict reading of JSON objects: every key known, every type as declared, errors with a path."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from upperson_rt.errors import InputError

__all__ = ["StrictObject", "suggestion"]


def suggestion(name: str, known: Collection[str]) -> str:
    """Return `` (did you mean 'x'?)`` for a near match, else the list of what is known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"


class StrictObject:
    """A JSON object with a fixed set of keys; reads fields and reports errors by JSON path."""

    def __init__(self, value: Any, path: str, keys: Collection[str] | None = None) -> None:
        """Check the object itself.

        Args:
            value: The parsed JSON.
            path: Where it stands, for messages, such as ``bundle.json: model``.
            keys: The keys it may have; None where keys are free names.

        Raises:
            InputError: Not an object, or it has a key that is not known.
        """
        self.path = path
        if not isinstance(value, Mapping):
            raise self._wrong(path, "an object", value)
        self.content: Mapping[str, Any] = value
        for key in value:
            if keys is not None and key not in keys:
                where = path.removesuffix(":")
                raise InputError(f"{where}: unknown key '{key}', {suggestion(str(key), keys)}")

    def text(self, key: str) -> str:
        """Return a string that is not empty."""
        value = self._get(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(self._at(key), "a non-empty string", value)
        return value

    def count(self, key: str) -> int:
        """Return an integer of at least 0."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(self._at(key), "an integer of at least 0", value)
        return value

    def positive(self, key: str) -> int:
        """Return an integer of at least 1."""
        value = self.count(key)
        if value == 0:
            raise self._wrong(self._at(key), "an integer of at least 1", value)
        return value

    def number(self, key: str) -> float:
        """Return a number."""
        value = self._get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(self._at(key), "a number", value)
        try:
            return float(value)
        except OverflowError as error:
            raise self._wrong(self._at(key), "a number of 64 bits", value) from error

    def object(self, key: str, keys: Collection[str] | None = None) -> "StrictObject":
        """Return a nested object."""
        return StrictObject(self._get(key), self._at(key), keys)

    def optional_object(
        self, key: str, keys: Collection[str] | None = None
    ) -> "StrictObject | None":
        """Return a nested object, or None where it is null or absent."""
        return None if self.content.get(key) is None else self.object(key, keys)

    def error(self, key: str, problem: str) -> InputError:
        """Build an error about one field."""
        return InputError(f"{self._at(key)}: {problem}")

    def _get(self, key: str) -> Any:
        if key not in self.content:
            raise InputError(f"{self._at(key)}: missing")
        return self.content[key]

    def _at(self, key: str) -> str:
        separator = " " if self.path.endswith(":") else "."
        return f"{self.path}{separator}{key}"

    @staticmethod
    def _wrong(path: str, expected: str, found: Any) -> InputError:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return InputError(f"{path}: expected {expected}, found {shown}")

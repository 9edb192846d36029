"""Strict reading of what comes from outside: a mapping becomes a dataclass, or an error says why.

Every key must be known (an unknown one is told with its nearest neighbour), every value of the type
that the field declares; a message names the file and the path in it. Understood are dataclasses,
str (not empty), int, float (finite), bool, Literal, ``X | None``, ``tuple[X, ...]``,
``dict[str, X]``, Any, and Annotated with a `Constraint`.
"""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from upperson_rt.errors import InputError, UppersonError

__all__ = [
    "Constraint",
    "Count",
    "Positive",
    "Sha256",
    "StrictObject",
    "parse_json",
    "read_fields",
    "read_json",
    "require_version",
    "suggestion",
]

T = TypeVar("T")

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Constraint:
    """A bound on a field's value, put beside its type: ``Annotated[int, Constraint(...)]``."""

    holds: Callable[[Any], bool]
    """Called with a value of the right type."""
    expected: str
    """What the message asks for, such as ``an integer of at least 1``."""


Count: TypeAlias = Annotated[int, Constraint(lambda value: value >= 0, "an integer of at least 0")]
Positive: TypeAlias = Annotated[
    int, Constraint(lambda value: value >= 1, "an integer of at least 1")
]
Sha256: TypeAlias = Annotated[
    str,
    Constraint(
        lambda value: len(value) == 64 and set(value) <= set("0123456789abcdef"),
        "64 lower-case hex digits",
    ),
]


def suggestion(name: str, known: Collection[str]) -> str:
    """Return ``did you mean 'x'?`` for a near match, else the list of what is known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file in UTF-8.

    Raises:
        InputError: It cannot be read, or is no JSON; NaN and Infinity are none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error}") from error
    return parse_json(text, os.fspath(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; errors as for `read_json`, which name ``where``."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error


def require_version(content: Any, where: str, versions: Collection[int], advice: str) -> None:
    """Look at the key ``schema_version`` before anything else is read.

    Args:
        content: What was read.
        where: The file, for messages.
        versions: Those that this program reads.
        advice: What to do about another one.

    Raises:
        InputError: It is missing, not a number, or another one.
    """
    found = _Reader(where).field(Positive, _mapping(content, where), "schema_version")
    if found not in versions:
        raise InputError(
            f"{where}: schema_version: this file has version {found}, this program reads up to "
            f"{max(versions)}: {advice}"
        )


def read_fields(kind: type[T], content: Any, where: str) -> T:
    """Build a dataclass from a mapping whose keys are its fields.

    Args:
        kind: The dataclass. An `UppersonError` of its own checks gets the path put in front.
        content: What JSON or YAML gave.
        where: What to call it in messages, such as the file.

    Raises:
        InputError: No mapping, an unknown or missing key, or a value of another type.
    """
    return _Reader(where).fields(kind, content)


@dataclass(frozen=True)
class _Reader:
    """Reads values at one place of a file."""

    where: str
    path: str = ""

    def fields(self, kind: type[T], content: Any) -> T:
        hints = _hints(kind)
        given = _mapping(content, self.place)
        for key in given:
            if key not in hints:
                near = suggestion(str(key), hints)
                raise InputError(f"{self.place}: unknown key '{key}', {near}")
        required = {field.name for field in dataclasses.fields(kind) if _is_required(field)}  # type: ignore[arg-type]
        values = {
            name: self.field(hint, given, name)
            for name, hint in hints.items()
            if name in given or name in required
        }
        try:
            return kind(**values)
        except UppersonError as error:
            raise type(error)(f"{self.place}: {error}") from error

    def field(self, hint: Any, content: Mapping[str, Any], name: str) -> Any:
        at = self.at(name)
        if name not in content:
            raise InputError(f"{at.place}: missing")
        return at.value(hint, content[name])

    def value(self, hint: Any, value: Any, expected: str | None = None) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            (check,) = hint.__metadata__
            found = self.value(arguments[0], value, check.expected)
            if not check.holds(found):
                raise self.wrong(check.expected, value)
            return found
        if origin in (typing.Union, types.UnionType):
            (other,) = (member for member in arguments if member is not types.NoneType)
            return None if value is None else self.value(other, value, expected)
        if origin is Literal:
            if value not in arguments:
                several = f"one of {', '.join(map(str, arguments))}"
                raise self.wrong(several if len(arguments) > 1 else repr(arguments[0]), value)
            return value
        if origin is tuple:
            if not isinstance(value, list | tuple):
                raise self.wrong("a list", value)
            return tuple(
                _Reader(self.where, f"{self.path}[{i}]").value(arguments[0], item)
                for i, item in enumerate(value)
            )
        if origin in (dict, Mapping):
            given = _mapping(value, self.place)
            return {str(key): self.at(str(key)).value(arguments[1], given[key]) for key in given}
        if dataclasses.is_dataclass(hint):
            return self.fields(typing.cast("type[Any]", hint), value)
        return value if hint is Any else self.scalar(hint, value, expected)

    def scalar(self, hint: Any, value: Any, expected: str | None) -> Any:
        if hint is float and type(value) in (int, float):
            try:
                if math.isfinite(float(value)):
                    return float(value)
            except OverflowError:
                pass
            raise self.wrong("a finite number of 64 bits", value)
        if type(value) is not hint or value == "":  # Exact: True is an int to Python.
            raise self.wrong(expected or _NAMES[hint], value)
        return value

    def at(self, name: str) -> "_Reader":
        return _Reader(self.where, f"{self.path}.{name}" if self.path else name)

    @property
    def place(self) -> str:
        return f"{self.where}: {self.path}" if self.path else self.where

    def wrong(self, expected: str, found: Any) -> InputError:
        return InputError(f"{self.place}: expected {expected}, found {_shown(found)}")


_NAMES = {str: "a non-empty string", int: "an integer", float: "a number", bool: "true or false"}


def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


def _mapping(content: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{place}: expected an object, found {_shown(content)}")
    return content


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


class StrictObject:
    """A JSON object with a fixed set of keys; reads fields and reports errors by JSON path."""

    def __init__(self, value: Any, path: str, keys: Collection[str] | None = None) -> None:
        """Constraint the object itself.

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

"""Strict reading of what comes from outside: a mapping becomes a dataclass, or an error says why.

Every key must be known (the error for another names the nearest one), every value of the type
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
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from upperson_rt.errors import InputError, UppersonError
from upperson_rt.files import read_bounded
from upperson_rt.printable import safe_repr, shortened

T = TypeVar("T")
_MOST_NAMES = 100
_MOST_JSON_BYTES = 64 << 20
"""The largest that is known is the tokenizer of SigLIP 2, 34 MB."""


@dataclass(frozen=True)
class Constraint:
    """A bound on a field's value, put beside its type: ``Annotated[int, Constraint(...)]``."""

    holds: Callable[[Any], bool]
    """Called with a value of the right type."""
    expected: str
    """What the message asks for, such as ``an integer of at least 1``."""


_IS_COUNT = Constraint(lambda value: value >= 0, "an integer of at least 0")
_IS_POSITIVE = Constraint(lambda value: value >= 1, "an integer of at least 1")
_IS_SHA256 = Constraint(
    lambda value: len(value) == 64 and set(value) <= set("0123456789abcdef"),
    "64 lower-case hex digits",
)
Count: TypeAlias = Annotated[int, _IS_COUNT]
Positive: TypeAlias = Annotated[int, _IS_POSITIVE]
Sha256: TypeAlias = Annotated[str, _IS_SHA256]


def suggestion(name: str, known: Collection[str]) -> str:
    """Return ``did you mean 'x'?`` for a near match, else the list of what is known."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {safe_repr(near[0])}?"
    names = [shortened(one) for one in sorted(known)[:_MOST_NAMES]]
    return f"known: {', '.join(names)}{'' if len(known) <= _MOST_NAMES else ' and more'}"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file in UTF-8."""
    try:
        text = read_bounded(path, _MOST_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"cannot read {os.fspath(path)}: no text in UTF-8", code="no_utf8", path=str(path)
        ) from error
    return parse_json(text, os.fspath(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; errors as for `read_json`, which name ``where``. No object has a key twice."""
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repetition
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}", code="no_json") from error


def require_version(content: Any, where: str, versions: Collection[int], advice: str) -> None:
    """Look at the key ``schema_version`` before anything else is read."""
    found = _Reader(where).field(Positive, _Reader(where).mapping(content), "schema_version")
    if found not in versions:
        message = f"{where}: schema_version: this file has version {found}, this program reads up "
        message += f"to {max(versions)}: {advice}"
        raise InputError(message, code="version_unknown", found=found)


def read_fields(kind: type[T], content: Any, where: str) -> T:
    """Build a dataclass from a mapping whose keys are its fields; ``where`` names the file.

    An `UppersonError` of its own checks gets the path put in front.
    """
    return _Reader(where).fields(kind, content)


def require_values(kind: type[Any], content: Mapping[str, Any], where: str) -> None:
    """Raise what `read_fields` does for keys and values that are there; any may be missing."""
    _Reader(where).values(kind, content)


@dataclass(frozen=True)
class _Reader:
    where: str
    path: str = ""

    def fields(self, kind: type[T], content: Any) -> T:
        required = {field.name for field in dataclasses.fields(kind) if _is_required(field)}  # type: ignore[arg-type]
        values = self.values(kind, content, required)
        try:
            return kind(**values)
        except UppersonError as error:
            fields = {"at": self.path} | error.fields
            raise type(error)(f"{self.place}: {error}", code=error.code, **fields) from error

    def values(
        self, kind: type[Any], content: Any, required: Collection[str] = ()
    ) -> dict[str, Any]:
        hints = _hints(kind)
        given = self.mapping(content)
        for key in given:
            if key not in hints:
                near = suggestion(str(key), hints)
                message = f"{self.place}: unknown key {safe_repr(str(key))}, {near}"
                fields = {"at": self.path, "key": shortened(str(key))}
                raise InputError(message, code="key_unknown", **fields)
        return {
            name: self.field(hint, given, name)
            for name, hint in hints.items()
            if name in given or name in required
        }

    def field(self, hint: Any, content: Mapping[str, Any], name: str) -> Any:
        at = self.at(name)
        if name not in content:
            raise InputError(f"{at.place}: missing", code="key_missing", at=at.path)
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
            given = self.mapping(value)
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

    def mapping(self, content: Any) -> Mapping[str, Any]:
        if not isinstance(content, Mapping):
            raise self.wrong("an object", content)
        return content

    def at(self, name: str) -> "_Reader":
        name = shortened(name)
        return _Reader(self.where, f"{self.path}.{name}" if self.path else name)

    @property
    def place(self) -> str:
        return f"{self.where}: {self.path}" if self.path else self.where

    def wrong(self, expected: str, found: Any) -> InputError:
        message = f"{self.place}: expected {expected}, found {safe_repr(found)}"
        return InputError(message, code="value_unfit", at=self.path, expected=expected)


_NAMES = {str: "a non-empty string", int: "an integer", float: "a number", bool: "true or false"}


def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; of a key that is there twice each reader would take another value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, _ in pairs:
            if name not in found:
                raise ValueError(f"the key {safe_repr(name)} is there twice in one object")
            del found[name]
    return found

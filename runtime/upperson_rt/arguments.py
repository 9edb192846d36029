"""Arguments of public functions, checked where they come in.

Each check returns the value as a plain one of Python: numbers and texts of numpy are welcome, too.
What a type checker would have found is refused as well, since not everybody runs one.
"""

import dataclasses
import errno
import json
import math
import operator
import os
from collections.abc import Collection, Iterable, Sequence
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.printable import safe_repr, visible_text

LATEST_UNIX_S = 1e11
"""The year 5138; unix times in milliseconds are beyond."""

LONGEST_PATH = 4096
"""Characters; Linux opens no longer one, and messages name paths whole."""

_MOST = 2**31 - 1
_NUMBERS = (float, int, Real)  # The first two by their type, Real by a search.


def check_text(value: object, what: str, error: type[UppersonError] = InputError) -> str:
    """Return a text that is Unicode: no lone surrogates, which stand for bytes that are no text."""
    if type(value) is str and value.isascii():
        return value
    if not isinstance(value, str):
        raise error(f"{what} must be a text, found {safe_repr(value)}", code="no_text", what=what)
    text = str.__str__(value)  # What an enumeration or numpy derives from it is shown otherwise.
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise error(
            f"{what} is not valid Unicode: {safe_repr(value)}", code="no_unicode", what=what
        ) from problem
    return text


def check_name(value: object, what: str, error: type[UppersonError] = InputError) -> str:
    """Return a text that every store can keep: Unicode, to be seen, without null characters."""
    text = check_text(value, what, error)
    if "\0" in text or not visible_text(text):
        found = "holds a null character" if "\0" in text else "has no visible character"
        raise error(f"{what} {found}: choose another name", code="no_name", what=what)
    return text


def is_finite(value: object) -> bool:
    """Return whether a value is a number, of Python or numpy, neither NaN nor infinite."""
    if not isinstance(value, _NUMBERS):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer or a fraction that float cannot hold.
        return True


def check_number(
    value: object,
    what: str,
    error: type[UppersonError] = UsageError,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """Return a number from ``least`` to ``most``, which may be infinite; never NaN."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.nan
    if not least <= number <= most:
        if least == -math.inf and most == math.inf:
            message = f"{what} must be a number, found {safe_repr(value)}"
            raise error(message, code="no_number", what=what)
        limit = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
        message = f"{what} must be a number {limit}, found {safe_repr(value)}"
        raise error(message, code="out_of_range", what=what)
    return number


def check_count(
    value: object,
    what: str,
    error: type[UppersonError] = UsageError,
    least: int = 1,
    most: int | None = _MOST,
) -> int:
    """Return a whole number from ``least`` to ``most``, or of any size for None."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        message = f"{what} must be a whole number, found {safe_repr(value)}"
        raise error(message, code="no_whole_number", what=what) from None
    if number < least or (most is not None and number > most):
        limit = f"be at least {least}" if number < least else f"be at most {most}"
        if most is not None and most < _MOST:
            limit = f"be from {least} to {most}"
        if number < least == 0:
            limit = "not be negative"
        raise error(f"{what} must {limit}, got {safe_repr(value)}", code="out_of_range", what=what)
    return number


def check_fields(settings: Any, error: type[UppersonError] = UsageError) -> None:
    """Check that fields of a dataclass that are declared as numbers or as bool hold such values.

    One that is declared as ``float | None`` or the like may also hold None.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        is_union = get_origin(field.type) in (UnionType, Union)
        kind, *others = get_args(field.type) if is_union else (field.type,)
        if value is None and NoneType in others:
            continue
        if kind is bool and type(value) is not bool:
            message = f"{field.name} must be True or False, found {safe_repr(value)}"
            raise error(message, code="no_bool", what=field.name)
        if kind is float:
            check_number(value, field.name, error)
        elif kind is int:
            check_count(value, field.name, error, least=-_MOST)


def check_list(value: object, what: str, error: type[UppersonError] = InputError) -> list[Any]:
    """Return the elements of anything but a text, whose letters would count as elements."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike):
        try:
            return list(value)
        except TypeError:  # An array of numpy without dimensions says that it is iterable.
            pass
    message = f"{what} must be a list, found {safe_repr(value)}: put a single one in a list"
    raise error(message, code="no_list", what=what)


def check_choice(
    value: object, what: str, known: Collection[str], error: type[UppersonError] = UsageError
) -> None:
    """Refuse what is none of some names; an array would be compared with each letter of them."""
    if not isinstance(value, str) or value not in known:
        message = f"{what} must be one of {', '.join(known)}, found {safe_repr(value)}"
        raise error(message, code="choice_unknown", what=what)


def check_callable(value: object, what: str) -> None:
    """Refuse what cannot be called, before any work is done."""
    if not callable(value):
        message = f"{what} must be a function or an object to call, found {safe_repr(value)}"
        raise UsageError(message, code="not_callable", what=what)


def check_object(value: object, what: str, names: Collection[str]) -> None:
    """Refuse an object without the attributes that are used; its class does not matter."""
    if isinstance(value, type) or not all(hasattr(value, name) for name in names):
        message = f"expected {what}, found {safe_repr(value)}"
        raise UsageError(message, code="wrong_object", what=what)


def check_path(value: object, what: str) -> str:
    """Return a path as text."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    message = f"{what} must be a path, found {safe_repr(value)}"
    no_path = InputError(message, code="no_path", what=what)
    if not isinstance(path, str) or not path or "\0" in path:
        raise no_path
    try:
        os.stat(path)
    except UnicodeEncodeError as error:
        raise no_path from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            name = safe_repr(path) if error.errno == errno.ENAMETOOLONG else path
            message = f"cannot use {what} {name}: {error.strerror}"
            raise InputError(message, code="path_unusable", what=what) from error
    return path


def read_attributes(
    pairs: Sequence[str] | None, option: str
) -> dict[str, str | int | float | bool]:
    """Read ``KEY=VALUE`` pairs: numbers, true and false as such, ``"5"`` in quotes as text."""
    found: dict[str, str | int | float | bool] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not key or not equals or key in found:
            problem = "is there twice" if key in found else "is not KEY=VALUE"
            raise UsageError(f"{option} {pair} {problem}: write for example  {option} gate=north")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        usable = isinstance(value, str | int | float) and not (
            isinstance(value, float) and not math.isfinite(value)
        )
        found[key] = value if usable else text
    return found

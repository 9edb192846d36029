"""Fuzz targets: odd values for public functions, damage for file readers, and how long to try.

Within ``make test`` every target tries a few examples, the same ones every time. With
``UPPERSON_FUZZ_S`` set, which ``make fuzz`` does, they try new ones for so many seconds together.
"""

import copy
import enum
import functools
import json
import os
import time
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from upperson_rt.errors import UppersonError
from upperson_rt.printable import escape_for_display

SECONDS = float(os.environ.get("UPPERSON_FUZZ_S", "0"))
"""How long all targets run; 0 for a few fixed examples."""

share = {"seconds": SECONDS}
"""How long each target runs, by `tests/fuzz/conftest.py`."""

counts = {}
"""Executions of each target so far, by name."""

HUGE = [10**400, -(10**400), 10**5000, 2**31, 2**63, 2**64, 1e20, 1e308, -1e308]
ODD_NUMBERS = [0, -1, 1, 1.5, -0.0, float("nan"), float("inf"), float("-inf"), *HUGE]
ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\udcff", "\ud800", "\x1b]0;x\x07", "\n", "\u202e", "[red]x", "a/../b",
    "../../etc/passwd", "x" * 300, "x" * 70_000, "nan", "1e400", "9" * 5000, "%s%n", "{}", "'\"`",
    "a" + "\u0301" * 200, "\N{PILE OF POO}", "true", "null", "-", "--", "0", "é",
]  # fmt: skip


class Text(str, enum.Enum):
    """A text that is shown as something else."""

    GATE = "gate"


class Odd:
    def __repr__(self):
        return "\x1b[2J\n" * 100


class Nested(list):
    """Lists in lists, which reports show by their depth."""

    def __repr__(self):
        return f"nested({self.depth})"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))


def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    value = Nested(value)
    value.depth = depth
    return value


ODD_OBJECTS = [
    None, True, b"", b"\xff\xfe", Odd(), Odd, object(), (), [], {}, {1: 2}, {"a": Odd()}, set(),
    nested(100), nested(3000), 1j, range(3), Path("x"), Path("a\0b"), np.float32(1.5), np.int64(-7),
    np.str_("gate"), Text.GATE, np.float64(1e9),
    np.array(3), np.zeros((0, 4)), np.ones((2, 2, 2)), np.array(["a"]), np.array([Odd()]),
    np.datetime64("2026-01-01"),
]  # fmt: skip

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(codec=None), max_size=20))
numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(), st.floats())
plain = st.one_of(texts, numbers, st.sampled_from(ODD_OBJECTS))
values = st.one_of(
    plain,
    st.lists(plain, max_size=5),
    st.dictionaries(st.one_of(texts, st.integers()), plain, max_size=4),
    st.tuples(plain, plain, plain, plain),
)
"""Anything at all."""


def mostly(*usual):
    """Mostly values that a function takes, so that the odd ones get past the first check."""
    return st.one_of(st.sampled_from(usual), st.sampled_from(usual), values)


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from(HUGE[:2])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged_json(draw, document):
    """A document with some of its nodes replaced, renamed, removed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        holder = document
        while True:
            places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            inner = holder[place]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                holder = inner
                continue
            what = draw(st.sampled_from(["replace", "remove", "rename", "double"]))
            if what == "replace" or not isinstance(holder, dict):
                holder[place] = draw(json_values)
            elif what == "remove":
                del holder[place]
            else:
                holder[draw(texts)] = inner if what == "double" else holder.pop(place)
            break
    return document


@st.composite
def damaged_bytes(draw, originals):
    """One of some files with bytes changed, cut off, doubled, or with tokens put in."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        what = draw(st.sampled_from(["byte", "bit", "cut", "insert", "double", "zero"]))
        if what == "insert":
            content[at:at] = draw(
                st.one_of(
                    st.binary(max_size=8),
                    st.sampled_from(
                        [b"\xff" * 4, b"\0" * 8, b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b'"']
                    ),
                )
            )
        elif what == "cut":
            del content[at : at + draw(st.integers(1, 64))]
        elif what == "double":
            part = content[at : at + 64]
            content[at:at] = part
        elif content:
            part = slice(at, at + (1 if what in ("byte", "bit") else 16))
            if what == "bit":
                content[at] ^= 1 << draw(st.integers(0, 7))
            else:
                fill = draw(st.integers(0, 255)) if what == "byte" else 0
                content[part] = bytes([fill]) * len(content[part])
    return bytes(content)


def as_json(document):
    """Text of a document that may not be valid JSON: NaN, surrogates, numbers of any size."""
    try:
        return json.dumps(document)
    except ValueError:  # More digits than Python writes.
        return '{"digits": ' + "9" * 5000 + "}"


def refused_well(call, *arguments, **named):
    """Return what a call gives, or the error of ours with which it refuses, in one line."""
    try:
        return call(*arguments, **named)
    except UppersonError as error:
        refusal = error
    message = escape_for_display(str(refusal))
    assert message, type(refusal)
    assert len(message) < 5000, f"{type(refusal)}: {message[:200]}..."
    assert message.isprintable() or message.count("\n") == 0
    assert refusal.exit_code in (2, 3, 4, 5, 6)
    return refusal


def fuzz(examples=25, **strategies):
    """Make a fuzz target of a test: its named arguments are drawn, all others are fixtures."""

    def decorate(test):
        def count(*fixtures, **drawn):
            counts[test.__name__] = counts.get(test.__name__, 0) + 1
            test(*fixtures, **drawn)

        count = functools.wraps(test)(count)
        common = settings(
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
        )
        if not SECONDS:
            few = settings(common, derandomize=True, max_examples=examples)
            return few(given(**strategies)(count))
        some = settings(common, max_examples=20)
        first = some(given(**strategies)(count))
        phases = [phase for phase in common.phases if phase != Phase.explicit]
        others = settings(some, phases=phases)(given(**strategies)(count))

        @functools.wraps(first)
        def until_time_is_up(*fixtures, **named):
            until = time.monotonic() + share["seconds"]
            first(*fixtures, **named)
            while time.monotonic() < until:
                others(*fixtures, **named)

        return until_time_is_up

    return decorate


def examples(usual, *changes):
    """Try a usual call, and others that differ from it."""

    def decorate(test):
        for change in ({}, *changes):
            test = example(**usual | change)(test)
        return test

    return decorate

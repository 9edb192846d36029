"""Filters of searches: topic expressions, and the dialect of XPath of the search specification.

    boolean(//Track[TrackType = "Metadata"]) and not(contains(//Source/Name, "hall"))
    boolean(//tt:SimpleItem[@Name="IsDataPresent" and @Value="true"])

Prefixes of names are not looked at. A malformed filter raises the FaultError InvalidFilterFault.
"""

import operator
import re
from collections.abc import Callable
from typing import TypeAlias
from xml.etree.ElementTree import Element

from upperson_console.onvif.soap import FaultError, invalid, unix_time
from upperson_rt.printable import safe_repr

Test: TypeAlias = Callable[[Element], bool]
TopicTest: TypeAlias = Callable[[str], bool]
CONCRETE_SET = "http://www.onvif.org/ver10/tev/topicExpression/ConcreteSet"
_TOPIC_DIALECTS = {CONCRETE_SET, "http://docs.oasis-open.org/wsn/t-1/TopicExpression/Concrete"}
_CONTENT_DIALECT = "http://www.onvif.org/ver10/tev/messageContentFilter/ItemFilter"
_LONGEST = 1000
_DEEPEST = 50
_TOKEN = re.compile(r"""\s*(//?|[][(),]|[!<>]=|[=<>]|"[^"]*"|'[^']*'|@?(?:[\w.-]+:)?[\w.-]+)""")
_TOPIC = re.compile(r"\s*((?:[\w.-]+:)?[\w.-]+(?:/(?:[\w.-]+:)?[\w.-]+)*)(//\.)?\s*")
_ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def _malformed(what: str, value: str) -> FaultError:
    return invalid(f"{what} cannot be read: {safe_repr(value)}", "InvalidFilterFault")


def read_expression(name: str, value: str) -> Test:
    """Read an expression; return whether it is true of an element."""
    if len(value) > _LONGEST or value.count("(") + value.count("[") > _DEEPEST:
        raise invalid(f"{name} is too long", "InvalidFilterFault")
    tokens = _TOKEN.findall(value)
    if _TOKEN.sub("", value).strip():
        raise _malformed(name, value)
    parser = _Parser(tokens)
    try:
        test = parser.any_of(parser.call)
        parser.take("")
    except ValueError as error:
        raise _malformed(name, value) from error
    return test


def read_event_filter(given: Element) -> tuple[TopicTest, Test]:
    """Read the filter of an event search; return whether it takes a topic, and a message."""
    topics: list[TopicTest] = []
    contents: list[Test] = []
    for one in given:
        name, dialect = one.tag.rpartition("}")[2], one.get("Dialect", "")
        value = (one.text or "").strip()
        if name == "TopicExpression" and dialect in _TOPIC_DIALECTS:
            topics.append(_read_topics(value))
        elif name == "MessageContent" and dialect == _CONTENT_DIALECT:
            contents.append(read_expression(name, value))
        else:
            raise _malformed("a filter or its dialect", f"{name} {dialect}")
    return (
        lambda topic: all(test(topic) for test in topics),
        lambda message: all(test(message) for test in contents),
    )


def _read_topics(value: str) -> TopicTest:
    found = [_TOPIC.fullmatch(one) for one in value.split("|")]
    if len(value) > _LONGEST or not all(found):
        raise _malformed("TopicExpression", value)
    wanted = [(_plain(one[1]), one[2] is not None) for one in found if one is not None]

    def test(topic: str) -> bool:
        steps = _plain(topic)
        return any(
            steps == path or (has_below and steps[: len(path)] == path)
            for path, has_below in wanted
        )

    return test


def _plain(path: str) -> list[str]:
    return [step.rpartition(":")[2] for step in path.split("/")]


class _Parser:
    """A parser by recursive descent; its methods raise ValueError."""

    def __init__(self, tokens: list[str]) -> None:
        self._left = ["", *reversed(tokens)]

    def take(self, *wanted: str) -> str:
        """Return the next token, which is one of some, or any."""
        found = self._left.pop() if len(self._left) > 1 else ""
        if wanted and found not in wanted:
            raise ValueError(found)
        return found

    def any_of(self, primary: Callable[[], Test]) -> Test:
        """Read tests that are joined by ``and`` and ``or``."""
        alternatives = [[self._negatable(primary)]]
        while self._left[-1] in ("and", "or"):
            if self.take() == "or":
                alternatives.append([])
            alternatives[-1].append(self._negatable(primary))
        return lambda node: any(all(test(node) for test in both) for both in alternatives)

    def _negatable(self, primary: Callable[[], Test]) -> Test:
        if self._left[-1] not in ("not", "("):
            return primary()
        is_negated = self.take() == "not"
        if is_negated:
            self.take("(")
        inner = self.any_of(primary)
        self.take(")")
        return lambda node: inner(node) != is_negated

    def call(self) -> Test:
        """Read ``boolean(path)`` or ``contains(path, "text")``."""
        kind = self.take("boolean", "contains")
        self.take("(")
        select = self._path()
        text = ""
        if kind == "contains":
            self.take(",")
            text = self._text()
        self.take(")")
        if kind == "boolean":
            return lambda node: bool(select(node))
        return lambda node: any(text in (one.text or "") for one in select(node))

    def _path(self) -> Callable[[Element], list[Element]]:
        is_anywhere = self.take("/", "//") == "//"
        steps = [self._name()]
        while self._left[-1] == "/":
            self.take()
            steps.append(self._name())
        test: Test = lambda node: True  # noqa: E731 - Of a path without a condition.
        if self._left[-1] == "[":
            self.take()
            test = self.any_of(self._comparison)
            self.take("]")

        def select(root: Element) -> list[Element]:
            found = [one for one in (root.iter() if is_anywhere else [root]) if _is(one, steps[0])]
            for step in steps[1:]:
                found = [inner for one in found for inner in one if _is(inner, step)]
            return [one for one in found if test(one)]

        return select

    def _comparison(self) -> Test:
        is_attribute = self._left[-1].startswith("@")
        name = self._name()
        comparison, value = self.take("=", "!=", *_ORDERS), self._text()

        def test(node: Element) -> bool:
            if is_attribute:
                texts = [node.attrib[name]] if name in node.attrib else []
            else:
                texts = [(one.text or "").strip() for one in node if _is(one, name)]
            return any(_compare(text, comparison, value) for text in texts)

        return test

    def _name(self) -> str:
        found = self.take().lstrip("@").rpartition(":")[2]
        if not found or found[0] in "/[](),=!<>\"'":
            raise ValueError(found)
        return found

    def _text(self) -> str:
        found = self.take()
        if found[:1] not in ('"', "'"):
            raise ValueError(found)
        return found[1:-1]


def _is(node: Element, name: str) -> bool:
    return node.tag.rpartition("}")[2] == name


def _compare(one: str, comparison: str, other: str) -> bool:
    """Compare texts; by order only numbers, or times."""
    if comparison in ("=", "!="):
        return (one == other) == (comparison == "=")
    left, right = _number(one), _number(other)
    return left is not None and right is not None and bool(_ORDERS[comparison](left, right))


def _number(text: str) -> float | None:
    try:
        return unix_time("", text) if "T" in text else float(text)
    except (ValueError, FaultError):
        return None

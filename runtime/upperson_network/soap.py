"""XML of SOAP messages from other machines, read without document types.

Entities, the bombs made of them and files from elsewhere all need a document type, and no message
of SOAP has one. The caller bounds the length of what it gives.
"""

from typing import NoReturn
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

ENVELOPE = "http://www.w3.org/2003/05/soap-envelope"


class _Builder(TreeBuilder):
    root: Element | None = None

    def start(self, tag: str, attributes: dict[str, str], /) -> Element:
        element = super().start(tag, attributes)
        self.root = element if self.root is None else self.root
        return element

    def doctype(self, *_: object) -> NoReturn:
        raise ValueError("a document type is not taken")


def parse_xml(content: bytes | bytearray, *, encoding: str | None = None) -> Element:
    """Return the root of a message; ``encoding`` goes before what the message says of its own.

    Raises:
        ValueError: It is no XML, or has a document type.
    """
    root = parse_beginning(content, encoding=encoding, is_whole=True)
    assert root is not None  # Else it would not be well-formed.
    return root


def parse_beginning(
    content: bytes | bytearray, *, encoding: str | None = None, is_whole: bool = False
) -> Element | None:
    """Return the root of a message as far as its content goes; None if there is none yet.

    Raises:
        ValueError: It is no XML, or has a document type.
    """
    if b"<!DOCTYPE" in content:  # Before the parser sees it, which would read on after an error.
        raise ValueError("a document type is not taken")
    builder = _Builder()
    parser = XMLParser(target=builder, encoding=encoding)
    try:
        parser.feed(content)
        if is_whole:
            parser.close()
    except ParseError as error:
        raise ValueError(f"it is not well-formed: {error}") from error
    except LookupError as error:
        raise ValueError("its encoding is unknown") from error
    return builder.root

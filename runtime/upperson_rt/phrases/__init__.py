"""Sentences about people, taken apart by a small grammar."""

from upperson_rt.phrases.grammar import ParsedSentence, parse, parse_query
from upperson_rt.phrases.lexicon import Kind, Phrase

__all__ = ["Kind", "ParsedSentence", "Phrase", "parse", "parse_query"]

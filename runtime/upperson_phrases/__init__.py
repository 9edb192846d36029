"""Sentences about people, taken apart by a small grammar. Knows no model and no gallery."""

from upperson_phrases.grammar import ParsedSentence, parse, parse_query
from upperson_phrases.lexicon import Kind, Phrase

__all__ = ["Kind", "ParsedSentence", "Phrase", "parse", "parse_query"]

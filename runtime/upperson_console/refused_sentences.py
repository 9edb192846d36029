"""Phrases that a sentence may not have, by category.

The list finds common English words. It is a help, no guarantee: other words, other languages and
pictures pass.
"""

import html
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import TypeAlias

from upperson_settings.yaml_file import parse_yaml

Phrases: TypeAlias = list[tuple[str, "re.Pattern[str]"]]
"""Category and pattern, over text as `found_in` makes it."""
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[,.;:]")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07\u00b4`", "'"))
_END = "(?=(?:'s)? )"


@cache
def built_in_phrases() -> Phrases:
    """Return the phrases of ``refused_sentences.yaml``."""
    file = Path(__file__).with_name("refused_sentences.yaml")
    content = parse_yaml(file.read_bytes(), file)
    person = content["person"].replace("| ", "|")
    return [
        (category, re.compile(f" (?:{one.replace('| ', '|').replace('{person}', person)}){_END}"))
        for category, patterns in content["categories"].items()
        for one in patterns
    ]


def extra_phrases(phrases: tuple[str, ...]) -> Phrases:
    """Return an administrator's phrases; ``*`` in a word stands for any letters."""
    found = []
    for phrase in phrases:
        words = re.findall(r"[^\W_*]+|\*+|\s+", phrase.casefold())
        text = "".join(r"\w*" if "*" in one else " " if one.isspace() else one for one in words)
        found.append(("extra", re.compile(f" {text.strip()}{_END}")))
    return found


def found_in(sentence: str, phrases: Phrases) -> tuple[str, str] | None:
    """Return category and words of the first phrase that a sentence has, or None."""
    plain = unicodedata.normalize("NFKC", html.unescape(html.unescape(sentence)))  # As tokenizers.
    plain = "".join(one for one in plain if unicodedata.category(one) != "Cf")
    text = f" {' '.join(_WORD.findall(plain.casefold().translate(_APOSTROPHES)))} "
    for category, pattern in phrases:
        if found := pattern.search(text):
            return category, found[0].strip()
    return None

"""Rewrites sentences as people write them into the wording that models and the grammar know.

Captions, which models learned from, describe one person in full words: *a woman in a red coat*.
People also write *women in red coats*, *w/o hat*, *non-red coat*, *anything but jeans* or *red or
blue coat*. Each rule changes a few words and leaves the rest, character for character.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from upperson_phrases.lexicon import (
    COLOURS,
    ENDS,
    EXCLUDING,
    MODIFIERS,
    NOUN_OF,
    PERSON_PLURALS,
    noun_of,
    singulars,
)

_COLOUR = "|".join(sorted((" ".join(words) for words in COLOURS), key=len, reverse=True))
_BUT = r"(?:but|except|other than)"
_SHORT_FORMS = (
    (
        re.compile(
            r"^\s*(?:please[, ]+|(?:can|could) you (?:please )?|(?:find|show)(?: me)? |(?:are|is) "
            r"there (?:any |an? )?|(?:i am |i'm )?look(?:ing)? for )+(?=\w)",
            re.I,
        ),
        "",
    ),
    (re.compile(r"\bwith[- ]out\b", re.I), "without"),
    (re.compile(r"\beither (?=.{1,100}\bor\b)", re.I), ""),
    (re.compile(rf"\b({_COLOUR}) or (?:an?|the) (?=(?:{_COLOUR})\b)", re.I), r"\1 or "),
    (re.compile(r"\bw\s?/\s?o(?:ut)?\b\.?", re.I), "without"),
    (re.compile(r"\bw\s?/\s?(?=a\b|\w\w)", re.I), "with "),
    (re.compile(r"\bbare[- ]headed\b", re.I), "bareheaded"),
    (re.compile(r"\b(hat|bag)[- ]less\b", re.I), r"\1less"),
    (re.compile(r"\b(?:sans|excluding)\b", re.I), "without"),
    (
        re.compile(r"\b((?:every|any)(?:one|body)),? (?:but|except(?: for)?)\b", re.I),
        r"\1 without",
    ),
    (re.compile(rf"\b(?:in|of) any colou?r {_BUT}\b", re.I), "that is not"),
    (
        re.compile(rf"\bany ((?:\w+ )?\w+) {_BUT} (?=(?:{_COLOUR})(?:$|[,.;]))", re.I),
        r"a \1 that is not ",
    ),
    (re.compile(rf"\b(?:that|which) (?:is|are) anything {_BUT}\b", re.I), "that is not"),
    (
        re.compile(rf"(?<=\w),?(?: but)? not (?:an?|the) ({_COLOUR}) one\b", re.I),
        r" that is not \1",
    ),
    (
        re.compile(rf"(?<=\w),? (?:except|other than)(?= (?:{_COLOUR})(?:$|[,.;]| and\b))", re.I),
        " that is not",
    ),
    (
        re.compile(rf"\b({_COLOUR}), (?=(?:(?:{_COLOUR}), ){{0,3}}(?:{_COLOUR}),? or )", re.I),
        r"\1 or ",
    ),
)
_ANYTHING_BUT = re.compile(
    rf"\b(?:(?:in|with|wearing|carrying) )?(?:any|every)thing {_BUT}\b", re.I
)
_NO_COLOUR = re.compile(
    r"(?:\b(?P<no>without|(?:not|never|(?:is|are|was|does|do|did)n['\u2019]?t) "
    r"(?:(?:wear|wearing|wears|in|dressed in|clad in)\b ?)+)(?: ?any(?:thing)?)?"
    r"|\b(?:in )?(?:nothing|neither))"
    rf" (?P<colour>(?:{_COLOUR})(?:(?:, | or | nor | and |, or )(?:{_COLOUR}))*)"
    rf"(?=\s*(?:$|[,.;!?)]|\b(?:but|with|carrying|holding)\b|\band\b(?! (?:{_COLOUR})\b)))",
    re.I,
)
_NOT_COLOUR = re.compile(r"\b(?:non[- ]|(?<=\b(?:an|in) )not\s+|(?<=\ba )not\s+)(?=\w)", re.I)
_OF_PEOPLE = (
    "young", "younger", "old", "older", "elderly", "tall", "short", "slim", "thin", "big", "small",
)  # fmt: skip
_PEOPLE = re.compile(
    r"(?P<lead>\s*(?:(?:please|find|show|search|look|looking|me|us|for|the)\s+)*)"
    r"(?:(?:all(?: the)?|two|three|four|several|some|many|\d+)\s+)?"
    rf"(?P<which>(?:(?:{'|'.join(_OF_PEOPLE)})\s+){{0,3}})"
    rf"(?P<people>{'|'.join(PERSON_PLURALS)})\b(?!['\u2019])",
    re.I,
)
_WORD = re.compile(r"[^\W_]+")
_MARK = re.compile(r"[^\w\s-]")
_OR = re.compile(r"(?<=\w) or (?=\w)", re.I)
MOST_ALTERNATIVES = 4
_MOST_WORDS = 8
"""Of a colour and its thing."""
_CLAUSE = 100
"""Characters before an *or* in which an excluding word reaches it."""


def plain_wording(sentence: str) -> str:
    """Return a sentence in the wording of captions; the sentence itself if no rule applies."""
    for pattern, replacement in _SHORT_FORMS:
        sentence = pattern.sub(replacement, sentence)
    sentence = _ANYTHING_BUT.sub(_without, sentence)
    sentence = _NO_COLOUR.sub(_without_clothes, sentence)
    return _one_person(_colours_behind(sentence))


def _without(match: re.Match[str]) -> str:
    """Rewrite *in anything but jeans*, but not *not carrying anything but a bag*."""
    before = match.string[max(0, match.start() - _CLAUSE) : match.start()]
    return match[0] if _is_excluded(before) else "without"


def _without_clothes(match: re.Match[str]) -> str:
    """Rewrite *not in black* as *without black clothes*: what is excluded needs a thing."""
    colour = re.sub(r" (?:nor|and) ", " or ", match["colour"], flags=re.I)
    return f"{(match['no'] or 'without').rstrip()} {colour} clothes"


def alternatives(sentence: str) -> list[str]:
    """Return the sentences that *or* between colours stands for: *red coat* and *blue coat*.

    The sentence alone if it has no such *or*; at most `MOST_ALTERNATIVES`.
    """
    found, done = [sentence], list[str]()
    while found and len(found) + len(done) < MOST_ALTERNATIVES:
        one = found.pop(0)
        split = next(_colour_choices(one), None)
        if split is None:
            done.append(one)
        else:
            found += split
    return [*dict.fromkeys(done + found)]


def _colour_choices(sentence: str) -> Iterator[list[str]]:
    """Give for each *or* between two colours the sentence with either."""
    for match in _OR.finditer(sentence):
        start = max(0, match.start() - _CLAUSE)
        left = [*_WORD.finditer(sentence, start, match.start())]
        right = [*islice(_WORD.finditer(sentence, match.end()), 2)]
        first, last = _length_of_colour(left[-2:], at_end=True), _length_of_colour(right)
        if not first or not last:
            continue
        before = sentence[start : left[-first].start()].rstrip().lower()
        after = sentence[right[last - 1].end() :].lstrip().lower()
        is_group = before.endswith((",", "/", " and")) or after.startswith((",", "/", "and "))
        if not is_group and not _is_excluded(sentence[start : match.start()]):
            yield [
                sentence[: match.start()] + sentence[right[last - 1].end() :],
                sentence[: left[-first].start()] + sentence[match.end() :],
            ]


def _length_of_colour(words: Sequence[re.Match[str]], *, at_end: bool = False) -> int:
    """Return how many words a colour has at the beginning or the end of some, or 0."""
    for size in (2, 1):
        part = words[-size:] if at_end else words[:size]
        if tuple(word[0].lower() for word in part) in COLOURS:
            return len(part)
    return 0


def _is_excluded(before: str) -> bool:
    """Whether an excluding word reaches over these characters: *without a red or blue bag*."""
    clause = re.split(rf"[{re.escape(''.join(ENDS))}]|\band\b", before)[-1]
    return not EXCLUDING.isdisjoint(clause.lower().split())


def _colours_behind(sentence: str) -> str:
    """Rewrite *a non-red coat* and *a not red coat* as *a coat that is not red*."""
    for match in reversed([*_NOT_COLOUR.finditer(sentence)]):
        mark = _MARK.search(sentence, match.end())
        until = len(sentence) if mark is None else mark.start()
        words = [*islice(_WORD.finditer(sentence, match.end(), until), _MOST_WORDS)]
        size = _length_of_colour(words)
        thing = _end_of_thing([word[0].lower() for word in words[size:]])
        if not size or not thing:
            continue
        colour = sentence[words[0].start() : words[size - 1].end()]
        end = words[size + thing - 1].end()
        noun = sentence[words[size].start() : end]
        sentence = f"{sentence[: match.start()]}{noun} that is not {colour}{sentence[end:]}"
    return sentence


def _end_of_thing(words: list[str]) -> int:
    """Return how many words *long leather coat* has at the beginning of some, or 0."""
    for first, word in enumerate(words):
        for size in (3, 2, 1):
            name = tuple(words[first : first + size])
            if len(name) == size and noun_of(name):
                return first + size
        if word not in MODIFIERS:
            break
    return 0


def _one_person(sentence: str) -> str:
    """Rewrite *women in red coats* as *woman in red coat*: captions describe one person."""
    people = _PEOPLE.match(sentence)
    if people is None:
        return sentence

    def one(match: re.Match[str]) -> str:
        word = match[0].lower()
        if word in PERSON_PLURALS:
            return PERSON_PLURALS[word]
        if (word,) in NOUN_OF:
            return match[0]
        found = (one for one in singulars(word) if (one,) in NOUN_OF)
        return match[0][: len(next(found, word))]

    return (
        people["lead"]
        + people["which"]
        + PERSON_PLURALS[people["people"].lower()]
        + _WORD.sub(one, sentence[people.end() :])
    )

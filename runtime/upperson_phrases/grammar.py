"""A small grammar of how people describe people: which words belong together, and what is excluded.

No model and no list of sentences: nouns of `lexicon` are found, what stands before a noun joins it,
and so does what is said of it afterwards (*with black buttons*, *in a ponytail*, *are white*). It
works word by word in linear time and never fails; what it does not know stays whole.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from upperson_phrases.exclusions import ARTICLES, Exclusions, without_cuts
from upperson_phrases.lexicon import (
    ACTIONS,
    BODY_PLACES,
    COLOURS,
    DETAILS,
    ENDS,
    EXCLUDING,
    KINDS_OF,
    MODIFIERS,
    PATTERNS,
    SMALL_WORDS,
    Kind,
    Phrase,
    Span,
    Token,
    noun_of,
)
from upperson_phrases.wording import MOST_ALTERNATIVES, alternatives, plain_wording

_TOKEN = re.compile(
    r"\w+n['\u2019]t\b|[^\W_]+|[,.;:!?()&/]|(?<=\s)[-\u2013\u2014](?=\s)"  # Also dashes.
)
_LONGEST_NOUN = 3
_MOST_BEFORE = 10
_BREAKS = ENDS | SMALL_WORDS | ACTIONS | (DETAILS - MODIFIERS)
_JOINS = frozenset({"and", "or", "&", "/", ","})
_DETAIL_WORDS = frozenset({"with", "without", "featuring", "and"})
_CARRYING = frozenset({"carrying", "carries", "carry"})
_WITHOUT = frozenset({"bareheaded", "hatless", "bagless"})
_GOES_ON = frozenset({"but", "except", "besides", "apart", "other", "else", "only", "or"})
"""After *carrying nothing*: there is something after all."""
_DECIDING = EXCLUDING | {"or", "non", "except", "excluding"}
_ALL = frozenset({"any", "all", "every", "nothing", "anything", "everything"})
_OF_PERSON = frozenset({"in", "with", "wearing", "carrying", "who"})
_COPULAS = frozenset({"is", "are", "was", "were"})
_TOWARDS = frozenset({"from", "to", "towards", "toward", "at", "facing"})


@dataclass(frozen=True, slots=True)
class ParsedSentence:
    """A sentence and the phrases in it."""

    sentence: str
    read_as: str
    """The sentence, that of a query in plain words (`wording`); phrases are places in it."""
    phrases: tuple[Phrase, ...]
    """In their order in the sentence; kinds other than ``other`` were understood."""

    wanted: str
    """`read_as` without what it excludes; `read_as` itself if it excludes nothing, and ``a person``
    if nothing else is left."""

    readings: tuple[str, ...]
    """`wanted`, once for each choice of an *or* between colours, things or people; a hit's best one
    counts."""
    contradictions: tuple[str, ...] = ()
    """What cannot all be true, such as ``man and woman``."""
    unread: tuple[str, ...] = ()
    """Words that exclude or choose, such as *not* or *or*, of which it is not clear what."""

    @property
    def understood(self) -> tuple[Phrase, ...]:
        """Phrases of a known kind that the sentence asks for."""
        return tuple(p for p in self.phrases if p.kind != "other" and not p.negated)

    @property
    def excluded(self) -> tuple[Phrase, ...]:
        """Phrases that must not be there; not those that the sentence asks for as well."""
        wanted = _wanted_nouns(self.phrases)
        return tuple(
            phrase
            for phrase in self.phrases
            if phrase.negated and (phrase.colours or phrase.noun not in wanted)
        )

    @property
    def denied(self) -> tuple[Phrase, ...]:
        """Earlier name of `excluded`."""
        return self.excluded

    @property
    def unjoined(self) -> tuple[Phrase, ...]:
        """Asked phrases with colours side by side, such as *red blue coat*: both, or a slip."""
        plain = (phrase for phrase in self.understood if phrase.noun and not phrase.pattern)
        return tuple(phrase for phrase in plain if _has_unjoined_colours(phrase.text))


def parse(sentence: str) -> ParsedSentence:
    """Find the phrases of an English sentence about a person; any other text is ``other``.

    It has to be a text: what comes from outside is checked before.
    """
    return _Parser(sentence).parse(sentence)


def parse_query(sentence: str) -> ParsedSentence:
    """Find the phrases of what a user searches for, in the wording of `plain_wording`, lower case.

    Texts with one word changed, by which pictures are compared, would lack some of *Red Coat*.
    """
    return _Parser(plain_wording(sentence).lower()).parse(sentence)


class _Parser:
    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self.tokens = _tokens_of(sentence)
        self.words = [token.word for token in self.tokens]
        self.used = [False] * len(self.tokens)

    def parse(self, original: str) -> ParsedSentence:
        things = _first_mentions(self._without_introductions(list(self._things())))
        spans = [*things, *self._actions()]
        spans += self._rest()
        spans.sort(key=lambda span: span.first)
        cuts = Exclusions(self.tokens, spans).cuts()
        phrases = tuple(span.phrase for span in spans)
        if not any(phrase.kind == "person" for phrase in phrases):
            phrases = (*self._pronoun(), *phrases)
        wanted = self.sentence
        if cuts:
            asks = any(not phrase.negated for phrase in phrases)
            people = (one.noun for one in phrases if one.kind == "person" and not one.negated)
            person = f"a {next(people, 'person')}"
            wanted = (asks and without_cuts(self.sentence, cuts)) or person
        readings = tuple(_readings(wanted))
        return ParsedSentence(
            sentence=original,
            read_as=self.sentence,
            phrases=phrases,
            wanted=wanted,
            readings=readings,
            contradictions=_contradictions(phrases, readings),
            unread=self._unread(spans, readings),
        )

    def _unread(self, spans: Sequence[Span], readings: Sequence[str]) -> tuple[str, ...]:
        left = [word for text in readings for word in _words_of(text)]
        found = [word for word in left if word in _DECIDING]
        for before, after in pairwise(self.words):
            if before == "or" and after in EXCLUDING:  # *With glasses or without a bag*.
                found.append(before)
        if "but" in left and not _ALL.isdisjoint(self.words[: self.words.index("but")]):
            found.append("but")
        for span in spans:  # *Everyone except women in red coats*.
            if span.phrase.negated and span.phrase.kind == "person":
                found += [w for w in self.words[span.last : span.last + 1] if w in _OF_PERSON]
        return tuple(dict.fromkeys(found))

    def _text(self, first: int, last: int) -> str:
        return " ".join(self.sentence[self.tokens[first].start : self.tokens[last - 1].end].split())

    def _span(self, phrase: Phrase, first: int, last: int) -> Span:
        self.used[first:last] = [True] * (last - first)
        return Span(phrase, first, last)

    # --- Things: a noun with what is said of it

    def _things(self) -> Iterator[Span]:
        at = 0
        while at < len(self.words):
            if size := self._nothing_at(at):
                yield self._nothing(at, at + size)
                at += size
                continue
            size, kind, noun = self._noun_at(at)
            if not size or (size == 1 and self._is_detail(at)):
                at += 1
                continue
            first, last = self._before(at), at + size
            end = self._after(last, kind)
            text, describing = self._text(first, last), self.words[first:last]
            if end > last and (self.words[last] in _DETAIL_WORDS or self._tied(last, kind)):
                # Colours of buttons are not the coat's.
                text = self._text(first, end)
            elif end > last:
                joins = () if kind == "hair" else ("and",)
                adjectives = [w for w in self.words[last:end] if w in MODIFIERS or w in joins]
                text = " ".join([*self.words[first:at], *adjectives, *self.words[at:last]])
                describing = self.words[last:end] + describing
            yield self._thing(kind, noun, text, describing, first, end)
            at = self._skip_place(end)
            if length := self._negated_length(end):
                at = end + length
                wrong = [word for word in self.words[end:at] if word in MODIFIERS]
                text = " ".join([*wrong, *self.words[last - size : last]])
                yield self._thing(kind, noun, text, wrong, end, at, negated=True)

    def _thing(
        self, kind: Kind, noun: str, text: str, describing: Sequence[str], first: int, last: int,
        negated: bool = False,
    ) -> Span:  # fmt: skip
        phrase = Phrase(
            kind,
            text,
            self.tokens[first].start,
            self.tokens[last - 1].end,
            noun,
            tuple(dict.fromkeys(_named(describing, COLOURS))) if kind != "person" else (),
            next(iter(_named(self.words[first:last], PATTERNS)), ""),
            negated,
        )
        return self._span(phrase, first, last)

    def _nothing_at(self, at: int) -> int:
        """Return how many tokens *carrying nothing*, *nothing on her head* or *bareheaded* has."""
        word = self.words[at]
        negated = not EXCLUDING.isdisjoint(self.words[max(0, at - 1) : at])
        if word in _WITHOUT or self.words[at : at + 2] == ["empty", "handed"]:
            return 0 if negated else 1 + (word == "empty")
        first = at + (word in _CARRYING)
        end = self._place_end(first + 1)
        place = self.words[first + 1 : end]
        if self.words[first : first + 1] != ["anything" if negated else "nothing"]:
            return 0
        after = self.words[end : end + 2]
        goes_on = not self._phrase_ends(end) or not _GOES_ON.isdisjoint(after)
        is_said = place[-1:] == ["head"] if place else first > at or negated
        return end - at if is_said and not goes_on else 0

    def _nothing(self, first: int, last: int) -> Span:
        of_head = not {"head", "bareheaded", "hatless"}.isdisjoint(self.words[first:last])
        kind: Kind = "headwear" if of_head else "carried"
        noun = "headwear" if of_head else "bag"
        # *Without anything* is excluded by its first word.
        negated = "anything" not in self.words[first:last]
        return self._thing(kind, noun, noun, (), first, last, negated)

    def _noun_at(self, at: int) -> tuple[int, Kind, str]:
        """Return how many tokens a noun has, or 0, with its kind and plain name."""
        for size in range(min(_LONGEST_NOUN, len(self.words) - at), 0, -1):
            words = tuple(self.words[at : at + size])
            # *She dresses in red* has a verb.
            entry = None if words[-1] == "dresses" else noun_of(words)
            if entry is not None:
                return size, *entry
        return 0, "other", ""

    def _is_detail(self, at: int) -> bool:
        """Whether a noun is here part of something else, or a place: *on top*."""
        word, before = self.words[at], self.words[max(0, at - 2) : at]
        if word == "camera":
            return not _TOWARDS.isdisjoint(before)
        if word == "top":
            return bool(before) and (before[-1] in ("on", "of") or "at" in before)
        return word in DETAILS and word != "belt"

    def _before(self, at: int) -> int:
        first = at
        while first > max(0, at - _MOST_BEFORE) and not self.used[first - 1]:
            word = self.words[first - 1]
            if word in _JOINS:
                # *Black and white shirt*, *red, white and blue shirt*.
                if first < 2 or first == at or self.used[first - 2]:
                    break
                one, other = self.words[first - 2], self.words[first]
                if one not in MODIFIERS or other not in MODIFIERS | {"and", "or"}:
                    break
            elif word in _BREAKS:
                break
            first -= 1
        while first < at and self.words[first] in _JOINS:
            first += 1
        return first

    def _after(self, at: int, kind: Kind) -> int:
        if kind == "person":
            return at
        end = at
        while step := self._details(end, more=end > at) or self._tied(end, kind):
            end += step
        if end > at:
            return end
        # *Hair in a blue button up shirt* is not blue.
        of_colour = self._colour_after(at) if kind != "hair" else 0
        return at + (of_colour or self._predicate(at))

    def _details(self, at: int, more: bool) -> int:
        """Return how many tokens *with black buttons on the front* has, or 0.

        With ``more`` there were some before, which *and* may go on.
        """
        if at >= len(self.words) or self.words[at] not in _DETAIL_WORDS:
            return 0
        if self.words[at] == "and" and not more:
            return 0
        last = 0
        for end in range(at + 1, min(at + 8, len(self.words))):
            word = self.words[end]
            if self._noun_at(end)[0] and not self._is_detail(end):
                break
            if word in DETAILS:
                # *And a polka dot sweater* is no detail of what comes before.
                last = end + 1 - at if self._phrase_ends(end + 1) else last
            elif word in ENDS or (word in SMALL_WORDS and word not in ("a", "an", "the", "on")):
                break
        return last

    def _tied(self, at: int, kind: Kind) -> int:
        """Return how many tokens *tied back in a ponytail* has after hair, or 0."""
        if kind != "hair":
            return 0
        for end in range(at, min(at + 7, len(self.words))):
            size, found, noun = self._noun_at(end)
            if size and found == "hair" and noun != "hair":
                return end + size - at
            if size or self.words[end] in ENDS or self.words[end] == "and":
                break
        return 0

    def _colour_after(self, at: int) -> int:
        """Return how many tokens *of red colour* or *in red* has, or 0."""
        if at + 1 >= len(self.words) or self.words[at] not in ("of", "in"):
            return 0
        start = at + 1 + (self.words[at + 1] in ("a", "the"))
        end = self._while_in(start, MODIFIERS | {"or"})
        if not _named(self.words[start:end], COLOURS):
            return 0
        end += self.words[end : end + 1] in (["color"], ["colour"])
        return end - at if self._phrase_ends(end) else 0

    def _predicate(self, at: int) -> int:
        """Return how many tokens *is short and black* has, or 0: adjectives and nothing else."""
        start = at + (self.words[at : at + 1] in (["that"], ["which"]))
        if start >= len(self.words) or self.words[start] not in _COPULAS:
            return 0
        end = self._while_in(start + 1, MODIFIERS | {"and", "or", "in", "color", "colour", "very"})
        while end > start + 1 and self.words[end - 1] in ("and", "or", "in"):
            end -= 1
        # *Shoes are brown boots* goes on with another noun phrase.
        return end - at if end > start + 1 and self._phrase_ends(end) else 0

    def _negated_length(self, at: int) -> int:
        """Return how many tokens *that is not red* has, or 0."""
        end = at
        for skipped in ((",",), ("but",), ("that", "which"), {*_COPULAS, "s"}):
            end += end < len(self.words) and self.words[end] in skipped
        if end >= len(self.words) or self.words[end] not in ("not", "isn't", "aren't"):
            return 0
        last = self._while_in(end + 1, MODIFIERS | {"or", "nor"})
        return last - at if last > end + 1 and self._phrase_ends(last) else 0

    def _while_in(self, at: int, words: frozenset[str]) -> int:
        while at < len(self.words) and self.words[at] in words:
            at += 1
        return at

    def _phrase_ends(self, at: int) -> bool:
        return at >= len(self.words) or self.words[at] in ENDS or self.words[at] in SMALL_WORDS

    def _skip_place(self, at: int) -> int:
        """Mark *over her left shoulder* as said, and return what comes next."""
        end = self._place_end(at)
        self.used[at:end] = [True] * (end - at)
        return end

    def _place_end(self, at: int) -> int:
        """Return where *over her left shoulder* ends, the same token if there is no such place."""
        if at < len(self.words) and self.words[at] in ("over", "on", "in", "around", "across"):
            end = self._while_in(at + 1, BODY_PLACES | {"her", "his", "their", "the", "one"})
            if self.words[end - 1] in BODY_PLACES and not self._noun_at(end - 1)[0]:
                return end
        return at

    def _without_introductions(self, things: Sequence[Span]) -> list[Span]:
        """Leave out nouns that only lead to another one: *his shoes are brown boots*."""
        kept = []
        for one, following in zip_longest(things, things[1:]):
            gap = [] if following is None else self.words[one.last : following.first]
            bare = one.last == one.first + 1 and one.phrase.kind != "person"
            same = following is not None and following.phrase.kind == one.phrase.kind
            leads_on = gap and gap[0] in _COPULAS and ENDS.isdisjoint(gap)
            if not (bare and same and leads_on):
                kept.append(one)
        return kept

    # --- Who, what they do, and the rest

    def _pronoun(self) -> tuple[Phrase, ...]:
        for token in self.tokens:
            for name, pronouns in (("woman", ("she", "her")), ("man", ("he", "his", "him"))):
                if token.word in pronouns:
                    return (Phrase("person", name, token.start, token.end, name),)
        return ()

    def _actions(self) -> Iterator[Span]:
        at = 0
        while at < len(self.words):
            end = at + 1
            if self.words[at] in ACTIONS and not self.used[at]:
                while end < len(self.words) and not (
                    self.used[end]
                    or self.words[end] in ENDS
                    or self.words[end] in ACTIONS | EXCLUDING
                    or self.words[end] in ("and", "while", "with", "wearing", "who", "he", "she")
                ):
                    end += 1
                until = end
                while end > at + 1 and self.words[end - 1] in SMALL_WORDS - {"down", "along"}:
                    end -= 1
                # *Talking on* a phone: the phone says it.
                on_phone = self.words[at].startswith("talk") and end == at + 1 < until
                span = self._plain("action", at, end)
                if not on_phone:
                    yield span
            at = end

    def _rest(self) -> Iterator[Span]:
        """Find what nothing else claimed, each piece whole."""
        quiet = SMALL_WORDS | BODY_PLACES | EXCLUDING
        at = 0
        while at < len(self.words):
            end = at
            while end < len(self.words) and not self.used[end] and self.words[end] not in ENDS:
                end += 1
            first, last = at, end
            while first < last and self.words[first] in quiet:
                first += 1
            while first < last and self.words[last - 1] in quiet:
                last -= 1
            if first < last:
                yield self._plain("other", first, last)
            at = max(end, at + 1)

    def _plain(self, kind: Kind, first: int, last: int) -> Span:
        start, end = self.tokens[first].start, self.tokens[last - 1].end
        return self._span(Phrase(kind, self._text(first, last), start, end), first, last)


def _tokens_of(sentence: str) -> list[Token]:
    return [
        Token(match[0].lower().replace("\u2019", "'"), match.start(), match.end())
        for match in _TOKEN.finditer(sentence)
    ]


def _words_of(sentence: str) -> list[str]:
    return [token.word for token in _tokens_of(sentence)]


def _named(words: Sequence[str], table: Mapping[tuple[str, ...], str]) -> list[str]:
    """Return the plain names of a table's entries among words, the longest at each place."""
    names, at = [], 0
    while at < len(words):
        size = 2 if tuple(words[at : at + 2]) in table else 1
        name = table.get(tuple(words[at : at + size]))
        if name is not None:
            names.append(name)
        at += size
    return names


def _first_mentions(things: Sequence[Span]) -> list[Span]:
    """Keep the first mention of a person: *the woman* of later sentences says nothing new."""
    people = [one for one in things if one.phrase.kind == "person"]
    named = [one for one in people if one.phrase.noun != "person"] or people[:1]
    first = {one.phrase.noun: one for one in reversed(named)}
    return [
        one for one in things if one.phrase.kind != "person" or first.get(one.phrase.noun) is one
    ]


def _readings(sentence: str) -> list[str]:
    """Return the sentences that *or* between colours, things or people stands for."""
    if "or" not in sentence.lower().split():
        return [sentence]
    found, open_ = list[str](), alternatives(sentence)
    while open_ and len(found) + len(open_) <= MOST_ALTERNATIVES:
        first, *open_ = open_
        ways = _either_thing(first)
        if len(ways) == 1:
            found += ways
        else:
            open_ = [*ways, *open_]
    return [*dict.fromkeys([*found, *open_])][:MOST_ALTERNATIVES]


def _either_thing(sentence: str) -> list[str]:
    """Return *red coat* and *blue jacket* for *red coat or blue jacket*; else the sentence."""
    parser = _Parser(sentence)
    for one, other in pairwise(parser._things()):
        gap = parser.words[one.last : other.first]
        if gap[:1] == ["or"] and ARTICLES.issuperset(gap[1:]) and not other.phrase.negated:
            first, last = one.phrase, other.phrase
            left = sentence[: parser.tokens[one.last - 1].end]
            if last.kind == "person" != first.kind:  # *Man in a red coat or woman in blue*.
                return [left, sentence[last.start :]]
            return [
                left + sentence[parser.tokens[other.last - 1].end :],
                sentence[: first.start] + sentence[last.start :],
            ]
    return [sentence]


def _contradictions(phrases: Sequence[Phrase], readings: Sequence[str]) -> tuple[str, ...]:
    people = dict.fromkeys(phrase.noun for phrase in phrases if phrase.kind == "person")
    if len(people) > 1 and len(readings) > 1:  # *A man or a woman* is read as either.
        in_one = {one.phrase.noun for one in _Parser(readings[0])._things()}
        people = {noun: None for noun in people if noun in in_one}
    found = [" and ".join(people)] if len(people) > 1 else []
    wanted = _wanted_nouns(phrases)
    found += [
        f"with and without {phrase.noun}"
        for phrase in phrases
        if phrase.negated and phrase.noun in wanted and not phrase.colours
    ]
    found += [
        f"with and without {one.text}"
        for one in phrases
        if one.negated and one.colours and any(_is_among(other, one) for other in phrases)
    ]
    return tuple(dict.fromkeys(found))


def _is_among(wanted: Phrase, excluded: Phrase) -> bool:
    """Whether a wanted *red coat* is one of excluded *red clothes*."""
    same = wanted.noun in (excluded.noun, *KINDS_OF.get(excluded.noun, ()))
    colours = set(wanted.colours)
    return same and not wanted.negated and bool(colours) and colours <= {*excluded.colours}


def _has_unjoined_colours(text: str) -> bool:
    pairs = pairwise(text.lower().split())
    return any(len(set(_named(pair, COLOURS))) == 2 for pair in pairs)


def _wanted_nouns(phrases: Sequence[Phrase]) -> set[str]:
    nouns = {phrase.noun for phrase in phrases if phrase.noun and not phrase.negated}
    return nouns | {name for name, kinds in KINDS_OF.items() if not nouns.isdisjoint(kinds)}

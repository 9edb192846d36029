"""Captions: a few clauses about a person, put together in the style of a look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from upperson_phrases.evidence import with_article
from upperson_synthetic.clauses import Clause, Mentioned, Topic, sample_clauses, say
from upperson_synthetic.look import CaptionStyle, Look
from upperson_synthetic.people import GENDERS, TABLES, Person
from upperson_synthetic.sampling import chance, choose

_Structure = Literal["list", "phrase", "sentences"]

_COUNTS: Mapping[CaptionStyle, Mapping[int, float]] = {
    "list": {2: 22, 3: 38, 4: 28, 5: 12},
    "sentences": {2: 8, 3: 36, 4: 36, 5: 15, 6: 5},
}
#: The list style has a few sentences in it, so that every function word of the other style has
#: been seen before.
_STRUCTURES: Mapping[CaptionStyle, Mapping[_Structure, float]] = {
    "list": {"list": 66, "phrase": 20, "sentences": 14},
    "sentences": {"phrase": 6, "sentences": 94},
}
_LIST_ORDER: tuple[Topic, ...] = get_args(Topic)
_ACTIONS: Mapping[str, float] = {
    "walking": 8,
    "walking along": 2,
    "walking down the street": 3,
    "standing": 2,
    "moving forward": 1,
    "on the street": 1,
}
#: Who is meant where no gender is mentioned.
_ANYONE: Mapping[str, float] = {"person": 10, "someone": 2, "somebody": 1, "anyone": 1}
_PRONOUNS = _ANYONE.keys() - {"person"}
#: Verb pairs (finite, participle) by what is carried.
_CARRYING: Mapping[str, Mapping[tuple[str, str], float]] = {
    "backpack": {("is carrying", "carrying"): 4, ("carries", "carrying"): 2, ("has", "with"): 3},
    "handbag": {("is carrying", "carrying"): 4, ("is holding", "holding"): 3, ("has", "with"): 1},
    "shoulder bag": {
        ("is carrying", "carrying"): 3,
        ("carries", "carrying"): 2,
        ("has", "with"): 3,
    },
    "suitcase": {("is pulling", "pulling"): 4, ("pulls", "pulling"): 2, ("has", "with"): 1},
    "tote bag": {("is carrying", "carrying"): 4, ("is holding", "holding"): 2, ("has", "with"): 2},
    "umbrella": {("is holding", "holding"): 5, ("is carrying", "carrying"): 2, ("has", "with"): 1},
    "phone": {("is holding", "holding"): 3, ("is talking on", "talking on"): 3},
}
_PLACES: Mapping[str, str] = {
    "backpack": "on {} back",
    "handbag": "in {} hand",
    "shoulder bag": "over {} shoulder",
}


@dataclass(frozen=True, slots=True)
class Caption:
    """A text about a person, with what it says."""

    text: str

    mentioned: Mentioned  # The values of which it says that the person has them.
    excluded: Mentioned = field(default_factory=dict)
    """The values of which it says that the person does not have them."""

    def holds(self, person: Person) -> bool:
        """Whether the text is true of a person."""
        has = all(getattr(person, name) == value for name, value in self.mentioned.items())
        return has and all(getattr(person, name) != value for name, value in self.excluded.items())


def describe(person: Person, look: Look, rng: np.random.Generator) -> str:
    """Write one caption that is true of a person, in the caption style of a look.

    It is plain ASCII English and mentions the gender and 2..6 other attributes. A bag that is
    hidden in one picture may be mentioned, as in captions written for a whole track.
    """
    return caption(person, look, rng).text


def caption(person: Person, look: Look, rng: np.random.Generator) -> Caption:
    """Write the text of `describe`, and say what it says."""
    style = look.caption_style
    clauses = sample_clauses(person, style, choose(rng, _COUNTS[style]), rng)
    return Caption(_write(person, clauses, style, rng), _mentioned(person, clauses))


def brief(person: Person, rng: np.random.Generator) -> Caption:
    """Write a few words that are true of a person, as people type them into a search field.

    *woman in red coat*, *a man with a black backpack*, *blue jeans*, *girl*, *someone without a
    hat*: up to two attributes, with or without the gender and articles, now and then a thing that
    the person does not have, or whether there is any bag.
    """
    clauses = sample_clauses(person, "list", choose(rng, {0: 8, 1: 62, 2: 30}), rng)
    articles = chance(rng, 0.5)
    gendered = not clauses or chance(rng, 0.7)
    last = _denial(person, rng) if chance(rng, 0.2) else None
    if last is None and chance(rng, 0.06) and all(clause.topic != "bag" for clause in clauses):
        last = _any_bag(person, rng)
    subject = say(GENDERS[person.gender].words, "list", rng) if gendered else choose(rng, _ANYONE)
    if not gendered and last is None and chance(rng, 0.5):
        text = " and ".join(_named(clause, articles) for clause in clauses)
    else:
        text = with_article(subject) if articles and subject not in _PRONOUNS else subject
        worn = [_named(clause, articles) for clause in clauses if clause.worn]
        if worn:
            text = f"{text} {choose(rng, {'in': 3, 'wearing': 1, 'with': 1})} {' and '.join(worn)}"
        for clause in clauses:
            if clause.topic == "hair":
                text = f"{text} with {_named(clause, articles)}"
            elif clause.carried:
                verb = choose(rng, {"with": 3, "carrying": 1, "holding": 1})
                text = f"{text} {verb} {_named(clause, articles)}"
    mentioned = _mentioned(person, clauses) if gendered else _mentioned(None, clauses)
    if last is None:
        return Caption(text, mentioned)
    return Caption(f"{text} {last.text}", {**mentioned, **last.mentioned}, last.excluded)


def _mentioned(person: Person | None, clauses: Sequence[Clause]) -> Mentioned:
    mentioned: dict[str, object] = {} if person is None else {"gender": person.gender}
    for clause in clauses:
        mentioned |= clause.mentioned
    return mentioned


def _named(clause: Clause, articles: bool) -> str:
    return clause.with_article() if articles else clause.words


def _denial(person: Person, rng: np.random.Generator) -> Caption:
    """Exclude a thing that a person does not have, in the last words of a text."""
    name = choose(rng, {"bag": 1, "headwear": 1, "accessory": 1})
    left = {
        value: row.weight
        for value, row in TABLES[name].items()
        if value not in {"none", getattr(person, name)}
    }
    value = choose(rng, left)
    words = say(TABLES[name][value].words, "list", rng)
    verb = "wearing" if name == "headwear" or value == "scarf" else "carrying"
    ways = {
        f"without {with_article(words)}": 6,
        f"with no {words}": 3,
        f"without any {words}": 1,
        f"not {verb} {with_article(words)}": 2,
    }
    return Caption(choose(rng, ways), {}, {name: value})


def _any_bag(person: Person, rng: np.random.Generator) -> Caption:
    """Say whether a person has a bag, of whatever kind, in the last words of a text."""
    if person.bag == "none":
        words = choose(rng, {"without a bag": 3, "with no bag": 1, "without any bag": 1})
        return Caption(words, {"bag": "none"})
    return Caption(choose(rng, {"with a bag": 2, "carrying a bag": 1}), {}, {"bag": "none"})


def _write(
    person: Person, clauses: Sequence[Clause], style: CaptionStyle, rng: np.random.Generator
) -> str:
    subject = say(GENDERS[person.gender].words, style, rng)
    structure = choose(rng, _STRUCTURES[style])
    if structure == "list":
        return _list(subject, clauses, rng)
    writer = _Writer(person, rng)
    if structure == "phrase":
        text = writer.noun_phrase(with_article(subject), clauses)
        return text if style == "list" else f"{text[0].upper()}{text[1:]}."
    text = writer.sentences(subject, clauses)
    # Half the few sentences of the list style are as careless as its lists.
    return text.lower().rstrip(".") if style == "list" and chance(rng, 0.5) else text


# --- Lists, phrases and sentences


def _list(subject: str, clauses: Sequence[Clause], rng: np.random.Generator) -> str:
    ordered = list(clauses)
    if chance(rng, 0.7):
        ordered.sort(key=lambda clause: _LIST_ORDER.index(clause.topic))
    head = f"{subject} {choose(rng, _ACTIONS)}" if chance(rng, 0.08) else subject
    return ", ".join([head, *(clause.words for clause in ordered)])


def _join(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


class _Writer:
    """Writes phrases and sentences about one person."""

    def __init__(self, person: Person, rng: np.random.Generator) -> None:
        self._person = person
        self._rng = rng
        self._pronoun = "She" if person.is_female else "He"
        self._possessive = "her" if person.is_female else "his"

    def noun_phrase(self, subject: str, clauses: Sequence[Clause], then: str = "") -> str:
        """*a woman in a red coat and blue jeans, with long hair, carrying a handbag*.

        ``subject`` has its article; ``then`` is the rest of the sentence if this is its subject.
        """
        worn = [clause for clause in clauses if clause.worn]
        hair = [f"with {self._name(clause)}" for clause in clauses if clause.topic == "hair"]
        parts = []
        if worn:
            verbs = {"wearing": 4.0, "in": 4.0}
            if self._is_dressed(worn):
                verbs["dressed in"] = 1.0
            parts.append(f"{choose(self._rng, verbs)} {self._names(worn)}")
        parts += [self._carry(clause, finite=False) for clause in clauses if clause.carried]
        parts = [*hair, *parts] if chance(self._rng, 0.5) else [*parts, *hair]
        if len(parts) < 3:
            return " ".join(filter(None, (subject, *parts, then)))
        # Three modifiers are set off by commas, and the last of them needs one after it, too.
        text = f"{subject} {', '.join(parts)}"
        return f"{text}, {then}" if then else text

    def sentences(self, subject: str, clauses: Sequence[Clause]) -> str:
        """One to three full sentences."""
        rng = self._rng
        left = list(clauses)
        if chance(rng, 0.75):
            # Mostly the upper garment comes first, as people do it.
            left.sort(key=lambda clause: clause.topic != "upper")
        size = int(rng.integers(1, 4))
        texts = [self._opening(subject, left[:size])]
        left = left[size:]
        while left:
            size = int(rng.integers(1, 4))
            texts.append(self._following(subject, left[:size]))
            left = left[size:]
        return " ".join(f"{text[0].upper()}{text[1:]}." for text in texts)

    def _opening(self, subject: str, clauses: Sequence[Clause]) -> str:
        rng = self._rng
        kind = choose(rng, {"plain": 5.0, "acting": 4.0, "inverted": 2.0, "there": 1.0})
        if kind == "acting":
            action = f"is {choose(rng, _ACTIONS)}"
            return self.noun_phrase(self._refer(subject, new=True), clauses, action)
        if kind == "there":
            return f"there is {self.noun_phrase(with_article(subject), clauses)}"
        worn = [clause for clause in clauses if clause.worn]
        others = [clause for clause in clauses if not clause.worn]
        if kind == "inverted" and worn:
            verb = "dressed in" if self._is_dressed(worn) and chance(rng, 0.6) else "wearing"
            rest = _join(self._predicates(others)) if others else f"is {choose(rng, _ACTIONS)}"
            return f"{verb} {self._names(worn)}, {self._refer(subject, new=False)} {rest}"
        return f"{self._refer(subject, new=True)} {_join(self._predicates(clauses))}"

    def _following(self, subject: str, clauses: Sequence[Clause]) -> str:
        rng = self._rng
        first = clauses[0]
        shoes = len(clauses) == 1 and first.topic == "shoes" and not first.words.endswith("shoes")
        if shoes and chance(rng, 0.4):
            return f"{self._possessive} shoes are {first.words}"
        if len(clauses) == 1 and first.topic == "hair" and chance(rng, 0.3):
            words = first.words
            if words.endswith(" hair") and words.count(" ") == 2:
                length, colour, _ = words.split(" ")
                return f"{self._possessive} hair is {length} and {colour}"
        if len(clauses) == 2 and chance(rng, 0.15):
            return f"{self._pronoun} also has {self._names(clauses)}"
        who = self._pronoun if chance(rng, 0.8) else self._refer(subject, new=False)
        return f"{who} {_join(self._predicates(clauses))}"

    def _predicates(self, clauses: Sequence[Clause]) -> list[str]:
        predicates: list[str] = []
        worn = [clause for clause in clauses if clause.worn]
        if worn:
            verbs = {"is wearing": 6.0, "wears": 3.0, "has on": 1.0}
            if self._is_dressed(worn):
                verbs["is dressed in"] = 2.0
            predicates.append(f"{choose(self._rng, verbs)} {self._names(worn)}")
        for clause in clauses:
            if clause.topic == "hair":
                predicates.append(f"has {self._name(clause)}")
            elif clause.carried:
                predicates.append(self._carry(clause, finite=True))
        if len(predicates) > 1 and chance(self._rng, 0.3):
            predicates.reverse()
        return predicates

    def _carry(self, clause: Clause, *, finite: bool) -> str:
        thing = self._person.bag if clause.topic == "bag" else clause.topic
        verb = choose(self._rng, _CARRYING[thing])[0 if finite else 1]
        text = f"{verb} {clause.with_article()}"
        if thing in _PLACES and chance(self._rng, 0.3):
            text = f"{text} {_PLACES[thing].format(self._possessive)}"
        return text

    def _names(self, clauses: Sequence[Clause]) -> str:
        return _join([self._name(clause) for clause in clauses])

    def _name(self, clause: Clause) -> str:
        pair = clause.paired and chance(self._rng, 0.12)
        return f"a pair of {clause.words}" if pair else clause.with_article()

    def _refer(self, subject: str, *, new: bool) -> str:
        return with_article(subject) if new and chance(self._rng, 0.6) else f"the {subject}"

    @staticmethod
    def _is_dressed(worn: Sequence[Clause]) -> bool:
        # One is dressed in a coat, but not in glasses.
        return bool(worn) and all(clause.topic in {"upper", "lower"} for clause in worn)

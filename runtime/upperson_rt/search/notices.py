"""Notices of a search: stable codes with fields, and the one catalogue of their texts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from upperson_rt.printable import count_of, safe_repr

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Gallery

NoticeCode: TypeAlias = Literal[
    "sentence_truncated", "language_unfamiliar", "words_unknown", "words_unread",
    "contradiction", "colours_joined", "excluded", "not_understood", "indistinct",
    "camera_unknown", "did_you_mean", "rewritten", "either",
    "feedback_missing", "gallery_empty", "filter_matches_nothing", "cameras_not_compared",
]  # fmt: skip
_WARNINGS = frozenset({
    "sentence_truncated", "language_unfamiliar", "words_unknown", "words_unread", "contradiction",
    "indistinct", "camera_unknown", "feedback_missing", "did_you_mean", "cameras_not_compared",
})  # fmt: skip
_MOST_NAMED = 5


@dataclass(frozen=True)
class Notice:
    """Something a user should know about a search."""

    code: NoticeCode
    fields: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""

    @property
    def is_warning(self) -> bool:
        """Whether the result may not be what the user wants."""
        return self.code in _WARNINGS

    @property
    def text(self) -> str:
        """What it says, in a few words without a full stop; names in it may hold anything."""
        return _TEXTS[self.code](self.fields)

    def as_json(self) -> dict[str, Any]:
        """Return code, level, text and fields."""
        level = "warning" if self.is_warning else "note"
        return {"code": self.code, "level": level, "text": self.text, "fields": dict(self.fields)}


def unknown_cameras(gallery: "Gallery", where: "Filter") -> list[Notice]:
    """Return a notice if a filter names cameras that no picture is from, or nothing."""
    from upperson_rt.gallery import Filter

    unknown = [name for name in where.cameras or () if not gallery.count(Filter(camera=name))]
    fields = {"cameras": unknown, "known": gallery.cameras() if unknown else []}
    return [Notice("camera_unknown", fields)] if unknown else []


def _names(names: list[str]) -> str:
    return ", ".join(map(safe_repr, names[:_MOST_NAMED]))


def _camera_unknown(fields: Mapping[str, Any]) -> str:
    text = f"no picture of the camera {_names(fields['cameras'])}"
    if "known" not in fields:
        return f"{text}: check how its name is written"
    known = ", ".join(map(safe_repr, fields["known"])) or "none that has a name"
    return f"{text}; the gallery's cameras are: {known}"


def _filter_matches_nothing(fields: Mapping[str, Any]) -> str:
    total, without_time = fields["pictures"], fields["without_time"]
    text = (
        f"nothing found: of {count_of(total, 'picture')} none passes the filter by "
        f"{' and '.join(fields['by'])}"
    )
    if without_time:
        text += f"; {without_time} have no time: index them with  --time-from name  or  mtime"
    return text


def _cameras_not_compared(fields: Mapping[str, Any]) -> str:
    names, wanted = fields["cameras"], f"{fields['wanted']} by day or by night are needed"
    which = f"{count_of(fields['pictures'], 'picture')} without a camera are"
    if names:
        which = f"{count_of(len(names), 'camera')} ({_names(names)}) "
        which += "have" if len(names) > 1 else "has"
    few = "too few pictures" if names else "too few"
    return (
        f"{which} {few} to be compared with the score calibration ({wanted}): nobody may be "
        "wrong there"
    )


_TEXTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "sentence_truncated": lambda f: (
        f"the sentence is longer than the model's {f['context_length']} tokens; its end was cut off"
    ),
    "language_unfamiliar": lambda f: (
        f"the model breaks these {f['letters']} letters into {f['tokens']} pieces, so it saw "
        "little of this language in training: describe the person in English"
    ),
    "words_unknown": lambda f: (
        f"the model may not know {_names(f['words'])}: check the spelling, or use plainer words, "
        "in English"
    ),
    "words_unread": lambda f: (
        f"it is not clear what {_names(f['words'])} refers to: say it in another way, such as "
        " without a red coat"
    ),
    "did_you_mean": lambda f: f"did you mean {safe_repr(f['sentence'])}?",
    "either": lambda f: (
        f"searched as {' and as '.join(map(safe_repr, f['sentences']))}: the better score counts"
    ),
    "rewritten": lambda f: f"searched as: {safe_repr(f['sentence'])}",
    "contradiction": lambda f: f"the sentence contradicts itself: {f['contradiction']}",
    "colours_joined": lambda f: (
        f"{safe_repr(f['phrase'])} counts as one {f['noun']}, {' or '.join(f['colours'])}"
    ),
    "excluded": lambda f: f"must not be there: {', '.join(f['phrases'])}",
    "not_understood": lambda _: "no phrase of the sentence was understood: it counts as a whole",
    "indistinct": lambda _: (
        "this sentence scores almost the same with all people: name clothes and their colours"
    ),
    "camera_unknown": _camera_unknown,
    "feedback_missing": lambda f: (
        f"{count_of(f['count'], 'marked picture')} left the gallery and had no effect"
    ),
    "gallery_empty": lambda f: f"nothing found: gallery {safe_repr(f['gallery'])} is empty",
    "filter_matches_nothing": _filter_matches_nothing,
    "cameras_not_compared": _cameras_not_compared,
}

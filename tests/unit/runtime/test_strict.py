from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.strict import (
    Count,
    Positive,
    Sha256,
    read_fields,
    read_json,
    require_version,
    suggestion,
)


@dataclass(frozen=True)
class Lens:
    name: str
    f_mm: float | None = None


@dataclass(frozen=True)
class Camera:
    width_px: Positive
    drops: Count
    mode: Literal["day", "night"]
    lenses: tuple[Lens, ...]
    limits: dict[str, float] = field(default_factory=dict)
    on: bool = True
    notes: Any = None
    digest: Sha256 | None = None

    def __post_init__(self) -> None:
        if not self.lenses:
            raise IntegrityError("lenses: expected at least one, found none")


WHOLE = {"width_px": 4, "drops": 0, "mode": "day", "lenses": [{"name": "a", "f_mm": 2}]}


def read(**changes):
    return read_fields(Camera, {**WHOLE, **changes}, "camera.json")


def test_a_mapping_becomes_a_dataclass():
    assert read() == Camera(4, 0, "day", (Lens("a", 2.0),))
    camera = read(limits={"lux": 1}, notes=[None], on=False, digest="0" * 64)
    assert (camera.limits, camera.notes, camera.on) == ({"lux": 1.0}, [None], False)
    assert isinstance(camera.lenses[0].f_mm, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht_px": 1}, r"^camera\.json: unknown key 'widht_px', did you mean 'width_px'\?$"),
        ({"zoom": 1}, "unknown key 'zoom', known: digest, drops, "),
        ({"width_px": 0}, r"^camera\.json: width_px: expected an integer of at least 1, found 0$"),
        ({"width_px": True}, "width_px: expected an integer of at least 1, found True"),
        ({"width_px": 4.0}, "width_px: expected an integer of at least 1, found 4.0"),
        ({"drops": -1}, "drops: expected an integer of at least 0, found -1"),
        ({"mode": "dusk"}, "mode: expected one of day, night, found 'dusk'"),
        ({"lenses": {}}, r"lenses: expected a list, found \{\}"),
        ({"lenses": [{"name": ""}]}, r"lenses\[0\]\.name: expected a non-empty string, found ''"),
        ({"lenses": [{}]}, r"^camera\.json: lenses\[0\]\.name: missing$"),
        ({"lenses": [7]}, r"lenses\[0\]: expected an object, found 7"),
        ({"limits": {"lux": "x"}}, r"limits\.lux: expected a number, found 'x'"),
        ({"limits": {"lux": float("nan")}}, "expected a finite number of 64 bits, found nan"),
        ({"limits": {"lux": 10**400}}, "expected a finite number of 64 bits, found 1000"),
        ({"on": 1}, "on: expected true or false, found 1"),
        ({"digest": "ABC"}, "digest: expected 64 lower-case hex digits, found 'ABC'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(changes, message):
    with pytest.raises(InputError, match=message):
        read(**changes)


def test_errors_of_the_dataclass_get_the_place_and_keep_their_kind():
    with pytest.raises(IntegrityError, match=r"^camera\.json: lenses: expected at least one"):
        read(lenses=[])


def test_json_files(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=r"cannot read .*a\.json"):
        read_json(path)
    for text in ("{", "NaN", '{"a": Infinity}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
            read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_versions_come_first():
    require_version({"schema_version": 2}, "f", (1, 2), "update")
    with pytest.raises(InputError, match=r"f: schema_version: .* version 3, .* up to 2: update"):
        require_version({"schema_version": 3}, "f", (1, 2), "update")
    for content in ({}, [], {"schema_version": "1"}, {"schema_version": 0}):
        with pytest.raises(InputError, match=r"^f"):
            require_version(content, "f", (1,), "update")


def test_suggestions():
    assert suggestion("fp23", ["fp32", "int8"]) == "did you mean 'fp32'?"
    assert suggestion("x", ["fp32", "int8"]) == "known: fp32, int8"


def test_a_message_is_not_as_long_as_an_unknown_key():
    with pytest.raises(InputError, match=r"unknown key '9{50,60}\.\.\., ") as refused:
        read_fields(Camera, {"9" * 10_000: 1}, "cameras.json")
    assert len(str(refused.value)) < 300

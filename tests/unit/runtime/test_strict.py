from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from tests.helpers.refused import refused
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.strict import Count, Positive, Sha256, read_fields, read_json, require_version


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
    ("changes", "code", "at"),
    [
        ({"widht_px": 1}, "key_unknown", ""),
        ({"width_px": 0}, "value_unfit", "width_px"),
        ({"width_px": True}, "value_unfit", "width_px"),
        ({"drops": -1}, "value_unfit", "drops"),
        ({"mode": "dusk"}, "value_unfit", "mode"),
        ({"lenses": [{"name": ""}]}, "value_unfit", "lenses[0].name"),
        ({"lenses": [{}]}, "key_missing", "lenses[0].name"),
        ({"limits": {"lux": float("nan")}}, "value_unfit", "limits.lux"),
        ({"limits": {"lux": 10**400}}, "value_unfit", "limits.lux"),
        ({"on": 1}, "value_unfit", "on"),
        ({"digest": "ABC"}, "value_unfit", "digest"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(changes, code, at):
    with refused(code, InputError, at=at) as found:
        read(**changes)
    assert str(found.value).startswith("camera.json: ")
    assert at in str(found.value)


def test_errors_of_the_dataclass_get_the_place_and_keep_their_kind():
    with refused("integrity", IntegrityError, at=""):
        read(lenses=[])
    with refused("key_unknown", InputError) as found:
        read(**{"9" * 10_000: 1})
    assert len(str(found.value)) < 300


def test_json_files_have_a_version_first(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(InputError):
        read_json(path)
    for text in ("{", "NaN", '{"a": Infinity}', "[" * 100_000, '{"a": 1, "a": 2}'):
        path.write_text(text)
        with refused("no_json", InputError):
            read_json(path)
    path.write_text('{"schema_version": 2}')
    require_version(read_json(path), "f", (1, 2), "update")
    with refused("version_unknown", InputError, found=2):
        require_version(read_json(path), "f", (1,), "update")
    for content in ({}, [], {"schema_version": "1"}):
        with pytest.raises(InputError):
            require_version(content, "f", (1,), "update")

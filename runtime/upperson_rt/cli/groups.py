"""Option groups: a command takes a few dataclasses of options instead of thirty parameters.

    @dataclass(frozen=True)
    class Output(OptionGroup, panel="Output"):
        sheet: Path | None = option(None, "Also write a contact sheet.", metavar="FILE.png")
        debug: Debug = False  # An annotation of Typer, for an option of several groups.

    @grouped
    def query(model: Model, output: Output) -> None: ...

Each group is defined once and shown as one panel of ``--help``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, ClassVar, TypeVar, cast, get_args, get_type_hints

import typer
from typer.models import OptionInfo

ADVANCED = "Advanced"
"""The panel of what few users need."""

_Command = TypeVar("_Command", bound=Callable[..., Any])
_T = TypeVar("_T")


def option(default: _T, help: str, *names: str, **facts: Any) -> _T:
    """Declare an option of a group; ``names`` and ``facts`` are those of `typer.Option`.

    Without names it is called as its field. A switch that is off by default has no ``--no-...``.
    """
    field: Any = dataclasses.field(
        default=default, metadata={"names": names, "facts": {"help": help, **facts}}
    )
    return cast(_T, field)


def advanced(default: _T, help: str, *names: str, **facts: Any) -> _T:
    """Declare an option that few users need; see `option`."""
    return option(default, help, *names, **{"rich_help_panel": ADVANCED, **facts})


class OptionGroup:
    """Base of the dataclasses that `grouped` understands; their fields are Typer's options."""

    panel: ClassVar[str | None] = None

    def __init_subclass__(cls, panel: str | None = None) -> None:
        """Name the panel of ``--help``."""
        cls.panel = panel or cls.panel


def grouped(command: _Command) -> _Command:
    """Give Typer a command's options one by one, and the command its groups."""
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if inspect.isclass(kind) and issubclass(kind, OptionGroup):
            groups[parameter.name] = kind
            parameters += _options_of(kind)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    parameters.sort(key=_is_advanced)  # Panels stand in the order of their first option.

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, kind in groups.items():
            own = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
            given[name] = kind(**{option: given.pop(option) for option in own})
        return command(**given)

    # Typer reads both.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run  # type: ignore[return-value]


def _is_advanced(parameter: inspect.Parameter) -> bool:
    return any(
        isinstance(one, OptionInfo) and one.rich_help_panel == ADVANCED
        for one in get_args(parameter.annotation)
    )


def _options_of(kind: type[OptionGroup]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_in_panel(field, hints[field.name], kind.panel),
        )
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    ]


def _in_panel(field: "dataclasses.Field[Any]", hint: Any, panel: str | None) -> Any:
    """Return an annotation whose option stands in the group's panel, if it names no other."""
    if field.metadata:
        names = field.metadata["names"]
        if field.default is False:
            names = names or (f"--{field.name.replace('_', '-')}",)
        found = typer.Option(*names, **field.metadata["facts"])
    else:
        hint, *extras = get_args(hint)
        found = copy(next(one for one in extras if isinstance(one, OptionInfo)))
    found.rich_help_panel = found.rich_help_panel or panel
    return Annotated[hint, found]

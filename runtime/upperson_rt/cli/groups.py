"""Option groups: a command takes a few dataclasses of options instead of thirty parameters.

    @dataclass(frozen=True)
    class Output(OptionGroup, panel="Output"):
        as_json: Json = False

    @grouped
    def query(model: Model, output: Output) -> None: ...

Each group is defined once and shown as one panel of ``--help``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

from typer.models import OptionInfo

__all__ = ["ADVANCED", "OptionGroup", "grouped"]

ADVANCED = "Advanced"
"""The panel of what few users need; an option says so with ``rich_help_panel=ADVANCED``."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


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
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
            annotation=_in_panel(hints[field.name], kind.panel),
        )
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    ]


def _in_panel(hint: Any, panel: str | None) -> Any:
    """Return an annotation whose option stands in the group's panel, if it names no other."""
    kind, *extras = get_args(hint)
    option = copy(next(one for one in extras if isinstance(one, OptionInfo)))
    option.rich_help_panel = option.rich_help_panel or panel
    return Annotated[kind, option]

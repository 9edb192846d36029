"""`upperson-rt token`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.groups import OptionGroup, grouped
from upperson_rt.cli.options import Output, age_seconds
from upperson_rt.cli.output import new_table, print_json, print_line, print_note, print_table
from upperson_rt.errors import UsageError
from upperson_rt.printable import local_time


@dataclass(frozen=True)
class NewToken(OptionGroup, panel="Token"):
    """A new token."""

    role: Annotated[
        str,
        typer.Option(
            "--role",
            help="viewer (search), operator (also mark and export), admin (also delete, prune and "
            "manage accounts).",
        ),
    ] = "viewer"
    camera: Annotated[
        list[str] | None,
        typer.Option(
            "--camera", help="It sees only this camera; may be given again. An admin sees all."
        ),
    ] = None
    expires: Annotated[
        float | None,
        typer.Option(
            "--expires",
            parser=age_seconds,
            metavar="AGE",
            help="The token expires after this, such as 30d or 12h.",
            show_default="never",
        ),
    ] = None

    def require_default(self, option: str) -> None:
        """Raise UsageError if any of these options was given beside another one."""
        if self != NewToken():
            raise UsageError(f"{option} makes no token: leave --role, --camera and --expires out")


@dataclass(frozen=True)
class Action(OptionGroup, panel="File"):
    """What happens to the file."""

    revoke: Annotated[bool, typer.Option("--revoke", help="Remove the token of NAME instead.")] = (
        False
    )
    list_all: Annotated[
        bool, typer.Option("--list", help="List the names in the file instead, without secrets.")
    ] = False


@grouped
def token(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Token file; created if missing.")],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Its user, as named in the query log.")
    ] = None,
    *,
    new: NewToken,
    action: Action,
    output: Output,
) -> None:
    """Make a token for the console, and print it once: the file has only its hash.

    An earlier token of the same name stops working. A running console reads the file again after
    each change.

    Example: `upperson-rt token tokens.json anna --role operator --expires 90d`
    """
    if action.list_all:
        if name is not None or action.revoke:
            raise UsageError("--list takes the file alone: leave the rest out")
        new.require_default("--list")
        _list(file, output.as_json)
        return
    if name is None:
        raise UsageError("name the user of the token, or list the file with  --list")
    if action.revoke:
        new.require_default("--revoke")
        _revoke(file, name, output.as_json)
        return
    secret = _make(file, name, new)
    if output.as_json:
        made = {"name": name, "role": new.role, "cameras": new.camera or None}
        print_json({**made, "file": str(file), "token": secret})
        return
    print_note(f"the token of {name}, {new.role}, in {file}; keep it, it is not shown again:")
    print_line(secret)


def _make(file: Path, name: str, new: NewToken) -> str:
    from upperson_console.accounts import ROLES, add_token
    from upperson_rt.arguments import check_choice

    check_choice(new.role, "--role", ROLES)
    cameras = tuple(new.camera) if new.camera else None
    return add_token(file, name, ROLES[ROLES.index(new.role)], cameras, new.expires)


def _revoke(file: Path, name: str, as_json: bool) -> None:
    from upperson_console.accounts import Accounts

    Accounts.revoke(file, name)
    if as_json:
        print_json({"name": name, "file": str(file), "revoked": True})
    else:
        print_line(f"revoked {name} in {file}")


def _list(file: Path, as_json: bool) -> None:
    from upperson_console.accounts import Accounts

    entries = Accounts.read(file)
    if as_json:
        rows = [
            {
                "name": entry.name,
                "role": entry.role,
                "cameras": entry.cameras,
                "created": entry.created,
                "expires": entry.expires,
                "expired": entry.has_expired(),
            }
            for entry in entries
        ]
        print_json({"file": str(file), "tokens": rows})
        return
    table = new_table("name", "role", "cameras", "created", "expires")
    for entry in entries:
        expires = "never" if entry.expires is None else local_time(entry.expires)
        table.add_row(
            entry.name,
            entry.role,
            "all" if entry.cameras is None else ", ".join(entry.cameras),
            local_time(entry.created) or "unknown",
            f"{expires} (expired)" if entry.has_expired() else expires,
        )
    print_table(table)

"""`upperson-rt token`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.options import Debug, Json, age_seconds
from upperson_rt.cli.output import new_table, print_json, print_line, print_note, print_table
from upperson_rt.errors import UsageError
from upperson_rt.printable import local_time

if TYPE_CHECKING:
    from upperson_console.credentials import Credential

__all__ = ["token"]


def token(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Token file; made if need be.")],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Who it is for; stands in the log.")
    ] = None,
    role: Annotated[
        str,
        typer.Option(
            "--role",
            help="viewer (search), operator (also mark and export), admin (also delete and prune).",
        ),
    ] = "viewer",
    camera: Annotated[
        list[str] | None,
        typer.Option("--camera", help="A viewer sees only this camera; may be given again."),
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(
            "--expires",
            parser=age_seconds,
            metavar="AGE",
            help="The token stops working after this, such as 30d or 12h.",
            show_default="never",
        ),
    ] = None,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Remove the token of NAME instead.")
    ] = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="List the names in the file instead, without secrets.")
    ] = False,
    onvif: Annotated[
        bool,
        typer.Option(
            "--onvif",
            help="Passwords for the ONVIF search instead, in a file of their own, where they are "
            "kept as they are: ONVIF cannot do with a hash.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a token for the console, and print it: it is stored hashed and never shown again.

    An earlier one of the same name stops working. A running console follows every change of the
    file.

    Example: `upperson-rt token tokens.json anna --role operator --expires 90d`
    """
    cameras = tuple(camera) if camera else None
    is_new = role != "viewer" or cameras is not None or expires is not None
    if list_all:
        if name is not None or revoke or is_new:
            raise UsageError("--list takes the file alone, and --onvif: leave the rest out")
        _list(file, onvif, as_json)
        return
    if name is None:
        raise UsageError("name who the token is for, or list the file with  --list")
    if revoke:
        if is_new:
            raise UsageError("--revoke takes file and name alone, and --onvif: leave the rest out")
        _revoke(file, name, onvif, as_json)
        return
    made = _make(file, name, role, cameras, expires, onvif)
    if as_json:
        shown = None if cameras is None else list(cameras)
        print_json({"name": name, "role": role, "cameras": shown, "file": str(file), "token": made})
        return
    what = "ONVIF password" if onvif else "token"
    print_note(f"the {what} of {name}, {role}, in {file}; keep it, it is not shown again:")
    print_line(made)


def _make(
    file: Path,
    name: str,
    role: str,
    cameras: tuple[str, ...] | None,
    expires: float | None,
    onvif: bool,
) -> str:
    from upperson_console.accounts import ROLES, add_token
    from upperson_console.onvif.security import add_user
    from upperson_rt.arguments import check_choice

    check_choice(role, "--role", ROLES)
    if not onvif:
        return add_token(file, name, ROLES[ROLES.index(role)], cameras, expires)
    if role != "viewer":
        raise UsageError(f"by ONVIF one can only search: leave --role {role} out")
    return add_user(file, name, cameras, expires)


def _revoke(file: Path, name: str, onvif: bool, as_json: bool) -> None:
    from upperson_console.accounts import revoke_token
    from upperson_console.onvif.security import revoke_user

    (revoke_user if onvif else revoke_token)(file, name)
    if as_json:
        print_json({"name": name, "file": str(file), "revoked": True})
    else:
        print_line(f"revoked {name} in {file}")


def _list(file: Path, onvif: bool, as_json: bool) -> None:
    from upperson_console.accounts import read_tokens
    from upperson_console.onvif.security import read_users

    entries: Sequence[tuple[Credential, str]] = (
        [(user, "viewer") for user in read_users(file)]
        if onvif
        else [(one, one.role) for one in read_tokens(file)]
    )
    if as_json:
        rows = [
            {
                "name": entry.name,
                "role": role,
                "cameras": None if entry.cameras is None else list(entry.cameras),
                "created": entry.created,
                "expires": entry.expires,
                "expired": entry.has_expired(),
            }
            for entry, role in entries
        ]
        print_json({"file": str(file), "tokens": rows})
        return
    table = new_table("name", "role", "cameras", "created", "expires")
    for entry, role in entries:
        expires = "never" if entry.expires is None else local_time(entry.expires)
        table.add_row(
            entry.name,
            role,
            "all" if entry.cameras is None else ", ".join(entry.cameras),
            local_time(entry.created) or "unknown",
            f"{expires} (expired)" if entry.has_expired() else expires,
        )
    print_table(table)

"""`upperson-rt serve`."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_console.view_log import MOST_QUOTA, USUAL_QUOTA
from upperson_log.cli import TsaCert
from upperson_maintenance.cli.retention import Keeping
from upperson_rt.cli.app import ending_gently
from upperson_rt.cli.groups import ADVANCED, OptionGroup, grouped
from upperson_rt.cli.options import (
    GalleryOption,
    Model,
    Output,
    QueryLogOption,
    age_seconds,
    default_gallery,
)
from upperson_rt.cli.output import print_json, print_line, print_note, print_warning
from upperson_rt.errors import BackendError, UsageError, missing_extra

if TYPE_CHECKING:
    from upperson_console.evidence_check import Seal
    from upperson_console.server import Server
    from upperson_log.query_log import QueryLog

_PORT = 8480
_PICTURE_BYTES = 240 << 20
"""Shared by all decoded pictures; one takes half at most, which are 18 megapixels."""
_SWITCH_S = 0.0005
"""Python's switch interval. A request changes threads several times, and waits this long each time
if another thread computes."""


@dataclass(frozen=True)
class Served(OptionGroup, panel="Model and gallery"):
    """The gallery, and the files that the console writes."""

    gallery: GalleryOption = default_gallery
    state: Annotated[
        Path,
        typer.Option(
            "--state",
            metavar="FOLDER",
            help="Query log, saved searches, marks and query pictures.",
        ),
    ] = Path("console")
    query_log: QueryLogOption = None
    bin: Annotated[
        str,
        typer.Option(
            "--bin",
            metavar="AGE",
            help="How long deleted pictures can be restored, such as 7d or 12h; 0 deletes at once.",
        ),
    ] = "7d"


@dataclass(frozen=True)
class Address(OptionGroup, panel="Address"):
    """Where the console listens."""

    host: Annotated[
        str,
        typer.Option(
            "--host", help="Address to listen at; any but this machine's own needs --token-file."
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = _PORT
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="Host name of this server for browsers, besides the machine's own; may be given "
            "again.",
            rich_help_panel=ADVANCED,
        ),
    ] = None


@dataclass(frozen=True)
class Security(OptionGroup, panel="Access"):
    """Accounts and TLS."""

    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", metavar="FILE", help="Accounts and roles; made by  upperson-rt token."
        ),
    ] = None
    view_quota: Annotated[
        int,
        typer.Option(
            "--view-quota",
            min=0,
            max=MOST_QUOTA,
            help="Different pictures that an account may see an hour; 0 for any number.",
        ),
    ] = USUAL_QUOTA
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate, PEM.")
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key, PEM.")
    ] = None
    oversight: Annotated[
        Path | None,
        typer.Option(
            "--oversight",
            metavar="FILE",
            help="Purposes, approvals by a second person and refused sentences, YAML.",
        ),
    ] = None


@dataclass(frozen=True)
class Evidence(OptionGroup, panel="Evidence"):
    """What exports contain, and who signs them."""

    sign_exports: Annotated[
        Path | None,
        typer.Option(
            "--sign-exports",
            metavar="KEY",
            help="Sign exports with this private key (PEM), for  upperson-rt evidence verify.",
        ),
    ] = None
    timestamp_url: Annotated[
        str | None,
        typer.Option(
            "--timestamp-url",
            metavar="URL",
            help="Let a time-stamp authority (RFC 3161) stamp exports; it gets a hash only.",
        ),
    ] = None
    timestamp_required: Annotated[
        bool, typer.Option("--timestamp-required", help="Refuse exports without a time stamp.")
    ] = False
    tsa_cert: TsaCert = None
    blur: Annotated[
        bool,
        typer.Option(
            "--blur",
            help="Pixelate frames and clips outside the person's box, also in exports; clips are "
            "withheld without the extra camera. Operators see all for a reason, which is logged.",
        ),
    ] = False


@dataclass(frozen=True)
class Services(OptionGroup, panel="Services"):
    """What the console offers beside searches."""

    watch: Annotated[
        list[str] | None,
        typer.Option(
            "--watch",
            metavar="FILE|URL",
            help="Metrics of  upperson-rt watch  (--metrics-file or --metrics-port) for the live "
            "page; may be given again.",
        ),
    ] = None


@grouped
def serve(
    *, model: Model, served: Served, address: Address, access: Security, evidence: Evidence,
    services: Services, keeping: Keeping, output: Output,
) -> None:  # fmt: skip
    """Serve the console: search pages for people, an API for programs.

    On this machine alone no login is needed. Each search, view, export, mark and deletion goes to
    the query log. Ctrl-C or SIGTERM ends the server.

    Example: `upperson-rt serve -b bundle -g gallery --open`
    """
    require_packages("the console")
    from upperson_console.guard import is_loopback

    is_local = is_loopback(address.host)
    if not is_local and access.token_file is None:
        raise UsageError(
            f"--host {address.host} opens the console to the network: make tokens with  "
            "upperson-rt token FILE NAME  and name the file with  --token-file",
            code="token_file_missing",
            host=address.host,
        )
    if (access.tls_cert is None) != (access.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together: give both", code="tls_incomplete")
    opening = _opened(model, served, address, access, evidence, services, keeping)
    with opening as (server, log):
        if not is_local and access.tls_cert is None:
            print_warning("without --tls-cert tokens and pictures cross the network in the clear")
        _run(server, log, served.state, address.open_browser, output.as_json)


@contextmanager
def _opened(
    model: Model, served: Served, address: Address, access: Security, evidence: Evidence,
    services: Services, keeping: Keeping,
) -> "Iterator[tuple[Server, QueryLog]]":  # fmt: skip
    """Open everything; yield server and query log."""
    from upperson_console.accounts import Access, Account, Accounts
    from upperson_console.bin import emptying, require_no_loss
    from upperson_console.live import Live, check_source
    from upperson_console.oversight import read_oversight
    from upperson_console.server import Server, listening, tls_context
    from upperson_console.service import ConsoleService
    from upperson_console.user_state import UserState
    from upperson_log.query_log import QueryLog
    from upperson_log.writer import process_user
    from upperson_maintenance.retention import RetentionThread
    from upperson_rt.bundle import Bundle
    from upperson_rt.gallery import Gallery

    retention = keeping.retention()
    live = Live([check_source(source) for source in services.watch or ()])
    oversight = None if access.oversight is None else read_oversight(access.oversight)
    if oversight is not None and oversight.two_persons and access.token_file is None:
        raise UsageError(
            "two_persons needs two accounts: make tokens with  upperson-rt token FILE NAME  and "
            "name the file with  --token-file",
            code="token_file_missing",
        )
    accounts = Access(
        None if access.token_file is None else Accounts(access.token_file),
        Account(name=process_user(), role="admin", logs_in=False),
        oversight,
    )
    bin_s = 0.0 if served.bin == "0" else age_seconds(served.bin)
    opened = Bundle.open(
        model.bundle, model.variant, model.backend, model.device,
        threads=model.threads, trust=model.trust,
    )  # fmt: skip
    seal = _seal(evidence, opened.path, model.trust)
    encoder = opened.encoder()
    tls = None
    if access.tls_cert is not None and access.tls_key is not None:
        tls = tls_context(access.tls_cert, access.tls_key)

    def open_gallery() -> Gallery:
        return Gallery.open(served.gallery, encoder.fingerprint, encoder.embed_dim)

    with ExitStack() as stack:
        place = stack.enter_context(listening(address.host, address.port))
        with closing(open_gallery()) as found:  # A refused start creates no files.
            require_no_loss(found, bin_s)
        given_log = served.query_log
        log = None if given_log is None else stack.enter_context(QueryLog(given_log))
        user_state = stack.enter_context(closing(UserState(served.state / "console.sqlite")))
        log = log or stack.enter_context(QueryLog(served.state / "query.log"))
        background_KD = opened.golden.image_embeds
        service = ConsoleService(
            encoder,
            open_gallery,
            log,
            user_state,
            background_KD,
            seal,
            evidence.blur,
            access.view_quota,
            oversight,
            bin_s,
        )
        stack.callback(service.close)
        if retention is not None:
            own = stack.enter_context(open_gallery())
            stack.enter_context(closing(RetentionThread(retention, own)))
        stack.enter_context(emptying(service))
        if bin_s and service.bin is None:
            print_note(f"gallery {served.gallery} has no bin: deletions are final")
        names = [address.host, *(address.name or ())]
        yield Server(service, accounts, place, names, live, tls), log


def _seal(evidence: Evidence, bundle: Path, trust: Path | None) -> "Seal":
    """Read key and authority for exports, and whose signature the bundle has, verified or not."""
    from upperson_console.evidence_check import Seal
    from upperson_log.timestamps import TimeStampServer, read_certificates
    from upperson_signature.signature import (
        key_fingerprint,
        named_key,
        read_private_key,
        read_public_key,
    )

    signer = named_key(bundle) if trust is None else key_fingerprint(read_public_key(trust))
    state = {"signed_by": signer, "verified": trust is not None}
    key, url, cert = evidence.sign_exports, evidence.timestamp_url, evidence.tsa_cert
    if not url and (cert is not None or evidence.timestamp_required):
        what = "--timestamp-required and --tsa-cert need --timestamp-url"
        raise UsageError(what, code="timestamp_url_missing")
    trusted = [] if cert is None else read_certificates(cert)
    return Seal(
        key=None if key is None else read_private_key(key),
        bundle=state,
        timestamps=TimeStampServer(url, trusted, evidence.timestamp_required) if url else None,
    )


def _run(
    server: "Server",
    log: "QueryLog",
    state: Path,
    open_browser: bool,
    as_json: bool,
) -> None:
    """Serve until a signal; report address and last chain."""
    from upperson_rt.image_file import limit_memory

    limit_memory(_PICTURE_BYTES)
    sys.setswitchinterval(_SWITCH_S)
    with ending_gently() as stopped:
        server.start()
        if as_json:
            files = {"state": str(state), "log": str(log.path)}
            print_json({"url": server.url, **files})
        else:
            print_line(f"console: {server.url}")
        _note_chain(log)
        if open_browser:
            import webbrowser

            webbrowser.open(server.url)
        while not stopped and not server.wait(0.2):
            pass
        print_note("ending: running requests are answered first")
        server.end()
        _note_chain(log)
        if not stopped:
            raise BackendError("the server ended by itself; its log says why")


def require_packages(purpose: str) -> None:
    """Raise BackendError if a package of the extra ``serve`` is missing."""
    try:
        import fastapi  # noqa: F401 - Only whether it is installed.
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "fastapi", "serve", purpose) from error


def _note_chain(log: "QueryLog") -> None:
    """Print the last chain, which a service manager keeps out of reach of this user."""
    if log.problem:
        print_warning(log.problem)
    print_note(f"query log {log.path}: last chain {log.last_chain() or 'none'}")

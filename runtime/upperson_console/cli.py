"""`upperson-rt serve`."""

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.app import ending_gently
from upperson_rt.cli.options import (
    BackendOption,
    BundleOption,
    Debug,
    DeviceOption,
    GalleryOption,
    Json,
    QueryLogOption,
    Threads,
    TrustOption,
    VariantOption,
    default_bundle,
    default_gallery,
)
from upperson_rt.cli.output import print_json, print_line, print_note, print_warning
from upperson_rt.errors import BackendError, UsageError, missing_extra

if TYPE_CHECKING:
    from upperson_console.accounts import Access
    from upperson_rt.query_log import QueryLog

__all__ = ["serve"]

_PORT = 8480
_PICTURE_BYTES = 240 << 20
"""Shared by all pictures that the console decodes; one takes half, which are 18 megapixels."""

_SWITCH_S = 0.0005
"""Between threads of Python: an answer changes threads a few times, and each time waits so long for
one that computes."""


def serve(
    bundle: BundleOption = default_bundle,
    trust: TrustOption = None,
    gallery: GalleryOption = default_gallery,
    host: Annotated[
        str,
        typer.Option(
            "--host", help="Address to listen at; any but this machine's own needs --token-file."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any that is free.")
    ] = _PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", metavar="FILE", help="Who may do what; made by  upperson-rt token."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key, PEM.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="Host name by which browsers call this server, besides the machine's own; may be "
            "given again.",
        ),
    ] = None,
    watch: Annotated[
        list[str] | None,
        typer.Option(
            "--watch",
            metavar="FILE|URL",
            help="What  upperson-rt watch  publishes with --metrics-file or --metrics-port, for "
            "the live page; may be given again.",
        ),
    ] = None,
    state: Annotated[
        Path,
        typer.Option(
            "--state",
            metavar="FOLDER",
            help="Saved searches, marks, pictures that were asked with, and the query log.",
        ),
    ] = Path("console"),
    query_log: QueryLogOption = None,
    onvif: Annotated[
        Path | None,
        typer.Option(
            "--onvif",
            metavar="FILE",
            help="Also offer the ONVIF search service to those whom a file names; made by  "
            "upperson-rt token --onvif.",
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve the console: search pages for people, an API for programs.

    On this machine alone nobody logs in. Everything that is searched, looked at, exported, marked
    and deleted goes to the query log. Ctrl-C or SIGTERM ends it.

    Example: `upperson-rt serve -b bundle -g gallery --open`
    """
    try:
        import fastapi  # noqa: F401 - Only whether it is there.
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "fastapi", "serve", "the console") from error
    from upperson_console.desk import Desk
    from upperson_console.guard import is_loopback
    from upperson_console.live import Live, check_source
    from upperson_console.memory import Memory
    from upperson_console.onvif.routes import PATH, OnvifRoutes
    from upperson_console.onvif.security import Users
    from upperson_console.server import Server, listening, tls_context
    from upperson_rt.bundle import Bundle
    from upperson_rt.gallery import Gallery
    from upperson_rt.image_file import limit_memory
    from upperson_rt.query_log import QueryLog

    if not is_loopback(host) and token_file is None:
        raise UsageError(
            f"--host {host} lets others in: make tokens with  upperson-rt token FILE NAME  and "
            "name the file with  --token-file"
        )
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together: give both")
    live = Live([check_source(source) for source in watch or ()])
    access = _access(token_file)
    users = None if onvif is None else Users(onvif)
    opened = Bundle.open(bundle, variant, backend, device, threads=threads, trust=trust)
    encoder = opened.encoder()
    tls = None if tls_cert is None or tls_key is None else tls_context(tls_cert, tls_key)

    def open_gallery() -> Gallery:
        return Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim)

    with ExitStack() as stack:
        place = stack.enter_context(listening(host, port))
        open_gallery().close()  # What cannot be served leaves no state behind.
        log = None if query_log is None else stack.enter_context(QueryLog(query_log))
        memory = stack.enter_context(closing(Memory(state / "console.sqlite")))
        log = log or stack.enter_context(QueryLog(state / "query.log"))
        desk = Desk(encoder, open_gallery, log, memory, opened.canaries.image_embeds)
        stack.callback(desk.close)
        routes = None if users is None else OnvifRoutes(desk, users, live)
        server = Server(desk, access, place, [host, *(name or ())], live, tls, routes)
        if not is_loopback(host) and tls is None:
            print_warning("without --tls-cert tokens and pictures cross the network in the clear")
        limit_memory(_PICTURE_BYTES)
        sys.setswitchinterval(_SWITCH_S)
        with ending_gently() as stopped:
            server.start()
            told = {"url": server.url}
            if users is not None:
                told["onvif"] = f"{server.url.rstrip('/')}{PATH}/device_service"
            if as_json:
                print_json({**told, "state": str(state), "log": str(log.path)})
            else:
                print_line(f"console: {server.url}")
                if users is not None:
                    print_line(f"onvif: {told['onvif']}")
            _note_chain(log)
            if open_browser:
                import webbrowser

                webbrowser.open(server.url)
            while not stopped and not server.wait(0.2):
                pass
            print_note("ending: what has been asked is answered first")
            server.end()
            _note_chain(log)
            if not stopped:
                raise BackendError("the server ended by itself; its log says why")


def _note_chain(log: "QueryLog") -> None:
    """Say the last chain where a service manager keeps it, out of reach of this user."""
    if log.problem:
        print_warning(log.problem)
    print_note(f"query log {log.path}: last chain {log.last_chain() or 'none'}")


def _access(token_file: Path | None) -> "Access":
    from upperson_console.accounts import Access, Account, Accounts
    from upperson_rt.query_log import process_user

    accounts = None if token_file is None else Accounts(token_file)
    return Access(accounts, Account(name=process_user(), role="admin", logs_in=False))

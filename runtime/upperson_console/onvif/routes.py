"""ONVIF over HTTP: two services, their descriptions, and the pictures of results."""

from xml.etree.ElementTree import Element

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from upperson_console.accounts import Account
from upperson_console.api import picture_response
from upperson_console.guard import BodyRefusedError
from upperson_console.limits import BusyError
from upperson_console.live import Live
from upperson_console.onvif import soap
from upperson_console.onvif.description import ServiceName, wsdl
from upperson_console.onvif.device import Address, DeviceService
from upperson_console.onvif.recordings import Call, Recordings
from upperson_console.onvif.security import Authentication, UnauthorizedError, Users
from upperson_console.onvif.sessions import SearchSessions, no_room
from upperson_console.onvif.soap import SEARCH, WSSE, FaultError, invalid
from upperson_console.problems import problem_of
from upperson_console.service import ConsoleService
from upperson_rt.printable import error_text, get_logger, shortened

PATH = "/onvif"
_LOG = get_logger(__name__)
_MEDIA_TYPE = "application/soap+xml; charset=utf-8"
_MOST_ANONYMOUS_BYTES = 64 << 10
"""Of a request until its sender is known."""
_WITH_PICTURE = f"{{{SEARCH}}}SearchImageByImageRequest"
_MOST_LARGE = 2
"""Larger requests at a time, each of which takes several times its size while it is read."""


class OnvifRoutes:
    """The routes below `PATH`."""

    def __init__(
        self, service: ConsoleService, users: Users, live: Live, is_discoverable: bool = False
    ) -> None:
        encoder = service.encoder
        self._device = DeviceService(encoder.fingerprint, encoder.variant, is_discoverable)
        self.authentication = Authentication(users)
        self.sessions = SearchSessions(lambda: live.has_ended)
        self._service = service
        self._recordings = Recordings(service, self.sessions)
        self._large = 0
        self.router = APIRouter(prefix=PATH, include_in_schema=False)
        for name in ("device", "search"):
            self.router.post(f"/{name}_service")(self._answer)
        self.router.get("/{name}.wsdl")(_description)
        self.router.get("/pictures/{id}")(self._picture)

    async def _answer(self, request: Request) -> Response:
        try:
            status, content = 200, await self._answered(request)
            return Response(content, status, media_type=_MEDIA_TYPE)
        except BodyRefusedError:
            raise
        except ClientDisconnect:
            return Response(status_code=400)  # No client receives it.
        except Exception as error:
            return _fault_response(request, error)

    async def _answered(self, request: Request) -> bytes:
        content, account = bytearray(), None
        is_large = is_whole = False
        blocks = request.stream()
        try:
            async for block in blocks:
                content += block
                if not is_large and len(content) > _MOST_ANONYMOUS_BYTES:
                    account = self._sender(request, soap.header_of(content))
                    if self._large >= _MOST_LARGE:
                        raise no_room("too many pictures are being sent: try again in a moment")
                    is_large = True
                    self._large += 1
            is_whole = True
            header, body = await run_in_threadpool(soap.read_envelope, content)
            content.clear()
            if is_large and body.tag != _WITH_PICTURE:  # The few places are for pictures.
                raise invalid(f"only a picture makes a request larger than {_MOST_ANONYMOUS_BYTES}")
            return soap.message(await self._run(request, header, body, account))
        except FaultError:
            if not is_whole:  # Clients read a response only after they have sent all.
                async for _ in blocks:
                    pass
            raise
        finally:
            self._large -= is_large

    async def _run(
        self, request: Request, header: Element, body: Element, account: Account | None
    ) -> Element:
        address = _address(request)
        if body.tag in self._device.public:
            return self._device.public[body.tag](body, address)
        about = self._device.private.get(body.tag)
        namespace, _, name = body.tag.rpartition("}")
        operation = self._recordings.operations.get(name) if namespace[1:] == SEARCH else None
        if operation is None and about is None:
            raise FaultError(
                "Receiver", ("ActionNotSupported",), f"{shortened(body.tag)} is not offered here"
            )
        account = account or self._sender(request, header)
        if operation is None:
            assert about is not None
            return about(body, address)
        return await operation(Call(body, account, address, request.is_disconnected))

    def _sender(self, request: Request, header: Element | None) -> Account:
        """Return the account of a request; raises UnauthorizedError."""
        kind, _, proof = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "digest":
            return self.authentication.by_digest(proof, request.method, _target(request))
        security = None if header is None else soap.child(header, WSSE, "Security")
        if security is None:
            raise self.authentication.challenge(
                "authenticate: a UsernameToken of WS-Security at the beginning, or HTTP Digest",
                problem="missing",
            )
        return self.authentication.by_header(security)

    async def _picture(self, request: Request, id: int) -> Response:
        try:
            account = self._sender(request, None)
        except UnauthorizedError as refused:
            return _fault_response(request, refused)
        return await run_in_threadpool(picture_response, self._service, account, id, "view")


def _fault_response(request: Request, error: Exception) -> Response:
    """Return an error as a SOAP fault; defects are logged."""
    problem = problem_of(error)
    if isinstance(error, FaultError):
        fault = error
    elif isinstance(error, BusyError):
        fault = no_room(str(error))
    elif problem is not None and problem.status in (404, 422):
        fault = invalid(problem.detail)
    elif problem is not None:
        fault = FaultError("Receiver", ("Action",), problem.detail)
    else:
        _LOG.error("internal error at %s: %s", request.url.path, error_text(error))
        name = type(error).__name__
        fault = FaultError(
            "Receiver", ("Action",), f"internal error: {name}; the server's log says more"
        )
    status, content = soap.fault_answer(fault)
    challenges = fault.challenges if isinstance(fault, UnauthorizedError) else ()
    response = Response(content, 401 if challenges else status, media_type=_MEDIA_TYPE)
    for challenge in challenges:
        response.headers.append("www-authenticate", challenge)
    return response


def _address(request: Request) -> Address:
    reached = request.scope.get("server") or ("",)
    return Address(f"{request.url.scheme}://{request.headers['host']}", PATH, str(reached[0]))


def _target(request: Request) -> str:
    """Return path and query as they were sent."""
    path = request.scope["raw_path"].decode("latin-1")
    query = request.scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else str(path)


def _description(name: ServiceName) -> Response:
    return Response(wsdl(name), media_type="text/xml")

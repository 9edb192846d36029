"""A server of ONVIF over the toy gallery, and unmodified clients of it."""

import base64
import hashlib
import io
import os
import shutil
import time
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import requests
import zeep
from requests.auth import HTTPDigestAuth
from zeep.exceptions import Fault
from zeep.wsse.username import UsernameToken

from tests.helpers.console import START
from tests.unit.runtime.serve.conftest import LOCAL, make_service
from upperson_console.accounts import Access, Accounts, add_token
from upperson_console.live import Live
from upperson_console.onvif.description import wsdl
from upperson_console.onvif.routes import OnvifRoutes
from upperson_console.onvif.security import Users, add_user
from upperson_console.server import Server, listening

NOW = START + 86_400
"""After all pictures."""


@cache
def described(service):
    """A service as its WSDL has it."""
    return zeep.wsdl.Document(io.BytesIO(wsdl(service)), zeep.Transport())


def fault(*subcodes, code=None, match=None):
    """Expect a fault with these subcodes, and a code if one is given."""

    def is_it(found):
        assert [one.localname for one in found.subcodes] == list(subcodes)
        return code in (None, found.code)

    return pytest.raises(Fault, check=is_it, match=match)


class Onvif:
    """A running server."""

    def __init__(self, service, routes, server, passwords, log, token):
        self.service, self.routes, self.server = service, routes, server
        self.sessions, self.log, self.token = routes.sessions, log, token
        self.passwords = passwords
        self.url = server.url.rstrip("/")
        self.guard = server._server.config.app
        self._opened = []

    def client(self, name="vms", proof="token", password=None):
        """Clients of both services, which authenticate by a token, a digest, or not."""
        password = self.passwords.get(name) if password is None else password
        session = requests.Session()
        self._opened.append(session)
        wsse = None
        if proof == "digest":
            session.auth = HTTPDigestAuth(name, password)
        elif proof == "token":
            wsse = UsernameToken(name, password, use_digest=True)
        made = {}
        for service in ("device", "search"):
            transport = zeep.Transport(session=session)
            client = zeep.Client(described(service), wsse=wsse, transport=transport)
            binding = f"{{http://www.onvif.org/ver10/{service}/wsdl}}{service.title()}Binding"
            made[service] = client.create_service(binding, f"{self.url}/onvif/{service}_service")
        return SimpleNamespace(**made)

    def close(self):
        for session in self._opened:
            session.close()


@contextmanager
def running(gallery, state, encoder):
    """A server over a gallery for `vms`, who sees all, and `door`, who sees one camera."""
    file = state / "onvif.json"
    passwords = {n: add_user(file, n, c) for n, c in (("vms", None), ("door", ("gate",)))}
    token = add_token(state / "tokens.json", "ada", "admin", None)
    service = make_service(gallery, state, encoder)
    access, live = Access(Accounts(state / "tokens.json"), LOCAL), Live(())
    routes = OnvifRoutes(service, Users(file), live)
    routes.sessions.now = lambda: NOW
    with listening("127.0.0.1", 0) as place:
        server = Server(service, access, place, live=live, onvif=routes)
        server.start()
        onvif = Onvif(service, routes, server, passwords, state / "query.log", token)
        try:
            yield onvif
        finally:
            onvif.close()
            server.end()
            service.close()


@pytest.fixture(scope="session")
def shared(served_folder, served_encoder, tmp_path_factory):
    """A server that many tests share: they only read it."""
    state = tmp_path_factory.mktemp("onvif")
    with running(served_folder / "gallery", state, served_encoder) as onvif:
        yield onvif


@pytest.fixture
def vms(shared):
    """The search service as `vms` sees it; no search of others goes on."""
    shared.sessions._sessions.clear()
    return shared.client().search


@pytest.fixture
def onvif(served_folder, served_encoder, tmp_path):
    """A server of one test."""
    shutil.copytree(served_folder / "gallery", tmp_path / "gallery")
    with running(tmp_path / "gallery", tmp_path, served_encoder) as made:
        yield made


WSS = "http://docs.oasis-open.org/wss/2004/01/oasis-200401-wss"
NAMESPACES = (
    'xmlns:env="http://www.w3.org/2003/05/soap-envelope" '
    'xmlns:tse="http://www.onvif.org/ver10/search/wsdl" '
    'xmlns:tds="http://www.onvif.org/ver10/device/wsdl" '
    f'xmlns:wsse="{WSS}-wssecurity-secext-1.0.xsd" xmlns:wsu="{WSS}-wssecurity-utility-1.0.xsd"'
)


def security(name, password, nonce=None, created=None, kind="PasswordDigest"):
    """A header with a UsernameToken."""
    nonce = os.urandom(16) if nonce is None else nonce
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if created is None else created
    digest = hashlib.sha1(nonce + created.encode() + password.encode()).digest()
    kind = f"{WSS}-username-token-profile-1.0#{kind}"
    return (
        "<wsse:Security><wsse:UsernameToken>"
        f"<wsse:Username>{name}</wsse:Username>"
        f'<wsse:Password Type="{kind}">{base64.b64encode(digest).decode()}</wsse:Password>'
        f"<wsse:Nonce>{base64.b64encode(nonce).decode()}</wsse:Nonce>"
        f"<wsu:Created>{created}</wsu:Created>"
        "</wsse:UsernameToken></wsse:Security>"
    )


def whole(body, before="", header=""):
    """The text of an envelope."""
    return (
        f"{before}<env:Envelope {NAMESPACES}><env:Header>{header}</env:Header>"
        f"<env:Body>{body}</env:Body></env:Envelope>"
    )


def envelope(onvif, body, header=None):
    """The bytes of a request of `vms`, unless it has another header."""
    header = security("vms", onvif.passwords["vms"]) if header is None else header
    return whole(body, header=header).encode()

"""A server of ONVIF over the toy gallery, and unmodified clients of it."""

import base64
import hashlib
import io
import os
import shutil
import time
from contextlib import ExitStack, contextmanager
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


@contextmanager
def running(gallery, state, encoder, oversight=None):
    """A server over a gallery for `vms`, who sees all, and `door`, who sees one camera."""
    file = state / "onvif.json"
    passwords = {n: add_user(file, n, c) for n, c in (("vms", None), ("door", ("gate",)))}
    token = add_token(state / "tokens.json", "ada", "admin", None)
    service = make_service(gallery, state, encoder, oversight)
    access, live = Access(Accounts(state / "tokens.json"), LOCAL, oversight), Live(())
    routes = OnvifRoutes(service, Users(file), live)
    routes.sessions.now = lambda: NOW
    with listening("127.0.0.1", 0) as place, ExitStack() as opened:
        server = Server(service, access, place, live=live, onvif=routes)
        url = server.url.rstrip("/")

        def client(name="vms", proof="token", password=None):
            """Clients of both services, which authenticate by a token, a digest, or not."""
            password = passwords.get(name) if password is None else password
            session = opened.enter_context(requests.Session())
            session.auth = HTTPDigestAuth(name, password) if proof == "digest" else None
            wsse = UsernameToken(name, password, use_digest=True) if proof == "token" else None
            made = {}
            for kind in ("device", "search"):
                known = zeep.Client(
                    described(kind), wsse=wsse, transport=zeep.Transport(session=session)
                )
                binding = f"{{http://www.onvif.org/ver10/{kind}/wsdl}}{kind.title()}Binding"
                made[kind] = known.create_service(binding, f"{url}/onvif/{kind}_service")
            return SimpleNamespace(**made)

        about = {"service": service, "routes": routes, "sessions": routes.sessions, "url": url}
        about |= {"passwords": passwords, "token": token, "log": state / "query.log"}
        server.start()
        try:
            yield SimpleNamespace(server=server, client=client, **about)
        finally:
            opened.close()
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

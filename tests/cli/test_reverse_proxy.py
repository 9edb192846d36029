"""The console behind nginx, as `deploy/nginx.conf` has it."""

import shutil
import socket
import ssl
import subprocess
import time
from contextlib import closing, contextmanager, suppress

import httpx
import pytest

from tests.helpers.certificate import written
from tests.helpers.command_line import ROOT
from tests.helpers.served import served
from upperson_console.accounts import add_token

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

AROUND = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events { worker_connections 512; }
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxied; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    include console.conf;
}
"""


@contextmanager
def proxied(folder, console, certificate, key):
    """Run nginx before a console; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    content = (ROOT / "deploy" / "nginx.conf").read_text()
    for written_there, here in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("    listen [::]:443 ssl;\n", ""),
        ("127.0.0.1:8480", console.removeprefix("http://")),
        ("/etc/upperson/tls.crt", str(certificate)),
        ("/etc/upperson/tls.key", str(key)),
        ("client_header_timeout 5s", "client_header_timeout 1s"),
    ):
        assert written_there in content
        content = content.replace(written_there, here)
    (folder / "console.conf").write_text(content)
    (folder / "nginx.conf").write_text(AROUND)
    with (folder / "nginx.log").open("w") as log:
        process = subprocess.Popen(
            [NGINX, "-p", str(folder), "-c", "nginx.conf"], stdout=log, stderr=log
        )
    place = "127.0.0.1", port
    try:
        while True:
            assert process.poll() is None, (folder / "nginx.log").read_text()
            with suppress(OSError):
                socket.create_connection(place, timeout=1).close()
                break
            time.sleep(0.02)
        yield f"https://127.0.0.1:{port}", place
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def console(bundle_and_crops, gallery_of_crops, tmp_path_factory):
    """Where nginx answers, a client that trusts it, and the token of an operator."""
    folder = tmp_path_factory.mktemp("proxied")
    shutil.copytree(bundle_and_crops / "bundle", folder / "bundle")
    shutil.copytree(gallery_of_crops, folder / "gallery")
    token = add_token(folder / "tokens.json", "olga", "operator", None)
    certificate, key = written(folder, bits=None)
    arguments = ("--token-file", "tokens.json", "--bundle", "bundle", "--gallery", "gallery")
    with (
        served(folder, *arguments) as running,
        proxied(folder, running.url, certificate, key) as (url, place),
    ):
        trusting = ssl.create_default_context(cafile=certificate)
        yield url, place, trusting, token


@pytest.fixture
def client(console):
    """A client of nginx."""
    url, _, trusting, _ = console
    with httpx.Client(base_url=url, verify=trusting, timeout=60) as client:
        yield client


def test_a_browser_logs_in_and_searches(console, client):
    url, _, _, token = console
    assert client.get("/").headers["location"].startswith("/login")
    form = {"token": token, "next": "/?q=red"}
    answer = client.post("/login", data=form, headers={"origin": url})
    assert (answer.status_code, answer.headers["location"]) == (303, "/?q=red")
    assert "; Secure" in answer.headers["set-cookie"]
    assert "olga" in client.get("/?q=red").text
    foreign = client.post("/logout", headers={"origin": "https://other.example"})
    assert foreign.status_code == 403


def test_a_program_searches_and_sends_pictures(console, client, bundle_and_crops):
    headers = {"authorization": f"Bearer {console[3]}"}
    found = client.post("/api/v1/search", json={"sentence": "red coat"}, headers=headers)
    assert "red" in found.json()["hits"][0]["key"]
    content = (bundle_and_crops / "crops" / "blue.png").read_bytes()
    files = {"picture": ("a.png", content)}
    assert client.post("/api/v1/search/picture", files=files, headers=headers).status_code == 200
    large = {"picture": ("a.png", bytes(21 << 20))}
    assert client.post("/api/v1/pictures", files=large, headers=headers).status_code == 413


def test_the_live_page_comes_as_it_happens(console, client):
    headers = {"authorization": f"Bearer {console[3]}"}
    with client.stream("GET", "/live/events", headers=headers) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert next(events.iter_text()).startswith("data: ")


@pytest.mark.parametrize("sent", [None, b"", b"GET / HTTP/1.1\r\nHost: 127."])
def test_a_client_that_sends_nothing_is_not_waited_for(console, sent):
    """Of the handshake, and of a request."""
    _, place, trusting, _ = console
    with closing(socket.create_connection(place, timeout=30)) as silent:
        if sent is not None:
            silent = trusting.wrap_socket(silent, server_hostname="127.0.0.1")
            silent.sendall(sent)
        with closing(silent):
            content = silent.recv(4096)
    assert content == b"" or content.startswith(b"HTTP/1.1 408")


def test_guesses_of_tokens_are_slowed_down(console, client):
    statuses = [client.post("/login", data={"token": "wrong"}).status_code for _ in range(30)]
    assert 429 in statuses

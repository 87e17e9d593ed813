"""Pictures and clips by their address: off unless the demo is started with it, and then from public addresses alone.

A server that fetches what a visitor names can be sent into its own network. So a name is looked up once, each number
that it stands for is checked, the connection goes to a checked number, and every redirect is checked anew.
"""

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from urllib.parse import urljoin, urlsplit

import gradio as gr
import httpx
from gradio import processing_utils

SCHEMES = {"http": 80, "https": 443}
LIMIT = 50 * 2**20  # bytes
SECONDS = 20  # for all of it
REDIRECTS = 3
AT_ONCE = 64 * 1024  # bytes that are read before the time is looked at
OFF = "addresses are not fetched here; download the file and add it"


def is_address(text: str) -> bool:
    """True for an address of the web and nothing else."""
    text = text.strip()
    return text.lower().startswith(("http://", "https://")) and len(text.split()) == 1


def is_public(number: str) -> bool:
    """True if an IP address is of the public internet, also where it carries one of version 4 inside."""
    ip = ipaddress.ip_address(number.partition("%")[0])
    inner = [ip]
    if ip.version == 6:
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
        inner += [ip.ipv4_mapped, ip.sixtofour, ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if nat64 else None]
    return all(x.is_global and not x.is_multicast for x in inner if x is not None)


def fetch(address: str, folder: str | Path) -> Path:
    """The file behind an address, in `folder` under a name of no meaning: what it is, its content tells.

    Raises:
        ValueError: no address of the web, or not on the usual port; a host that is not public, at any step of the way;
            too many redirects, bytes or seconds; no answer. Names the address.
    """
    until, asked = time.monotonic() + SECONDS, address
    try:
        for _ in range(REDIRECTS + 1):
            with closing(_connection(asked, until)) as connection, _ended(connection, until):
                parts = urlsplit(asked)
                target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
                connection.request("GET", target, headers={"User-Agent": "q3vl_mini", "Accept": "image/*, video/*"})
                with connection.getresponse() as answer:
                    if answer.status in (301, 302, 303, 307, 308):
                        asked = urljoin(asked, answer.headers.get("Location", ""))
                        continue
                    if answer.status != 200:
                        raise ValueError(f"it answers with status {answer.status}")
                    return _written(answer, Path(folder) / sha256(address.encode()).hexdigest()[:32], until)
        raise ValueError(f"it redirects more than {REDIRECTS} times")
    except (ValueError, OSError, HTTPException) as error:
        raise ValueError(f"{address[:200]} cannot be fetched: {error}; download the file and add it") from error


@contextmanager
def _ended(connection: HTTPConnection, until: float) -> Iterator[None]:
    """End a connection when its time is over: a server that sends a byte now and then would hold it for ever."""

    def end() -> None:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = Timer(max(until - time.monotonic(), 0), end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _written(answer: HTTPResponse, file: Path, until: float) -> Path:
    """The content in a file; none is left of one that is too large or too slow."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("wb") as out:
            while part := answer.read1(AT_ONCE):
                if out.write(part) and (out.tell() > LIMIT or time.monotonic() > until):
                    break
        if part or answer.length or time.monotonic() > until:
            raise ValueError(f"cut off, more than {LIMIT // 2**20} MB, or not there in {SECONDS} seconds")
    except (ValueError, OSError, HTTPException):
        file.unlink()
        raise
    return file


def _connection(address: str, until: float) -> HTTPConnection:
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES or not parts.hostname or parts.username or any(c <= " " for c in address):
        raise ValueError("it is no plain address of the web (http or https)")
    port = SCHEMES[parts.scheme]
    if parts.port not in (None, port):
        raise ValueError(f"port {parts.port} is not the usual one")
    kind = _Http if parts.scheme == "http" else _Https
    return kind(parts.hostname, port, timeout=max(until - time.monotonic(), 0.1))


class _Http(HTTPConnection):
    def connect(self) -> None:
        self.sock = _connected(self.host, self.port, self.timeout)


class _Https(HTTPSConnection):
    def connect(self) -> None:
        plain = _connected(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


def _connected(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to a number that was checked: the name is not looked up again."""
    numbers = [found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not numbers or not all(map(is_public, numbers)):
        raise ValueError(f"{host} is not on the public internet")
    return socket.create_connection((numbers[0], port), seconds)


def guard(remote: bool) -> None:
    """Let Gradio fetch no address by itself, as its components do for whoever calls them without the page.

    remote: `fetch` it instead. It holds for the process: Gradio makes components anew for each session, so what is set
    on those of a page would be lost.
    """

    async def get(url: str) -> httpx.Response:
        if not remote:
            raise gr.Error(OFF)
        try:
            with TemporaryDirectory() as folder:
                content = (await asyncio.to_thread(fetch, url, folder)).read_bytes()
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return httpx.Response(200, content=content, request=httpx.Request("GET", url))

    processing_utils.async_ssrf_protected_get = get

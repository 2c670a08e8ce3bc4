"""Download from an https URL that a stranger may have written, without becoming the stranger's door into this network.

A URL is fetched only from public addresses: the host is resolved once, every address of the answer is checked, and the
connection goes to exactly such an address, so that a DNS answer that changes later changes nothing. Each redirect is a
new URL and passes the same checks. One deadline covers everything. Certificates are always verified.
Answers CVE-2025-6242 (vLLM) and GHSA-7rf4-7gg3-8vqx (lmdeploy: redirects unchecked, and a window for DNS rebinding).
Proxies of the environment are NOT used: a proxy resolves the name itself, and the check of the address would be void.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin, urlsplit

from .errors import ConfigError, MediaError

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_URL_CHARS = 8192
_READ_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 20
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")  # urlsplit drops tabs and line breaks, and browsers read a backslash as /
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\Z")
# With a last label like this, browsers and inet_aton read the host as an IPv4 address.
_NUMBER_LABEL = re.compile(r"([0-9]+|0x[0-9a-f]*)\Z")
_SAFE_IN_TARGET = "/%:=&?~+!$,;'@()*[]"

# Never public, whatever this Python's ipaddress says (its list grew in 3.11.10 and 3.12.4).
# Sources: IANA IPv4 and IPv6 special-purpose registries; 168.63.129.16 is Azure's host agent, reached only from inside.
_CLOSED_IPV4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
)
_OPEN_IPV6 = ipaddress.IPv6Network("2000::/3")  # outside it: loopback, link-local, ULA, multicast, mapped, NAT64
# Teredo and its relatives, documentation, 6to4. Each could carry a private IPv4 address to a gateway.
_CLOSED_IPV6 = tuple(ipaddress.IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))


def is_public(address: str) -> bool:
    """Whether a numeric IP address is ordinary public unicast; tunnels, translations and mapped forms are not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not ip.is_global:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in block for block in _CLOSED_IPV4)
    return ip.scope_id is None and ip in _OPEN_IPV6 and not any(ip in block for block in _CLOSED_IPV6)


def resolve(host: str, port: int) -> list[str]:
    """Give the numeric addresses of a host name, in the system's order of preference."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def shown_url(url: str) -> str:
    """Shorten a URL for a message: no user, query or fragment (they may be secrets), at most 120 characters."""
    url = _FORBIDDEN.sub("?", re.split(r"[?#]", url, maxsplit=1)[0])
    url = re.sub(r"//[^/]*@", "//...@", url, count=1)
    return url if len(url) <= 120 else f"{url[:60]}... ({len(url)} characters)"


@functools.cache
def _system_context() -> ssl.SSLContext:
    return ssl.create_default_context()


@dataclass(frozen=True)
class Fetcher:
    """Fetch https URLs from allowed addresses.

    `resolver`, `is_allowed` and `context` let an installation use its own names, network and certificate authority; by
    default they are the system's resolver, `is_public` and the system's certificates.
    """

    max_bytes: int = 20_000_000
    """The most that is read of a body, bytes."""
    timeout_s: float = 10.0
    """Seconds for one URL in all, redirects included."""
    max_redirects: int = 5
    """Redirects followed; one more is an error."""
    resolver: Callable[[str, int], Sequence[str]] = resolve
    """(host name, port) -> numeric addresses. Called once per URL."""
    is_allowed: Callable[[str], bool] = is_public
    """Whether a numeric address may be connected to."""
    context: ssl.SSLContext = field(default_factory=_system_context)
    """TLS settings; must verify certificates and host names."""

    def __post_init__(self) -> None:
        if self.context.verify_mode != ssl.CERT_REQUIRED or not self.context.check_hostname:
            raise ConfigError(
                "Fetcher: the TLS context does not verify certificates and host names; it has to do both."
            )

    def fetch(self, url: str) -> bytes:
        """Download `url`.

        Raises:
            MediaError: the URL or one it redirects to is refused, or the download failed, was too large or too slow.
        """
        deadline = _Deadline(self.timeout_s)
        next_url = url
        for _ in range(self.max_redirects + 1):
            try:
                outcome = self._hop(next_url, deadline)
            except MediaError as error:
                if next_url is url:
                    raise
                raise MediaError(f"{shown_url(url)!r} redirects, and then: {error}") from error
            if isinstance(outcome, bytes):
                return outcome
            next_url = outcome.url
        raise MediaError(
            f"{shown_url(url)!r} redirects more than {self.max_redirects} times; give the address where it ends."
        )

    def _hop(self, url: str, deadline: _Deadline) -> bytes | _Redirect:
        """Ask one URL; every failure becomes a MediaError."""
        target = _Target.parse(url)
        try:
            return self._get(target, deadline)
        except MediaError:
            raise
        except TimeoutError as error:
            raise MediaError(
                f"{target.shown!r} took over {self.timeout_s:g} s in all and was given up; "
                "download it yourself and give its path or bytes."
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise MediaError(
                f"The certificate of {target.host!r} does not hold ({error.verify_message}); not fetched."
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: http.client on malformed chunks
            reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise MediaError(f"{target.shown!r} could not be fetched: {reason}.") from error

    def _get(self, target: _Target, deadline: _Deadline) -> bytes | _Redirect:
        """Give the body, or where it redirects to."""
        addresses = self._addresses(target, deadline)
        with _connect(addresses, target.port, deadline) as plain:
            plain.settimeout(deadline.remaining())
            with self.context.wrap_socket(plain, server_hostname=target.host) as connection:
                connection.settimeout(deadline.remaining())
                connection.sendall(target.request())
                # Twice the limit leaves room for headers and chunk lines; http.client itself reads a malformed chunk
                # of length -1 to the end.
                source = _BoundedSocket(connection, deadline, 2 * self.max_bytes + _MAX_HEADER_BYTES)
                with http.client.HTTPResponse(source, method="GET") as response:  # type: ignore[arg-type]
                    response.begin()
                    if response.status in _REDIRECTS:
                        return _redirect(target, response.getheader("Location"))
                    if response.status != 200:
                        raise MediaError(f"{target.shown!r} answered with status {response.status}, not with a file.")
                    return self._body(target, response)

    def _addresses(self, target: _Target, deadline: _Deadline) -> list[str]:
        """Resolve the host once and check every address: one that is not allowed condemns the name."""
        addresses = [target.host] if target.is_address else _resolve_in_time(self.resolver, target, deadline)
        if not addresses:
            raise MediaError(f"{target.host!r} has no address; is the name spelled right?")
        # The address is not named: to a stranger it would tell how this network looks inside.
        if not all(self.is_allowed(address) for address in addresses):
            raise MediaError(
                f"{target.host!r} is not on the public internet (its address is private, local or reserved); "
                "not fetched. Download the file yourself and give its path or bytes."
            )
        return addresses

    def _body(self, target: _Target, response: http.client.HTTPResponse) -> bytes:
        """Read the body up to the limit; its announced length is not trusted, only held against what comes."""
        if (encoding := response.getheader("Content-Encoding", "identity").strip().lower()) != "identity":
            raise MediaError(
                f"{target.shown!r} came compressed ({encoding[:20]!r}) though that was not asked; not unpacked."
            )
        too_large = f"{target.shown!r} has over {self.max_bytes / 1e6:g} MB, the limit; give a smaller file."
        if response.length is not None and response.length > self.max_bytes:
            raise MediaError(too_large)
        pieces, size = [], 0
        while piece := response.read(_READ_BYTES):
            size += len(piece)
            if size > self.max_bytes:
                raise MediaError(too_large)
            pieces.append(piece)
        if response.length:  # what http.client still waits for
            raise MediaError(
                f"{target.shown!r} was cut off after {size} bytes; {response.length} are missing. Try again."
            )
        return b"".join(pieces)


@dataclass(frozen=True)
class _Redirect:
    url: str


@dataclass(frozen=True)
class _Target:
    """One URL after every check that needs no network."""

    host: str
    port: int
    path: str
    shown: str
    is_address: bool

    @classmethod
    def parse(cls, url: str) -> _Target:
        shown = shown_url(url)
        if len(url) > _MAX_URL_CHARS or _FORBIDDEN.search(url):
            raise MediaError(
                f"The URL {shown!r} is too long, or has spaces, control characters or backslashes; not fetched."
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise MediaError(f"The URL {shown!r} is not valid; not fetched.") from error
        if parts.scheme != "https":
            raise MediaError(f"The URL {shown!r} is not https; only https is fetched.")
        if "@" in parts.netloc:
            raise MediaError(f"The URL {shown!r} has a user or password before the host; not fetched.")
        if not parts.hostname or port == 0:
            raise MediaError(f"The URL {shown!r} names no host and port to ask; not fetched.")
        host, is_address = _host(parts.hostname, shown, bracketed=parts.netloc.startswith("["))
        path = quote(parts.path or "/", safe=_SAFE_IN_TARGET)
        query = f"?{quote(parts.query, safe=_SAFE_IN_TARGET)}" if parts.query else ""
        return cls(host, 443 if port is None else port, path + query, shown, is_address)

    def request(self) -> bytes:
        from lavish import __version__

        name = f"[{self.host}]" if ":" in self.host else self.host
        lines = (
            f"GET {self.path} HTTP/1.1",
            f"Host: {name}" if self.port == 443 else f"Host: {name}:{self.port}",
            f"User-Agent: lavish/{__version__}",
            "Accept: image/*, */*;q=0.1",
            "Accept-Encoding: identity",
            "Connection: close",
        )
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii")


def _host(name: str, shown: str, *, bracketed: bool) -> tuple[str, bool]:
    """Give the host in ASCII and whether it is a numeric address; only the canonical spelling of an address passes."""
    refused = MediaError(
        f"The host of {shown!r} is no valid name or is an unusual spelling of an address; not fetched."
    )
    if bracketed:
        if "%" in name:  # a zone, which only link-local addresses have
            raise refused
        try:
            return str(ipaddress.IPv6Address(name)), True
        except ValueError as error:
            raise refused from error
    try:
        host = name.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError as error:
        raise refused from error
    if not _HOST.match(host):
        raise refused
    if _NUMBER_LABEL.match(host.rsplit(".", 1)[-1]):
        try:
            return str(ipaddress.IPv4Address(host)), True  # refuses 127.1, 0177.0.0.1, 0x7f.0.0.1 and 2130706433
        except ValueError as error:
            raise refused from error
    return host, False


def _redirect(target: _Target, location: str | None) -> _Redirect:
    if not location:
        raise MediaError(f"{target.shown!r} redirects without saying where to.")
    if _FORBIDDEN.search(location):
        raise MediaError(
            f"{target.shown!r} redirects to a URL with spaces, control characters or backslashes; not followed."
        )
    host = f"[{target.host}]" if ":" in target.host else target.host
    try:
        # Header bytes arrive as latin-1; most servers mean UTF-8.
        location = quote(location.encode("latin-1"), safe=_SAFE_IN_TARGET + "#")
        return _Redirect(urljoin(f"https://{host}:{target.port}{target.path}", location))
    except ValueError as error:
        raise MediaError(f"{target.shown!r} redirects to something that is no URL; not followed.") from error


def _resolve_in_time(resolver: Callable[[str, int], Sequence[str]], target: _Target, deadline: _Deadline) -> list[str]:
    """Run the resolver in a thread that may be left behind: the system's knows no timeout."""
    answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(resolver(target.host, target.port)))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, name="lavish-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.remaining())
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, list):
        return answer
    raise MediaError(f"{target.host!r} cannot be found; is the name spelled right, and is there a network?") from answer


class _Deadline:
    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s

    def remaining(self) -> float:
        """Seconds left, above 0.

        Raises:
            TimeoutError: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _connect(addresses: list[str], port: int, deadline: _Deadline) -> socket.socket:
    """Connect to the first of the checked addresses that answers."""
    failure: OSError = TimeoutError()
    for tried, address in enumerate(addresses):
        # A share of the time that is left, so that a dead first address leaves some for the next.
        timeout_s = deadline.remaining() / (len(addresses) - tried)
        plain = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            plain.settimeout(timeout_s)
            plain.connect((address, port))
            return plain
        except OSError as error:
            plain.close()
            failure = error
    raise failure


class _BoundedSocket(io.RawIOBase):
    """The reading half of a socket under one deadline and one number of bytes.

    A socket's own timeout starts anew with every byte that drips in.
    """

    def __init__(self, connection: socket.socket, deadline: _Deadline, max_bytes: int) -> None:
        self._connection, self._deadline, self._left = connection, deadline, max_bytes

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give the buffered file that http.client reads from."""
        return io.BufferedReader(self, _READ_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._connection.settimeout(self._deadline.remaining())
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise MediaError("The server sends far more than the limit for one file; not read further.")
        return count

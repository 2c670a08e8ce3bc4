"""Attacks on the fetcher, each against a real TLS server on this machine; no test needs the internet.

`fixtures/common/tls`: a made-up authority and a certificate (with its key) for media.test and second.test, for these
tests only.
"""

import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lavish.common.errors import ConfigError, MediaError
from lavish.common.fetch import Fetcher, is_public, resolve, shown_url
from lavish.common.media import open_image

TLS = Path(__file__).parents[1] / "fixtures" / "common" / "tls"
BODY = bytes(range(256)) * 40
LOOPBACK = "127.0.0.1"


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `/to?URL` redirects to URL."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append(self)
        self.close_connection = True
        name, _, argument = self.path.lstrip("/").partition("?")
        try:
            getattr(self, f"send_{name or 'file'}")(argument)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            return  # the client gave up, which is what many tests want

    def log_message(self, *args):
        return

    def reply(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, argument):
        self.reply(200, BODY, Content_Length=len(BODY))

    def send_unsized(self, argument):
        self.reply(200, BODY)

    def send_chunked(self, argument):
        pieces = [BODY[start : start + 1000] for start in range(0, len(BODY), 1000)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
        self.reply(200, body, Transfer_Encoding="chunked")

    def send_negative_chunk(self, argument):
        self.reply(200, b"-1\r\n", Transfer_Encoding="chunked")
        self.send_forever()

    def send_oversize(self, argument):
        self.reply(200, BODY, Content_Length=10**12)

    def send_endless(self, argument):
        self.reply(200)
        self.send_forever()

    def send_lying(self, argument):
        self.reply(200, BODY, Content_Length=2 * len(BODY))

    def send_gzip(self, argument):
        self.reply(200, b"\x1f\x8b bomb", Content_Encoding="gzip", Content_Length=7)

    def send_drip(self, argument):
        self.reply(200, Content_Length=len(BODY))
        for byte in BODY:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def send_drip_headers(self, argument):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(2000):
            self.wfile.write(b"X")
            time.sleep(0.02)

    def send_to(self, argument):
        self.reply(302, Location=argument)

    def send_loop(self, argument):
        self.reply(307, Location="/loop")

    def send_count(self, argument):
        self.reply(303, Location=f"/count?{int(argument) - 1}" if int(argument) else "/file")

    def send_nowhere(self, argument):
        self.reply(302)

    def send_missing(self, argument):
        self.reply(404, b"secret text", Content_Length=11)

    def send_forever(self):
        while True:
            self.wfile.write(b"\0" * 65536)


@pytest.fixture(scope="module")
def server():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem")
    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        server.seen = []
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def base(server):
    server.seen.clear()
    return f"https://media.test:{server.server_port}"


class Names:
    """A resolver that gives the answers of a list in turn, then the last one again, and remembers the questions."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, host, port):
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def fetcher(resolver=None, **settings):
    """Trust the test authority, find every name on this machine, connect to 127.0.0.1 alone."""
    settings = {"max_bytes": 20_000, "timeout_s": 5.0, "is_allowed": lambda address: address == LOOPBACK} | settings
    context = ssl.create_default_context(cafile=str(TLS / "authority.pem"))
    return Fetcher(resolver=resolver or Names([LOOPBACK]), context=context, **settings)


@pytest.mark.parametrize("name", ["file", "unsized", "chunked", ""])
def test_a_file_arrives_whole(base, name):
    assert fetcher().fetch(f"{base}/{name}") == BODY


def test_the_request_is_plain(base, server):
    fetcher().fetch(f"{base}/file?a=1&名=%20ü#part")
    (request,) = server.seen
    assert request.path == "/file?a=1&%E5%90%8D=%20%C3%BC"
    assert request.headers["Host"] == base.removeprefix("https://")
    assert request.headers["Accept-Encoding"] == "identity"


def test_an_image_is_fetched_only_when_allowed(base, server, tmp_path):
    with pytest.raises(
        MediaError, match=r"URLs are not fetched here; open it first with .*open_image\(url, allow_urls=True\)"
    ):
        open_image(f"{base}/file", fetcher=fetcher())
    assert server.seen == []
    with pytest.raises(MediaError, match="of no image format that lavish knows"):
        open_image(f"{base}/file", allow_urls=True, fetcher=fetcher())
    assert len(server.seen) == 1


# --- which addresses are public ---


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",  # metadata of the clouds
        "168.63.129.16",  # Azure's host agent
        "100.64.0.1",
        "100.100.100.200",  # Alibaba's metadata, in the carrier-grade block
        "192.0.0.192",
        "192.88.99.1",
        "198.18.0.1",
        "203.0.113.9",
        "224.0.0.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::127.0.0.1",
        "64:ff9b::7f00:1",  # NAT64
        "64:ff9b:1::a00:1",
        "2002:7f00:1::",  # 6to4
        "2002:a00:1::1",
        "2001:0:53aa:64c:0:0:80ff:fffe",  # Teredo
        "2001:db8::1",
        "3fff::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "5f00::1",
        "localhost",
        "",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "192.168.0.7", "[::1]", "[::ffff:127.0.0.1]", "[fd00::1]"]
)
def test_a_private_address_is_not_connected_to(address, server):
    server.seen.clear()
    with pytest.raises(MediaError, match=r"not on the public internet"):
        Fetcher().fetch(f"https://{address}:{server.server_port}/file")
    assert server.seen == []


def test_localhost_by_name_is_not_connected_to(server):
    server.seen.clear()
    assert set(resolve("localhost", 443)) <= {"127.0.0.1", "::1"}
    with pytest.raises(MediaError, match=r"'localhost' is not on the public internet"):
        Fetcher().fetch(f"https://localhost:{server.server_port}/file")
    assert server.seen == []


def test_a_public_name_with_a_private_address_is_refused_and_the_address_not_told():
    with pytest.raises(MediaError, match=r"'media.test' is not on the public internet") as caught:
        Fetcher(resolver=Names(["10.0.0.1"])).fetch("https://media.test/cat.png")
    assert "10.0.0.1" not in str(caught.value)


def test_one_private_address_among_public_ones_condemns_the_name(base, server):
    with pytest.raises(MediaError, match=r"not on the public internet"):
        fetcher(Names([LOOPBACK, "10.0.0.1"])).fetch(base)
    assert server.seen == []


def test_the_next_address_is_tried_when_the_first_is_dead(base):
    names = Names(["127.0.0.254", LOOPBACK])  # nothing listens on the first
    assert fetcher(names, is_allowed=lambda address: address.startswith("127.")).fetch(base) == BODY


# --- spellings ---


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "017700000001",
        "127.1",
        "127.0.1",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "127.0.0.0x1",
        "127.0.0.01",
        "1.2.3.4.5",
        "256.1.1.1",
        "media.test.0x",
        "[fe80::1%25eth0]",
        "[v1.x]",
        "[127.0.0.1]",
        "a..b",
        "-a.test",
        "media.test%2f",
        "media_test!",
        "x" * 64 + ".test",
    ],
)
def test_odd_spellings_of_a_host_are_refused_before_resolving(host):
    names = Names([LOOPBACK])
    with pytest.raises(MediaError, match=r"no valid name or is an unusual spelling|is not valid"):
        fetcher(names).fetch(f"https://{host}/cat.png")
    assert names.asked == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1.", "１２７.0.0.1", "127。0。0。1", "①27.0.0.1"])
def test_a_numeric_host_is_checked_in_every_script(host):
    with pytest.raises(MediaError, match=r"not on the public internet|is not valid|unusual spelling"):
        Fetcher().fetch(f"https://{host}/")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://media.test/cat.png", "is not https"),
        ("file:///etc/passwd", "is not https"),
        ("ftp://media.test/cat.png", "is not https"),
        ("gopher://media.test/", "is not https"),
        ("media.test/cat.png", "is not https"),
        ("https://8.8.8.8@127.0.0.1/", "user or password"),
        ("https://user:pass@media.test/", "user or password"),
        ("https://127.0.0.1\\@media.test/", "backslashes"),
        ("https://media.test/a b", "spaces"),
        ("https://media.test/\r\nHost: x", "control characters"),
        ("https://media\t.test/", "control characters"),
        ("https://media.test:99999/", "is not valid"),
        ("https://media.test:x/", "is not valid"),
        ("https://media.test:0/", "no host and port"),
        ("https:///cat.png", "no host and port"),
        ("https://", "no host and port"),
        ("https://media.test/" + "a" * 9000, "too long"),
    ],
)
def test_urls_that_are_refused_unasked(url, message):
    names = Names([LOOPBACK])
    with pytest.raises(MediaError, match=message):
        fetcher(names).fetch(url)
    assert names.asked == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd"])
def test_a_file_url_is_never_an_image(url):
    with pytest.raises(MediaError, match="file:// URL is never opened"):
        open_image(url, allow_urls=True)


# --- redirects ---


@pytest.mark.parametrize("target", ["/file", "//media.test:{port}/file", "https://second.test:{port}/file"])
def test_a_redirect_is_followed(base, server, target):
    assert fetcher().fetch(f"{base}/to?{target.format(port=server.server_port)}") == BODY


@pytest.mark.parametrize("target", ["https://127.0.0.1/x", "https://10.0.0.1/", "https://[::ffff:127.0.0.1]/"])
def test_a_redirect_to_a_private_address_is_refused(base, server, target):
    allow_media_test_alone = Names([LOOPBACK])
    strict = fetcher(allow_media_test_alone, is_allowed=lambda address: address == LOOPBACK and len(server.seen) == 0)
    with pytest.raises(MediaError, match=r"redirects, and then: .*not on the public internet"):
        strict.fetch(f"{base}/to?{target}")
    assert len(server.seen) == 1


def test_a_redirect_to_a_name_with_a_private_address_is_refused(base, server):
    names = Names([LOOPBACK], ["10.0.0.1"])
    with pytest.raises(MediaError, match=r"redirects, and then: 'second.test' is not on the public internet"):
        fetcher(names).fetch(f"{base}/to?https://second.test:{server.server_port}/file")
    assert names.asked == ["media.test", "second.test"]


@pytest.mark.parametrize("target", ["http://media.test/file", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_a_redirect_away_from_https_is_refused(base, target):
    with pytest.raises(MediaError, match=r"redirects, and then: .* is not https"):
        fetcher().fetch(f"{base}/to?{target}")


def test_a_redirect_loop_ends(base, server):
    with pytest.raises(MediaError, match="redirects more than 5 times"):
        fetcher().fetch(f"{base}/loop")
    assert len(server.seen) == 6


def test_five_redirects_are_followed(base):
    assert fetcher().fetch(f"{base}/count?4") == BODY


def test_a_redirect_without_target_is_an_error(base):
    with pytest.raises(MediaError, match="without saying where"):
        fetcher().fetch(f"{base}/nowhere")


# --- the connection ---


def test_a_dns_answer_that_changes_after_the_check_changes_nothing(base, server):
    names = Names([LOOPBACK], ["10.0.0.1"])
    assert fetcher(names).fetch(base) == BODY
    assert names.asked == ["media.test"]  # asked once: what was checked is what is connected to


def test_a_dns_answer_that_changes_between_redirects_is_checked_again(base):
    names = Names([LOOPBACK], ["10.0.0.1"])
    with pytest.raises(MediaError, match=r"not on the public internet"):
        fetcher(names).fetch(f"{base}/to?/file")


def test_a_certificate_for_another_name_is_refused(server):
    with pytest.raises(MediaError, match=r"certificate of 'third.test' does not hold"):
        fetcher().fetch(f"https://third.test:{server.server_port}/file")


def test_an_unknown_authority_is_refused(base, server):
    untrusting = Fetcher(resolver=Names([LOOPBACK]), is_allowed=lambda address: True)
    with pytest.raises(MediaError, match=r"certificate of 'media.test' does not hold"):
        untrusting.fetch(base)
    assert server.seen == []


def test_a_context_that_does_not_verify_is_refused():
    context = ssl.create_default_context()
    context.check_hostname = False
    with pytest.raises(ConfigError, match="does not verify"):
        Fetcher(context=context)


def test_proxies_of_the_environment_are_not_used(base, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetcher().fetch(base) == BODY


def test_a_server_that_speaks_no_tls_or_is_not_there():
    with socket.create_server((LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(MediaError, match="could not be fetched"):
        fetcher().fetch(f"https://media.test:{port}/")


# --- time and size ---


@pytest.mark.parametrize("name", ["drip", "drip_headers"])
def test_a_slow_drip_is_cut_at_the_deadline(base, name):
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"took over 0.4 s in all"):
        fetcher(timeout_s=0.4).fetch(f"{base}/{name}")
    assert time.monotonic() - start < 2


def test_a_server_that_never_shakes_hands_is_cut_at_the_deadline():
    with socket.create_server((LOOPBACK, 0)) as silent, pytest.raises(MediaError, match=r"took over 0.3 s"):
        fetcher(timeout_s=0.3).fetch(f"https://media.test:{silent.getsockname()[1]}/")


def test_a_resolver_that_hangs_is_cut_at_the_deadline():
    release = threading.Event()

    def hang(host, port):
        release.wait(10)
        return [LOOPBACK]

    with pytest.raises(MediaError, match=r"took over 0.2 s"):
        fetcher(hang, timeout_s=0.2).fetch("https://media.test/")
    release.set()


def test_a_name_that_does_not_exist():
    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(MediaError, match=r"'media.test' cannot be found"):
        fetcher(unknown).fetch("https://media.test/")
    with pytest.raises(MediaError, match="has no address"):
        fetcher(Names([])).fetch("https://media.test/")


@pytest.mark.parametrize("name", ["oversize", "endless", "negative_chunk"])
def test_too_large_a_body_is_not_read_to_the_end(base, name):
    with pytest.raises(MediaError, match=r"limit"):
        fetcher().fetch(f"{base}/{name}")


def test_a_body_of_exactly_the_limit_is_read(base):
    assert fetcher(max_bytes=len(BODY)).fetch(f"{base}/unsized") == BODY
    with pytest.raises(MediaError, match="limit"):
        fetcher(max_bytes=len(BODY) - 1).fetch(f"{base}/unsized")


def test_a_body_shorter_than_announced_is_an_error(base):
    with pytest.raises(MediaError, match=f"cut off after {len(BODY)} bytes; {len(BODY)} are missing"):
        fetcher(max_bytes=50_000).fetch(f"{base}/lying")


def test_a_compressed_body_is_not_unpacked(base):
    with pytest.raises(MediaError, match="came compressed"):
        fetcher().fetch(f"{base}/gzip")


def test_an_error_page_is_not_shown(base):
    with pytest.raises(MediaError, match="answered with status 404") as caught:
        fetcher().fetch(f"{base}/missing?token=abc")
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_url_is_shown_without_secrets():
    assert shown_url("https://u:p@media.test/a.png?token=1#x") == "https://...@media.test/a.png"
    assert shown_url("https://media.test/" + "a" * 500).endswith("... (519 characters)")
    assert "\n" not in shown_url("https://media.test/a\nb")

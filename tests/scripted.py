"""An HTTP service that says what a test wants it to say, over a real socket, and keeps what it was asked."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import stack


@dataclass(frozen=True, slots=True)
class Request:
    """What came in; `path` has the query, header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes out. `cut`: so many bytes of the body, then the connection is closed; `drop`: nothing at all."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    drop: bool = False


@dataclass(slots=True)
class Service:
    """A running service: base URL and requests so far."""

    url: str
    requests: list[Request]


@contextlib.contextmanager
def serving(answer: Callable[[Request], Answer]) -> Iterator[Service]:
    """Serve on a free port of 127.0.0.1 while the block lasts."""
    requests: list[Request] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self.rfile.read(length))
            requests.append(request)
            wanted = answer(request)
            if wanted.drop or wanted.cut is not None:
                self.close_connection = True
            if wanted.drop:
                return
            lines = [f"HTTP/1.1 {wanted.status} Scripted", f"Content-Length: {len(wanted.body)}"]
            lines += [f"{name}: {value}" for name, value in wanted.headers.items()]
            # In one piece: header and body apart would wait 40 ms for each other.
            head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
            self.wfile.write(head + wanted.body[: wanted.cut])

        do_GET = do_POST = do_PUT = do_DELETE = _respond  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield Service(f"http://127.0.0.1:{server.server_address[1]}", requests)
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def unused_url() -> Iterator[str]:
    """An address of loopback that refuses connections while the block lasts."""
    with stack.free_port() as port:
        yield f"http://127.0.0.1:{port}"

"""A local http server for byte ranges that fails on demand."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Log:
    """The requested ranges, and the number of bytes sent."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.bytes_sent = 0
        self.lock = threading.Lock()


@contextmanager
def serve(folder: Path, faults: tuple[str, ...] = ()) -> Iterator[tuple[str, Log]]:
    """Serve `folder` and give its address and log. Requests take `faults` in turn; "" is a correct response."""
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            with log.lock:
                fault = faults[len(log.ranges) % len(faults)] if faults else ""
                first, last = self.headers.get("Range", "bytes=0-0").removeprefix("bytes=").split("-")
                log.ranges.append((path.name, int(first), int(last) + 1))
            if fault.isdigit() or not path.is_file():
                self.send_error(int(fault or 404))
                return
            with path.open("rb") as file:
                file.seek(int(first))
                data = file.read(int(last) + 1 - int(first))
            self.send_response(200 if fault == "no ranges" else 206)
            if fault != "no ranges":
                size = 10**15 if fault == "huge" else path.stat().st_size
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            data += bytes(10_000) * (fault == "longer")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault in ("drop", "stall", "truncate"):
                data = data[: len(data) // 2]
            self.wfile.write(data)
            with log.lock:
                log.bytes_sent += len(data)
            if fault == "stall":
                time.sleep(2.5)  # longer than the timeout of the tests
            if fault == "drop":
                self.connection.shutdown(2)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

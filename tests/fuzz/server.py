"""A web server that serves byte ranges of a folder in hostile ways: python -m tests.fuzz.server FOLDER prints its address.

The first part of an address names the fault, the second part the seed of what is random.
"""

import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.fuzz import mutate

_ENDLESS_SECONDS = 60.0


class _Handler(BaseHTTPRequestHandler):
    root = Path()

    def do_GET(self) -> None:
        _, fault, seed, *rest = [*unquote(self.path).split("/"), "", ""]
        rng, name = random.Random(f"{seed}/{'/'.join(rest)}"), "/".join(filter(None, rest))
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root) or not path.is_file():
            return self.send_error(404)
        whole = path.read_bytes()
        if fault == "damaged":
            whole = mutate.data(rng, whole)
        if fault == "json":
            whole = rng.choice((b"[]", b"null", b"[" * 10**5, b"9" * 5000, b'{"version": 1}', b"\xff"))
        if fault == "status":
            return self.send_error(rng.choice((301, 401, 403, 404, 416, 500, 503)))
        if fault in ("file", "round"):
            self.send_response(302)
            self.send_header("Location", self.path if fault == "round" else f"file://{path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        first, last = self._range(len(whole))
        part = b"" if fault == "empty" else whole[first : last + 1]
        total = {"total": 10**15, "tiny": 1, "negative": -5}.get(fault, len(whole))
        shift = 7 if fault == "other" else 0
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{total}")
        self.send_header("Content-Length", str(10**15 if fault == "endless" else len(part)))
        self.end_headers()
        self.wfile.write(part)
        began = time.monotonic()
        while fault == "endless" and time.monotonic() - began < _ENDLESS_SECONDS:
            self.wfile.write(bytes(2**16))
            time.sleep(0.001)

    def _range(self, size: int) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first or 0), min(int(last or size - 1), size - 1)

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None: ...


if __name__ == "__main__":
    _Handler.root = Path(sys.argv[1]).resolve()
    server = _Server(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()

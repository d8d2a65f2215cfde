"""Google Cloud Storage in memory: as much of its JSON API as gcsfs, tensorstore and google-cloud-storage use here."""

import itertools
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock
from urllib.parse import parse_qsl, quote, unquote, urlsplit

PATH = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?$")


class FakeGCS(BaseHTTPRequestHandler):
    """Of one bucket, `mine`; `objects` maps names to (generation, bytes)."""

    # buffered: head and body in one packet, or each answer takes 40 ms
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    objects = {}  # noqa: RUF012 (a server of one process has one bucket)
    generations = itertools.count(1)
    lock = RLock()

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        if isinstance(body, bytes):
            body = body
        else:
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        bucket, name = PATH.match(url.path).groups()
        name = unquote(name or query.get("name", ""))
        with self.lock:
            if name in self.objects:
                generation = self.objects[name][0]
            else:
                generation = 0
            if bucket != "mine":
                self.answer(
                    {"error": {"code": 404, "message": "The specified bucket does not exist."}}, 404
                )
            elif query.get("ifGenerationMatch", str(generation)) != str(generation):
                self.answer(b"", 412)
            elif query.get("ifGenerationNotMatch") == str(generation):
                self.answer(b"", 304)
            elif url.path.endswith("/o") and self.command == "GET":
                self.list(
                    *(
                        query.get(key, "")
                        for key in ("prefix", "delimiter", "startOffset", "endOffset")
                    )
                )
            else:
                getattr(self, self.command.lower())(name, query, data)

    do_GET = do_POST = do_DELETE = handle_request

    def describe(self, name):
        generation, data = self.objects[name]
        time = "2026-01-01T00:00:00Z"
        return {
            "name": name,
            "generation": str(generation),
            "size": len(data),
            "timeCreated": time,
            "updated": time,
        }

    def list(self, prefix, delimiter, start, stop):
        names = []
        for n in sorted(self.objects):
            if n.startswith(prefix) and n >= start and (not stop or n < stop):
                names.append(n)

        def cut(name):
            if delimiter:
                return name.find(delimiter, len(prefix)) + 1
            return 0

        folders = sorted({n[: cut(n)] for n in names if cut(n)})
        self.answer({"items": [self.describe(n) for n in names if not cut(n)], "prefixes": folders})

    def get(self, name, query, data):
        if not name:
            self.answer({"name": "mine"})
        elif name not in self.objects:
            self.answer(b"", 404)
        elif query.get("alt") != "media":
            self.answer(self.describe(name))
        else:
            generation, data = self.objects[name]
            first, last = re.match(r"(?:bytes=(\d+)-(\d*))?", self.headers["Range"] or "").groups()
            part = data[int(first or 0) : int(last) + 1 if last else None]
            if first:
                there = {"Content_Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
            else:
                there = {}
            self.answer(part, 206 if first else 200, X_Goog_Generation=generation, **there)

    def post(self, name, query, data):
        if query["uploadType"] == "resumable":  # what follows comes whole
            path = f"upload/storage/v1/b/mine/o?uploadType=media&name={quote(name)}"
            self.answer({}, Location=f"http://{self.headers['Host']}/{path}")
        else:
            self.objects[name] = (next(self.generations), data)
            self.answer(self.describe(name))

    def delete(self, name, query, data):
        self.answer(b"", 204 if self.objects.pop(name, None) else 404)


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # of a program that has ended
            super().handle_error(request, client_address)

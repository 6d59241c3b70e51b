"""A bucket of Google Cloud Storage on this machine, for `gs://` paths.

An emulator from the package index, with what TensorStore needs of the real one and it lacks:
requests at the same time, and the generations of objects.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from urllib.request import Request, urlopen

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

MAIN = """
import logging
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it tells of each move by copying
# gcsfs asks Google, with credentials and minutes of retries, which type each bucket is of.
from gcsfs.extended_gcsfs import BucketType, ExtendedGcsFileSystem
async def bucket_type(self, bucket): return BucketType.NON_HIERARCHICAL
ExtendedGcsFileSystem._get_bucket_type = bucket_type
from etils.epath import gpath
gpath._is_tf_installed = lambda: False  # TensorFlow's reader knows the real GCS only
from dss.cli.main import main; raise SystemExit(main())
"""
_one_at_a_time = threading.RLock()


class _Handler(server.RequestHandler):
    """Answers one request after another, conditions on generations included."""

    def handle_one_request(self) -> None:
        """Reads, checks and answers a request."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        with _one_at_a_time, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.generation, media = self._generation()
            query = parse_qs(urlsplit(self.path).query)
            if query.get("ifGenerationMatch", [self.generation])[0] != self.generation:
                self.send_error(HTTPStatus.PRECONDITION_FAILED)
            elif "/moveTo/" in self.path:  # the emulator cannot; another error would be tried again
                self.send_error(HTTPStatus.FORBIDDEN)
            elif media and query.get("ifGenerationNotMatch", ["none"])[0] == self.generation:
                self.send_response(HTTPStatus.NOT_MODIFIED)
                super().end_headers()
            else:
                getattr(self, f"do_{self.command}")()
            self.wfile.flush()

    def _generation(self) -> tuple[str, bool]:
        """Returns the generation of the object that is asked about, and whether it is read."""
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        query = parse_qs(url.query)
        name = query.get("name", [unquote(name.removeprefix("/"))])[0]
        try:
            found = self.storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            found = "0"
        return found, "alt" in query

    def end_headers(self) -> None:
        """Ends the headers of an answer."""
        self.send_header("x-goog-generation", self.generation)
        super().end_headers()


def upload(url: str, name: str, content: bytes) -> None:
    """Puts an object into the bucket."""
    query = f"uploadType=media&name={quote(name)}"
    urlopen(Request(f"{url}/upload/storage/v1/b/bucket/o?{query}", content, method="POST"))


def download(url: str, name: str) -> bytes:
    """Returns an object of the bucket."""
    with urlopen(f"{url}/storage/v1/b/bucket/o/{quote(name, safe='')}?alt=media") as answer:
        return answer.read()


@contextlib.contextmanager
def local_bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """Serves an empty `gs://bucket`; yields its address and the variables that processes need."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    emulator = server.create_server("localhost", 0, in_memory=True, default_bucket="bucket")

    def handler(*args):
        return _Handler(emulator._storage, *args)

    with ThreadingHTTPServer(("localhost", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://localhost:{http.server_address[1]}"
        yield (
            url,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "NO_GCE_CHECK": "true",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            },
        )
        http.shutdown()

"""An S3 server on loopback, moto's, with signatures and credentials checked where a test asks for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec

BUCKET = "corpus"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: Its URL.
    """

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which boto, and so s3fs, reaches the server."""
        return {**_CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def reset(self) -> None:
        """Removes all buckets, and makes `BUCKET`."""
        self._call("POST", "moto-api/reset")
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
        self._call("PUT", BUCKET, headers=headers)

    def require_credentials(self, after: float = 0) -> None:
        """Has the server check credentials, after so many requests; `after` may be infinite."""
        self._call("POST", "moto-api/reset-auth", str(after).encode(), {"Content-Type": "text/plain"})

    def _call(self, method: str, path: str, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{path}", data, headers or {}, method=method)
        urllib.request.urlopen(request, timeout=60).close()


def forget_filesystems() -> None:
    """Has fsspec make its filesystems anew, with the present environment, also those behind its caches."""
    for name in ("s3", "simplecache", "filecache", "blockcache"):
        fsspec.get_filesystem_class(name).clear_instance_cache()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Starts a server in a process of its own."""
    environment = {**os.environ, **_CREDENTIALS, "INITIAL_NO_AUTH_ACTION_COUNT": "inf"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield S3Server(f"http://127.0.0.1:{process.stdout.readline().strip()}")
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()

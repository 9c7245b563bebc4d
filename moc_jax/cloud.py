"""Objects of Google Cloud Storage: listed, read, and written on a condition, with errors in words.

Google's own client does the work: it finds credentials as `gcloud` does (without any, what is public can be read),
repeats what failed on its way, and compares checksums. It is imported where an address is first used.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moc_jax.errors import Failure

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

SCHEME = "gs://"
_CONNECTIONS = 64


class CloudError(Failure):
    """What can't be read or written in a bucket: names the address, the cause and the fix."""


class ChangedError(CloudError):
    """Another generation of an object is there than the one that was meant."""


class MissingError(CloudError):
    """Neither an object nor a bucket is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CloudObject:
    """What is known of an object without reading it."""

    address: str
    size: int
    """Bytes."""
    generation: int
    """Another one for each time that it was written."""


def below(address: str, *, deep: bool = True) -> list[CloudObject]:
    """The objects in a folder, and if `deep` in the folders in it, by name; raises CloudError."""
    bucket, name = _parts(address)
    with _explained(address):
        prefix = f"{name}/" if name else None
        found = _client().list_blobs(bucket, prefix=prefix, delimiter=None if deep else "/")
        return [_object(blob) for blob in found if not blob.name.endswith("/")]


def is_empty(address: str) -> bool:
    """Whether nothing lies in a folder; raises CloudError."""
    bucket, name = _parts(address)
    with _explained(address):
        return not list(_client().list_blobs(bucket, prefix=f"{name}/" if name else None, max_results=1))


def look(address: str) -> CloudObject | None:
    """The object at an address; None if there is none. Raises CloudError."""
    bucket, name = _parts(address)
    with _explained(address):
        blob = _client().bucket(bucket).get_blob(name) if name else None
        return None if blob is None else _object(blob)


def read(address: str) -> tuple[bytes, int] | None:
    """The content of a small object and its generation; None if there is none. Raises CloudError."""
    while (found := look(address)) is not None:
        with contextlib.suppress(ChangedError, MissingError), _explained(address):  # between the two requests
            return _blob(address).download_as_bytes(if_generation_match=found.generation), found.generation
    return None


def read_span(found: CloudObject, begin: int, size: int) -> bytes:
    """Some of an object's bytes; raises ChangedError or CloudError."""
    if not size:
        return b""
    with _explained(found.address):
        end = begin + size - 1  # it is the last byte's number
        return _blob(found.address).download_as_bytes(
            start=begin, end=end, if_generation_match=found.generation, checksum=None
        )


def download(found: CloudObject, file: Path) -> None:
    """Writes an object's content into a file, its checksum compared; raises ChangedError, CloudError or OSError."""
    with _explained(found.address):
        _blob(found.address).download_to_filename(
            os.fspath(file), if_generation_match=found.generation, checksum="crc32c"
        )


def upload(file: Path, address: str, *, generation: int | None = None) -> CloudObject:
    """Puts a file's content there, all of it or nothing, its checksum compared.

    Args:
        file: what to read.
        address: where it will be.
        generation: which one it replaces; 0: there must be none; None: whichever is there.

    Raises:
        ChangedError: another generation is there.
        CloudError: it can't be written.
        OSError: the file can't be read.
    """
    blob = _blob(address)
    with _explained(address):
        blob.upload_from_filename(os.fspath(file), if_generation_match=generation, checksum="crc32c")
    return _object(blob)


def write(address: str, content: bytes, *, generation: int | None = None) -> int:
    """The same for bytes; returns the new generation."""
    blob = _blob(address)
    with _explained(address):
        blob.upload_from_string(content, "application/octet-stream", if_generation_match=generation)
    return _object(blob).generation


def remove(address: str, *, generation: int | None = None) -> None:
    """Removes an object that is there; raises ChangedError or CloudError."""
    with _explained(address):
        _blob(address).delete(if_generation_match=generation)


def _parts(address: str) -> tuple[str, str]:
    bucket, _, name = address.removeprefix(SCHEME).partition("/")
    return bucket, name.strip("/")


def _blob(address: str) -> "Blob":
    bucket, name = _parts(address)
    return _client().bucket(bucket).blob(name)


def _object(blob: "Blob") -> CloudObject:
    address = f"{SCHEME}{blob.bucket.name}/{blob.name}"
    return CloudObject(address=address, size=int(blob.size or 0), generation=int(blob.generation or 0))


@functools.cache
def _client() -> "Client":
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage
        from requests.adapters import HTTPAdapter
    except ImportError as error:
        raise CloudError(f"addresses in buckets need more packages: pip install 'moc_jax[gcs]' ({error})") from error
    try:
        client = storage.Client(project=None)  # no request of ours needs one
    except DefaultCredentialsError:
        client = storage.Client.create_anonymous_client()
    for scheme in ("https://", "http://"):  # by default there are fewer connections than requests at once
        client._http.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
    return client


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    _client()  # without the packages it says so
    from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound, PreconditionFailed, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.exceptions import GoogleCloudError
    from requests import RequestException

    try:
        yield
    except PreconditionFailed as error:
        raise ChangedError(f"{address} was changed by somebody else meanwhile") from error
    except NotFound as error:
        raise MissingError(f"{address} does not exist; check its spelling") from error
    except (Forbidden, Unauthorized, GoogleAuthError) as error:
        raise CloudError(
            f"{address} is not open to this user: {error}. Give access, or log in as another with "
            "`gcloud auth application-default login`"
        ) from error
    except (GoogleAPICallError, GoogleCloudError, RequestException, ConnectionError) as error:
        raise CloudError(f"{address} can't be reached: {error}") from error

"""Faults of stores: refusals, missing files, and faults that may pass.

fsspec's packages raise exceptions of their own, and few of them name the answer of the server. The facts lie in the
exception or in its causes:

| package | status | reason | refusals without an answer |
|---|---|---|---|
| fsspec's http | ``ClientResponseError.status`` | | |
| s3fs | ``ClientError.response``, a cause of the ``OSError`` | ``response["Error"]["Code"]`` | ``NoCredentialsError`` |
| gcsfs | ``HttpError.code``; 403 is ``OSError("Forbidden: ...")`` | message | ``DefaultCredentialsError`` |
| adlfs | ``HttpResponseError.status_code`` | ``error_code`` | ``ClientAuthenticationError`` |
| huggingface_hub | ``HfHubHTTPError.response.status_code`` | message | ``LocalTokenNotFoundError`` |
"""

from __future__ import annotations

import email.utils
import enum
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dmagent_loader.shards.sources.urls import display_text, protocol

_NOT_FOUND = (404, 410)
_REFUSED = (400, 401, 403, 407)
"""400 is what Google's storage answers to an expired signature, and S3 to an expired token."""
_MAY_PASS = (408, 425, 429)
_PASSING_CODES = ("RequestTimeout", "XAmzContentSHA256Mismatch", "OperationAborted", "IncompleteBody")
"""Codes of S3 that come with a status of 4xx."""
_NO_CREDENTIALS = frozenset(
    (
        "NoCredentialsError",  # botocore
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
        "NoAuthTokenError",
        "SSOError",
        "TokenRetrievalError",
        "DefaultCredentialsError",  # google.auth
        "RefreshError",
        "ClientAuthenticationError",  # azure.core
        "LocalTokenNotFoundError",  # huggingface_hub
    )
)
_REMEDIES = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary keys, AWS_SESSION_TOKEN; "
    "for a public bucket, set FSSPEC_S3='{\"anon\": true}'",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket, "
    'set FSSPEC_GS=\'{"token": "anon"}\'',
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or a login of "
    "`az login`, or AZURE_STORAGE_CONNECTION_STRING",
    "hf": "set HF_TOKEN, or run `hf auth login`, with a token that may read the repository",
    "http": 'set FSSPEC_HTTP=\'{"headers": {"Authorization": "Bearer ..."}}\', or use a signed URL',
}
_FAMILIES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "https": "http"}


class Kind(enum.Enum):
    """Kind of a fault."""

    MISSING = "missing"
    REFUSED = "refused"
    LASTING = "lasting"
    """Of the request, not of the moment: a wrong region, a bucket that cannot have that name."""
    PASSING = "passing"


def root_cause(error: BaseException) -> BaseException:
    """The exception that names the answer of the server, or why there was none; `error` itself if none does."""
    chain = list(_chain(error))
    hides_cause = isinstance(error, FileNotFoundError) and _is_connection_fault(error.__cause__)
    rest = chain[1] if hides_cause else error
    return next((fault for fault in reversed(chain) if _status(fault) is not None or _lacks_credentials(fault)), rest)


def kind_of_fault(error: BaseException) -> Kind:
    """The kind of an exception of a filesystem."""
    fault = root_cause(error)
    status, code = _status(fault), reason_code(fault)
    if any(isinstance(one, PermissionError) for one in _chain(error)) or _lacks_credentials(fault):
        return Kind.REFUSED
    if str(error).startswith("Forbidden: "):  # gcsfs
        return Kind.REFUSED
    if status is None:
        if isinstance(error, FileNotFoundError) and not _is_connection_fault(error.__cause__):
            return Kind.MISSING
        is_wrong = isinstance(error, (ValueError, TypeError, NotImplementedError, ImportError))
        return Kind.LASTING if is_wrong and not isinstance(error, json.JSONDecodeError) else Kind.PASSING
    if status in _NOT_FOUND:
        return Kind.MISSING
    if status >= 500 or status in _MAY_PASS or code in _PASSING_CODES:
        return Kind.PASSING
    return Kind.REFUSED if status in _REFUSED else Kind.LASTING


def status_of(error: BaseException) -> int | None:
    """Status of the answer of the server; None if there was none, or it is not known."""
    return _status(root_cause(error))


def reason_code(error: BaseException) -> str:
    """The server's name for the fault, such as ``ExpiredToken``; ``""`` if it gave none, as in answers to HEAD."""
    fault = root_cause(error)
    response = getattr(fault, "response", None)
    code = (
        response.get("Error", {}).get("Code") if isinstance(response, Mapping) else getattr(fault, "error_code", None)
    )
    text = str(getattr(code, "value", code) or "")
    return "" if text.isdecimal() else text


def retry_after(error: BaseException) -> float:
    """Seconds for which the server asks to be left alone; 0 if it does not."""
    asked = _header(root_cause(error), "retry-after")
    if not isinstance(asked, str):
        return 0.0
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0


def fault_text(error: BaseException) -> str:
    """A fault for a message, with the server's name for it."""
    text, code = " ".join(display_text(str(error)).split()) or type(error).__name__, reason_code(error)
    return text if not code or code in text else f"{code}: {text}"


def remedy_for_refusal(url: str) -> str:
    """What to do where a store refuses access."""
    name = protocol(url)
    return _REMEDIES.get(_FAMILIES.get(name, name), f"check the credentials of {name}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__


def _status(fault: BaseException) -> int | None:
    response = getattr(fault, "response", None)
    if isinstance(response, Mapping):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    # Only in gcsfs: aiohttp has 400 as the `code` of an answer that breaks off.
    code = getattr(fault, "code", None) if type(fault).__module__.startswith("gcsfs") else None
    for found in (
        getattr(fault, "status", None),
        getattr(fault, "status_code", None),
        getattr(response, "status_code", None),
        code,
    ):
        if isinstance(found, int) and not isinstance(found, bool) and 100 <= found < 600:
            return found
    return None


def _lacks_credentials(fault: BaseException) -> bool:
    return any(base.__name__ in _NO_CREDENTIALS for base in type(fault).__mro__)


def _is_connection_fault(cause: BaseException | None) -> bool:
    """Whether fsspec's HTTP filesystem took a server that could not be reached for one without the file."""
    return isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.startswith("aiohttp")


def _header(fault: BaseException, name: str) -> Any:
    response = getattr(fault, "response", None)
    if isinstance(response, Mapping):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get(name)
    headers: Any = getattr(fault, "headers", None) or getattr(response, "headers", None)
    return headers.get(name) or headers.get(name.title()) if hasattr(headers, "get") else None

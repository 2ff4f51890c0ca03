"""Bearer keys: who may ask."""

import hmac
from pathlib import Path

from starlette.datastructures import Headers

from minidsv.errors import ConfigError
from minidsv.server.errors import ServerError
from minidsv.server.options import ServerOptions
from minidsv.server.page import PATHS as PAGE_PATHS

OPEN_PATHS = PAGE_PATHS | {"/health", "/ready"}  # a browser opens a page without a key


class BearerKeys:
    """The accepted keys, if any, and the paths that need none."""

    def __init__(self, options: ServerOptions):
        """Raises ConfigError for an unreadable file or a key that no header can carry."""
        self.open_paths = OPEN_PATHS | ({"/metrics"} if options.open_metrics else set())
        keys = [*options.api_key]
        if options.api_key_file is not None:
            keys += _read(Path(options.api_key_file))
        for key in keys:
            if not key or not all("!" <= c <= "~" for c in key):
                raise ConfigError("api_key: a key is printable ASCII without spaces, not empty")
        self._keys = [key.encode() for key in keys]

    def check(self, path: str, headers: Headers) -> None:
        """Raise ServerError 401 unless the call carries a key or needs none."""
        if not self._keys or path in self.open_paths:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        token = given.strip().encode("latin-1")
        # Every key is compared, whole: the time taken tells nothing about how near a guess was.
        matches = [hmac.compare_digest(token, key) for key in self._keys]
        if scheme.lower() == "bearer" and any(matches):
            return
        raise ServerError(
            401,
            "a key is needed: Authorization: Bearer KEY",
            "invalid_request_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: {path} cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_key_file: {path} holds no key")
    return keys

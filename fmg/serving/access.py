"""Who may use a server: the token, and which addresses other machines can reach. Standard library only."""

from __future__ import annotations

import hmac
import ipaddress
import os
from functools import lru_cache
from pathlib import Path

from fmg.core.errors import UsageError, reason

# a secret is one line; a wrong path may name a file of any size
_MAX_SECRET = 4096


def secret_from(variable: str | None, *, required: bool) -> str | None:
    """The secret in an environment variable, or in the file that `VARIABLE_FILE` names, as containers mount secrets.

    None if neither is set and it is not required.

    Raises:
        UsageError: it is required and missing, its file cannot be read, or it contains anything but printable ASCII.
            Its value is never shown.
    """
    if variable is None:
        return None
    file = f"{variable}_FILE"
    value, place = os.environ.get(variable, "").strip(), f"environment variable {variable}"
    if not value and (path := os.environ.get(file)):
        value, place = _line_of(path, file), f"file that {file} names"
        if not value:
            raise UsageError(f"The {place} is empty", "Put the secret in it.")
    if not value:
        if required:
            raise UsageError(f"The environment variable {variable} is not set", f"Put the secret in it: {variable}=...")
        return None
    if not value.isascii() or not value.isprintable():
        raise UsageError(f"The {place} does not contain a valid secret", "Use printable ASCII characters.")
    return value


def _line_of(path: str, variable: str) -> str:
    try:
        with Path(path).open("rb") as opened:
            return opened.read(_MAX_SECRET).decode("latin-1").strip()
    except (OSError, ValueError) as error:
        what = f"The file '{path}', which {variable} names, cannot be read: {reason(error)}"
        raise UsageError(what, "Name a file with the secret.") from None


# called for each request, mostly with the same name
@lru_cache(maxsize=16)
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None, variable: str) -> None:
    """Requires a token (read from `variable`) for an address that other machines can reach.

    Raises:
        UsageError: there is none.
    """
    if token is None and not is_loopback(host):
        raise UsageError(
            f"Other machines can reach the address {host}, but no token is set",
            f"Set a token ({variable}), or listen on 127.0.0.1.",
        )


def knows_token(authorization: str, token: str | None) -> bool:
    """Whether the header `Authorization: Bearer TOKEN` has the token, if one is required; in constant time."""
    return token is None or hmac.compare_digest(authorization.encode("latin-1"), f"Bearer {token}".encode())


def names_loopback(host: str) -> bool:
    """Whether the header `Host` names this machine.

    A page from another origin can point its own name at 127.0.0.1 and so read the answers of a server on loopback (DNS
    rebinding). Its requests carry that name.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name)

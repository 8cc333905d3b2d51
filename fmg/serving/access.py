"""Who may use a server: the token, and which addresses other machines can reach. Standard library only."""

from __future__ import annotations

import hmac
import ipaddress
import os

from fmg.core.errors import UsageError


def secret_from(variable: str | None, *, required: bool) -> str | None:
    """The secret in an environment variable; None if it is not set and not required.

    Raises:
        UsageError: it is required and missing, or contains anything but printable ASCII. Its value is never shown.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        if required:
            raise UsageError(f"The environment variable {variable} is not set", f"Put the secret in it: {variable}=...")
        return None
    if not value.isascii() or not value.isprintable():
        raise UsageError(
            f"The environment variable {variable} does not contain a valid secret", "Use printable ASCII characters."
        )
    return value


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

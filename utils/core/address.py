"""Parses the address of a visdom server. This module imports the standard library only, so that --help stays fast."""

from urllib.parse import urlsplit

from utils.core.errors import UsageError


def server_address(server: str | None, port: int) -> tuple[str, int, str]:
    """Split None, a host name or a URL into (origin, port, path): ('http://localhost', 8097, '').

    A port within the URL takes precedence over `port`. Raises UsageError if the address is neither a name nor a URL. An
    address with a login is refused, too, because the login would appear in every log.
    """
    text = str(server or "localhost")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port or port
    except ValueError:
        host = None
    if host and "@" in parts.netloc:
        raise UsageError(
            "the address of the visdom server must hold no login: that is taken from VISDOM_USERNAME and "
            "VISDOM_PASSWORD"
        )
    if not host or parts.scheme not in ("http", "https") or not text.isprintable() or set(text) & set(" \\"):
        raise UsageError(f"the visdom server must be a host name or an http(s) URL, not {text!r}")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}", port, parts.path.rstrip("/")

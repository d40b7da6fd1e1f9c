"""Adapts visdom's client to a thread. The client has time-outs, checks answers and prints nothing."""

import json
from typing import Any


class Refused(Exception):
    """A server answers with an error, or does not answer like visdom."""


class WindowGone(Exception):
    """A window that was sent earlier is no longer on the server."""


def client_class() -> Any:
    """Return the client's class. It is defined in a function because importing visdom takes seconds and may fail."""
    import requests
    import visdom

    class Client(visdom.Visdom):
        def __init__(self: Any, timeouts: tuple[float, float], **options: Any) -> None:
            # With send=False the constructor sends no request and logs no warnings. No request is needed, because
            # windows create their environment.
            super().__init__(send=False, raise_exceptions=True, use_incoming_socket=False, **options)
            self.send, self.timeouts, self._session = True, timeouts, requests.Session()
            self._session.trust_env = False  # do not use a proxy of the environment for localhost
            if self.username:
                # The answer is ignored, because the server answers with an error even if no login is needed. A wrong
                # login fails at a later request.
                login = json.dumps(dict(username=self.username, password=self.password))
                self._post(f"{self.server}:{self.port}{self.base_url}", login)

        def _post(self, url: str, data: Any) -> Any:
            return self._session.post(url, data=data, timeout=self.timeouts, allow_redirects=False)

        def _handle_post(self, url: str, data: Any = None) -> str:
            answer = self._post(url, data)
            if answer.status_code != 200:
                hints = {400: ": VISDOM_USERNAME and VISDOM_PASSWORD?", 403: f": {' '.join(answer.text.split())[:300]}"}
                raise Refused(f"status {answer.status_code}{hints.get(answer.status_code, '')}")
            return answer.text

        def environments(self) -> list[str]:
            try:
                return list(json.loads(self._send({}, endpoint="env_state")))
            except (TypeError, ValueError):
                raise Refused("not what visdom answers; is it another program?") from None

        def show(self, message: dict[str, Any]) -> None:
            """Send a pane of utils/display/dashboard_panes.py, more points for a pane, or a picture."""
            message = dict(message)  # a copy, because visdom writes into the message
            if "img" in message:
                self.image(**dict(message, opts=dict(message["opts"])))
            elif not message.get("append"):
                self._send(message)
            else:
                # If a window no longer exists, visdom would create a window with only the new points. Its answer would
                # not show this. (win_exists() would print a message if the connection fails.)
                if self._send({"win": message["win"]}, endpoint="win_exists") != "true":
                    raise WindowGone
                self._send(message, endpoint="update")

    return Client

"""visdom's client, made fit for a thread: time-outs, checked answers, no output of its own."""

import json
from typing import Any


class Refused(Exception):
    """A server answers, but not as visdom does when all is well."""


class WindowGone(Exception):
    """A window sent earlier is not on the server any more."""


def client_class() -> Any:
    """The class, made here: to import visdom takes seconds, and may fail."""
    import requests
    import visdom

    class Client(visdom.Visdom):
        def __init__(self: Any, timeouts: tuple[float, float], **options: Any) -> None:
            # Constructed with send=False it neither sends a request nor logs warnings. None is needed:
            # windows create their environment.
            super().__init__(send=False, raise_exceptions=True, use_incoming_socket=False, **options)
            self.send, self.timeouts, self._session = True, timeouts, requests.Session()
            self._session.trust_env = False  # no proxy of the environment between us and localhost
            if self.username:
                # Its answer is an error also where no login is needed; who is not let in learns it later.
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
            """Send a pane of utils/display/dashboard_panes.py, more points of one, or a picture."""
            message = dict(message)  # a copy: visdom writes into it
            if "img" in message:
                self.image(**dict(message, opts=dict(message["opts"])))
            elif not message.get("append"):
                self._send(message)
            else:
                # To a window that is gone visdom would "append" by making one of the new points alone, and
                # its answer would be the same. (win_exists() would print where the connection fails.)
                if self._send({"win": message["win"]}, endpoint="win_exists") != "true":
                    raise WindowGone
                self._send(message, endpoint="update")

    return Client

"""Starts visdom's server with all files of its page, by default for this machine only (`make dashboard`).

Runs send their data if a server is running (utils/display/live_dashboard.py). visdom's own server accepts requests
from every web page that is open in a browser. This server accepts only requests from its own page and from programs.
"""

import ipaddress
import os
import re
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams.config import opt
from hparams.environment import require_packages
from hparams.own import parse_own
from utils.core.errors import UsageError, UserError, printable, run_main
from utils.core.job import LOGS


@dataclass
class DashboardConfig:
    """dashboard"""

    port: int = opt(8097, "port to listen on", min=1, max=65535)
    address: str = opt("127.0.0.1", "address to listen on; 0.0.0.0: every interface of this machine")
    allow_host: list[str] = opt(
        None,
        "host names by which browsers may open the page, in addition to localhost and this machine's own names",
        metavar="NAME",
        repeatable=True,
    )
    env_path: str = opt(str(LOGS / ".dashboard"), "folder for data that the page's 'save' button writes", metavar="DIR")


EPILOG = """examples:
  python experiments/dashboard.py
  VISDOM_USERNAME=me VISDOM_PASSWORD=... python experiments/dashboard.py --address 0.0.0.0 --port 9000

If VISDOM_USERNAME and VISDOM_PASSWORD are set, the page asks for this login. Set both variables for training, too.
"""

WELCOME_INTERVAL = 1000  # milliseconds between two searches for new runs
# plotly's link "Edit" below each plot would send the data of the plot to a company's server.
STYLE = ".js-link-to-tool, .js-plotly-plot .plotlyjsicon { display: none; }"


def parse(argv=None):
    """Read the command line and the environment -> (DashboardConfig, login or None)."""
    description = "Start the server of the dashboard; Ctrl-C ends it."
    return parse_own(DashboardConfig, description, EPILOG, argv, _check), read_login()


def _check(config):
    read_login()
    for name in config.allow_host or ():
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII):
            raise UsageError(f"--allow_host {name} is not a host name: give it without http://, port and path")


def read_login():
    """Return (VISDOM_USERNAME, VISDOM_PASSWORD), or None if neither is set."""
    values = [os.environ.get(name) for name in ("VISDOM_USERNAME", "VISDOM_PASSWORD")]
    if any(values) and not all(values):
        raise UsageError("VISDOM_USERNAME and VISDOM_PASSWORD belong together: set both, or neither")
    return tuple(values) if all(values) else None


def listen(config):
    """Open the listening sockets for the address and the port.

    Raises UserError if the address is in use, or belongs to no interface here.
    """
    from tornado.netutil import bind_sockets

    try:
        return bind_sockets(config.port, config.address)
    except socket.gaierror as error:
        raise UserError(f"--address {config.address} is not an address: {error.strerror}") from None
    except (OSError, UnicodeError) as error:
        with socket.socket() as s:
            s.settimeout(1)
            taken = s.connect_ex(("127.0.0.1", config.port)) == 0
        hint = "is a dashboard running already? Else take" if taken else "take another --address, or"
        raise UserError(
            f"cannot listen on {config.address}, port {config.port}: "
            f"{getattr(error, 'strerror', None) or error} ({hint} another --port)"
        ) from None


def is_local(config):
    """Say whether only programs on this machine can connect to the server."""
    return config.address in ("127.0.0.1", "::1", "localhost")


def own_names(config):
    """Return the host names of this server, in lower case. The full name is included only if other machines can
    connect, because finding the full name may need a request to a name server."""
    machine = [socket.gethostname(), *([] if is_local(config) else [socket.getfqdn()])]
    names = ["localhost", *machine, *(name.partition(".")[0] for name in machine), config.address]
    return {name.lower() for name in [*names, *(config.allow_host or [])] if name}


def why_refused(request, names):
    """Return one line that says why this request is refused, or None. A request is refused if a page of another server
    may have caused the request.

    Browsers send the address of the page in the header Origin. Programs other than browsers send no Origin. In an
    attack by DNS rebinding, the host name of the other page points to this machine, and both headers hold this name. A
    page cannot change the header Host that its browser sends. Rebinding is impossible if Host is an IP address.
    """
    name = request.host_name.strip("[]").rstrip(".")  # lower case, without the port, which port forwarding can change
    if name not in names and not _is_ip(name):
        return (
            f"'{name}' is not a name of this dashboard's machine: open the page as localhost or by an IP address, "
            f"or start the dashboard with --allow_host {name}"
        )
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2].lower() != request.host.lower():
        return (
            f"web pages of {origin} may not use the dashboard at {request.host} "
            "(a proxy must pass on the Host header unchanged)"
        )
    return None


def _is_ip(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def guarded(application, names):
    """Return a subclass of visdom's class `application` that answers refused requests with status 403 and one line. The
    check comes before the choice of a handler. The check therefore covers pages, web sockets and static files."""
    from tornado.web import RequestHandler

    class Refused(RequestHandler):
        def initialize(self, why):
            self.why = why

        def prepare(self):
            self.set_status(403)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"{printable(self.why)}\n")

    class Guarded(application):
        def find_handler(self, request, **kwargs):
            if why := why_refused(request, names):
                return self.get_handler_delegate(request, Refused, dict(why=why))
            return super().find_handler(request, **kwargs)

    return Guarded


def forbid_frames(handler):
    """Set the header that forbids pages of other servers to show the dashboard in a frame."""
    handler.set_header("Content-Security-Policy", "frame-ancestors 'self'")


def make_app(config, login):
    """Build visdom's application as visdom's start_server does, but accept requests only from its own page."""
    from visdom.server import app as visdom_app
    from visdom.server.handlers import base_handlers, web_handlers
    from visdom.utils.server_utils import hash_password

    folder = Path(config.env_path)
    folder.mkdir(parents=True, exist_ok=True)
    # visdom always runs in debug mode and would therefore restart whenever a source file changes.
    visdom_app.tornado_settings["autoreload"] = False
    # visdom sends either a plot or its changes, whichever is shorter. The page compares a hash of its updated plot with
    # the server's hash. But plotly writes into the page's copy. At every second update, the page therefore fetched all
    # panes again.
    web_handlers.stringify = lambda node: ""
    base_handlers.BaseHandler.set_default_headers = forbid_frames
    os.environ.setdefault("LOGNAME", "user")  # visdom needs a user name, which may be missing in a container
    credential = None
    if login:
        name, password = login
        credential = dict(username=name, password=hash_password(hash_password(password)))
        visdom_app.DEFAULT_ENV_PATH = f"{folder}/"  # visdom reads the key of its cookies from this folder
        write_secret(folder / "COOKIE_SECRET")
    application = guarded(visdom_app.Application, own_names(config))
    app = application(port=config.port, env_path=f"{folder}/", user_credential=credential)
    app.user_settings["user_css"] += STYLE
    try:
        empty = not app.state["main"]["jsons"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'main.json'} is damaged: remove it") from None
    if empty:
        app.state["main"] = dict(jsons=dict(welcome=dict(welcome_pane([]), i=0)), reload={})
    return app


def welcome_pane(runs):
    """Make the pane of the first page. The pane contains links to the environments of the runs."""
    from visdom.utils.server_utils import window

    from utils.display.html import render

    links = [(name, f"/env/{quote(name, safe='')}") for name in runs]
    text = dict(type="text", content=render("welcome.html", runs=links))
    return window(dict(win="welcome", data=[text], opts=dict(title="welcome", width=500, height=400)))


def update_welcome(app):
    """Update the links to environments, also on an open page. A pane that the user has closed stays closed."""
    from visdom.utils.server_utils import broadcast

    panes = app.state.get("main", {}).get("jsons", {})
    if "welcome" not in panes:
        return
    pane = dict(welcome_pane(sorted(name for name in app.state if name != "main")), i=panes["welcome"]["i"])
    if pane["content"] != panes["welcome"]["content"]:
        panes["welcome"] = pane
        broadcast(app, pane, "main")


def write_secret(path):
    """Write a key for cookies, unless it exists. Users therefore stay logged in when the server restarts."""
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(secrets.token_hex(32))


def main(config, login):
    import logging

    require_packages("tornado", "visdom")

    sys.modules["torch"] = None  # visdom would import torch, which takes seconds, without using it
    from tornado.httpserver import HTTPServer
    from tornado.ioloop import IOLoop, PeriodicCallback
    from visdom.utils.shared_utils import get_visdom_path

    from utils.display import visdom_assets

    sockets = listen(config)  # the sockets come first, to report at once if the port is in use
    visdom_assets.install(Path(get_visdom_path("static")), lambda text: print(text, flush=True))
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)  # tornado warns if the user has no style sheet
    app = make_app(config, login)
    server = HTTPServer(app, max_buffer_size=1024**3)
    server.add_sockets(sockets)
    PeriodicCallback(lambda: update_welcome(app), WELCOME_INTERVAL).start()
    if not (is_local(config) or login):
        print(
            f"warning: whoever reaches {config.address} can see and change the dashboard; "
            "VISDOM_USERNAME and VISDOM_PASSWORD ask for a login",
            flush=True,
        )
    host = "localhost" if is_local(config) or config.address in ("0.0.0.0", "::") else config.address
    print(f"the dashboard is at http://{host}:{config.port} (Ctrl-C ends it)", flush=True)
    loop = IOLoop.current()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    loop.start()
    print("\nthe dashboard has ended", flush=True)


if __name__ == "__main__":
    run_main(main, *parse())

"""The server of the dashboard: its command line, what it starts from, which requests it refuses; the page's scripts
from a stand-in for npm, from a stand-in for visdom's download, from neither."""

import asyncio
import hashlib
import http.client
import json
import re
import socket
import sys
import tarfile
import threading
import urllib.request

import pytest
from conftest import ROOT
from test_dashboard import until
from tornado.httpserver import HTTPServer

from experiments import dashboard as server
from utils.core.errors import UserError
from utils.display import visdom_assets
from utils.display.live_dashboard import Dashboard

PYTHON = sys.executable
TEXT = {"a@1.0": {"dist/a.js": "let a = 1"}, "b@2.0": {"b.css": "b {}", "f/b.svg": "<svg>"}}
FILES = {
    "a@1.0": {"js/a.min.js": ("dist/a.js", "")},
    "b@2.0": {"css/b.css": ("b.css", ""), "fonts/b.svg#b": ("f/b.svg", "")},
}


@pytest.fixture
def static(tmp_path, monkeypatch):
    """visdom's folder as it is installed; nothing on the PATH but what a test puts there."""
    known = {
        package: {
            path: (inside, hashlib.sha256(TEXT[package][inside].encode()).hexdigest()[:32])
            for path, (inside, _) in files.items()
        }
        for package, files in FILES.items()
    }
    monkeypatch.setattr(visdom_assets, "FILES", known)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "static/js").mkdir(parents=True)
    (tmp_path / "static/js/main.js").write_text("visdom's own")
    return tmp_path / "static"


def put(static):
    """The lines it said."""
    lines = []
    visdom_assets.install(static, lines.append)
    return lines


def program(path, text):
    path.write_text(f"#!{PYTHON}\n{text}")
    path.chmod(0o755)


def npm(static, texts):
    """A program `npm` that packs `texts` as npm pack does."""
    packs = static.parent / "packs"
    packs.mkdir(exist_ok=True)
    for package, files in texts.items():
        with tarfile.open(packs / f"{package.replace('@', '-')}.tgz", "w:gz") as tar:
            for name, text in files.items():
                source = packs / "file"
                source.write_text(text)
                tar.add(source, f"package/{name}")
    program(
        static.parent / "bin/npm",
        f"""
import shutil, sys
assert sys.argv[1] == "pack" and sys.argv[-2:] == ["a@1.0", "b@2.0"], sys.argv
for name in {sorted(f"{package.replace('@', '-')}.tgz" for package in texts)}:
    shutil.copy("{packs}/" + name, name)
""",
    )


def downloads(static, texts, monkeypatch):
    """A stand-in for visdom's download, which writes `texts`, {path: text}, and marks all as there."""
    program(
        static.parent / "python",
        f"""
import os, sys
for path, text in {texts!r}.items():
    os.makedirs(os.path.dirname(f"{{sys.argv[-1]}}/static/{{path}}"), exist_ok=True)
    open(f"{{sys.argv[-1]}}/static/{{path}}", "w").write(text)
open(f"{{sys.argv[-1]}}/static/version.built", "w").write("0.2.4")
""",
    )
    monkeypatch.setattr(visdom_assets.sys, "executable", str(static.parent / "python"))


def content(static):
    return {str(p.relative_to(static)): p.read_text() for p in static.rglob("*") if p.is_file()}


ALL = {
    "js/main.js": "visdom's own",
    "js/a.min.js": "let a = 1",
    "css/b.css": "b {}",
    "fonts/b.svg#b": "<svg>",
    "version.built": "0.2.4",
}


def test_from_npm_and_once(static):
    npm(static, TEXT)
    assert len(put(static)) == 1 and content(static) == ALL
    (static.parent / "bin/npm").unlink()
    assert put(static) == [] and content(static) == ALL
    npm(static, TEXT)
    for name, text in (("css/b.css", ""), ("js/a.min.js", "<html>404"), ("js/a.min.js", None), ("version.built", None)):
        (static / name).unlink() if text is None else (static / name).write_text(text)
        assert len(put(static)) == 1 and content(static) == ALL


def test_without_npm_visdoms_own_download(static, monkeypatch):
    good = {path: text for path, text in ALL.items() if path not in ("js/main.js", "version.built")}
    downloads(static, good, monkeypatch)
    put(static)
    assert content(static) == ALL


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        ({**TEXT, "a@1.0": {"dist/a.js": "let a = evil"}}, "dist/a.js of a@1.0 does not have the known hash"),
        ({"a@1.0": TEXT["a@1.0"]}, r"npm's b-2.0.tgz is no such package"),
        ({**TEXT, "b@2.0": {"b.css": "b {}"}}, r"npm's b-2.0.tgz is no such package"),
        (None, "there is no npm"),
    ],
)
@pytest.mark.parametrize(
    ("downloaded", "also"),
    [
        ({"js/a.min.js": "<html>404", "css/b.css": "b {}", "fonts/b.svg#b": ""}, "lacks fonts/b.svg#b and 1 more"),
        ({"js/a.min.js": "a", "fonts/b.svg#b": "x"}, "lacks css/b.css[)]"),
    ],
)
def test_neither(static, monkeypatch, packed, said, downloaded, also):
    if packed:
        npm(static, packed)
    downloads(static, downloaded, monkeypatch)
    with pytest.raises(UserError, match=f"are not available .*{said}.*{also}.*no dashboard.*stats.jsonl") as caught:
        put(static)
    assert "\n" not in str(caught.value)
    assert content(static) == {"js/main.js": "visdom's own"}  # nothing half done is left


def test_npm_that_fails_or_hangs(static, monkeypatch):
    downloads(static, {}, monkeypatch)
    program(static.parent / "bin/npm", "import sys; sys.exit('npm error code ETARGET\\nnpm error no such version')")
    with pytest.raises(UserError, match="npm: npm error code ETARGET npm error no such version"):
        put(static)
    program(static.parent / "bin/npm", "import time; time.sleep(60)")
    monkeypatch.setattr(visdom_assets, "PATIENCE", 0.5)
    with pytest.raises(UserError, match="npm took more than 0.5 s"):
        put(static)


def test_a_folder_that_cannot_be_written(static, monkeypatch):
    monkeypatch.setattr(visdom_assets.os, "access", lambda *_: False)  # as to all but root
    with pytest.raises(UserError, match="cannot be written: start the dashboard once"):
        put(static)


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ("--prot 1", {}, "did you mean --port?"),
        ("--port 0", {}, "the least is 1"),
        ("", dict(VISDOM_USERNAME="me"), "set both, or neither"),
        ("", dict(VISDOM_PASSWORD="x"), "set both, or neither"),
        ("--allow_host a.example http://b.example", {}, "b.example is not a host name: give it without http://"),
        ("--allow_host a.example:80", {}, "is not a host name"),
    ],
)
def test_refused(flags, environment, said, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        server.parse(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and said in err


def test_addresses_that_cannot_be_listened_on():
    for address, said in (("no.such.invalid", "is not an address"), ("192.0.2.1", "take another --address")):
        with pytest.raises(UserError, match=said):
            server.listen(server.DashboardConfig(port=1234, address=address))


def test_what_the_page_saved_is_there_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, login = server.parse([])
    assert config.address == "127.0.0.1" and login is None
    assert list(server.make_app(config, None).state["main"]["jsons"]) == ["welcome"]
    saved = tmp_path / "logs/.dashboard/main.json"
    saved.write_text('{"jsons": {"mine": {}}, "reload": {}}')
    assert list(server.make_app(config, None).state["main"]["jsons"]) == ["mine"]
    saved.write_text('{"jsons"')
    with pytest.raises(UserError, match="main.json is damaged: remove it"):
        server.make_app(config, None)


def test_the_first_page_links_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = server.make_app(server.parse([])[0], None)

    def links():
        server.update_welcome(app)
        return re.findall('href="([^"]*)">([^<]*)<', app.state["main"]["jsons"]["welcome"]["content"])

    assert links() == [] and "There is no run yet" in app.state["main"]["jsons"]["welcome"]["content"]
    app.state.update({name: dict(jsons={}, reload={}) for name in ("b", "a", '<a "&?/#')})
    assert links() == [("/env/%3Ca%20%22%26%3F%2F%23", "&lt;a &#34;&amp;?/#"), ("/env/a", "a"), ("/env/b", "b")]
    del app.state["a"]
    assert ("/env/a", "a") not in links()
    app.state["main"]["jsons"].clear()  # its user closed the pane
    server.update_welcome(app)
    assert app.state["main"]["jsons"] == {}


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(flags) -> the port of a server in a thread of this process."""
    monkeypatch.chdir(tmp_path)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def serve(flags=""):
        config, login = server.parse(flags.split())
        config.port = 0

        async def listen():
            sockets = server.listen(config)
            HTTPServer(server.make_app(config, login)).add_sockets(sockets)
            return sockets[0].getsockname()[1]

        return asyncio.run_coroutine_threadsafe(listen(), loop).result(10)

    yield serve
    loop.call_soon_threadsafe(loop.stop)


PANE = json.dumps(dict(eid="new", win="w", data=[dict(type="text", content="a pane")], layout={}, opts={}))
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


def asks(port, method, path, headers, body=None):
    """(status, text) that a request with exactly these headers gets; the text of a web socket is not waited for."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, {k: v.format(port=port) for k, v in headers.items() if v is not None})
        answer = connection.getresponse()
        return answer.status, "" if answer.status == 101 else answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("host", "origin", "said"),
    [
        ("localhost:{port}", None, None),  # as programs ask
        ("localhost:{port}", "http://localhost:{port}", None),
        ("LocalHost:1234", "http://localhost:1234", None),  # through a tunnel
        ("127.0.0.1", "http://127.0.0.1", None),
        ("[::1]:{port}", "http://[::1]:{port}", None),
        ("here.example", "https://here.example", None),  # a proxy
        ("there.example:{port}", "http://there.example:{port}", None),
        (socket.gethostname(), None, None),
        ("evil.example:{port}", None, "--allow_host evil.example"),
        ("evil.example:{port}", "http://evil.example:{port}", "--allow_host evil.example"),
        ("localhost.evil.example", None, "--allow_host localhost.evil.example"),
        ("127.0.0.1.evil.example", None, "--allow_host"),
        ("localhost:{port}", "http://evil.example", "pages of http://evil.example may not"),
        ("localhost:{port}", "http://localhost:1", "may not"),  # another server on this machine
        ("localhost:{port}", "http://127.0.0.1:{port}", "may not"),
        ("localhost:{port}", "null", "may not"),
        ("localhost:{port}", "", "may not"),
    ],
)
def test_foreign_pages_are_refused(serve, host, origin, said):
    port = serve("--allow_host here.example --allow_host there.example")
    headers = dict(Host=host, Origin=origin)
    for method, path, body, more, good in (
        ("POST", "/events", PANE, {}, 200),
        ("GET", "/socket", None, UPGRADE, 101),
        ("GET", "/vis_socket", None, UPGRADE, 101),
        ("GET", "/static/js/main.js", None, {}, 200),
    ):
        status, text = asks(port, method, path, {**headers, **more}, body)
        if said is None:
            assert status == good
        else:
            assert status == 403 and said in text and text.count("\n") == 1 and text.endswith("\n")
    environments = json.loads(asks(port, "POST", "/env_state", dict(Host="localhost"), "{}")[1])
    assert ("new" in environments) == (said is None)


def test_other_servers_may_not_frame_the_pages(serve):
    port = serve()
    for path in ("/", "/env/run"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'self'"


def test_the_full_name_is_allowed_if_other_machines_can_connect(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Gpu7")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gpu7.cluster.example")
    local, everywhere = (server.own_names(server.DashboardConfig(address=a)) for a in ("127.0.0.1", "0.0.0.0"))
    assert local == {"localhost", "gpu7", "127.0.0.1"}
    assert everywhere == {"localhost", "gpu7", "gpu7.cluster.example", "0.0.0.0"}


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
def test_clients_connect_or_say_why_not(serve, monkeypatch):
    import visdom

    port, said = serve(), []
    client = visdom.Visdom("http://localhost", port=port, raise_exceptions=True)  # with a web socket of its own
    assert client.check_connection(10) and client.text("a text", env="mine")
    monkeypatch.setattr(server, "own_names", lambda config: {"elsewhere"})
    dashboard = Dashboard("localhost", serve(), "run", say=said.append, interval=0.02)
    dashboard.properties(dict(lr=1))
    until(lambda: said)
    dashboard.close()
    assert "status 403: 'localhost' is not a name of this dashboard's machine" in said[0] and "--allow_host" in said[0]


def test_the_table_is_for_the_visdom_that_is_pinned():
    pins = (ROOT / "requirements.txt").read_text()
    assert f"visdom=={visdom_assets.VERSION} " in pins.replace("\n", " ")
    hashes = [digest for files in visdom_assets.FILES.values() for _, digest in files.values()]
    assert len(hashes) == 29 and all(re.fullmatch("[0-9a-f]{32}", digest) for digest in hashes)
    assert {path.split("/")[0] for path in visdom_assets.paths()} == {"js", "css", "fonts"}

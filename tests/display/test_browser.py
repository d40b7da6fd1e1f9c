"""The dashboard in a real browser: the server of `make dashboard`, the runs of all scripts, pages opened in Chromium.

`make test-browser`; skipped if there is no Chromium, or if the page's scripts are not available.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, free_port, words
from PIL import Image
from scripts import experiment, sampler_flags, train_stage_1, train_stage_2, vqgan_flags
from test_dashboard import until
from test_metrics import SmallExtractor

from experiments import (
    calc_approximate_ELBO,
    calc_FID,
    calc_nearest_neighbours,
    calc_PRDC,
    calc_VQGAN_FID,
    generate_big_samples,
    get_samples,
)
from utils.display.dashboard_panes import UNITS
from utils.display.grids import TRIPLES_CAPTION
from utils.display.live_dashboard import Dashboard
from utils.evaluation import features

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")]
NAMES = f"MAP *.example 127.0.0.1, MAP {socket.gethostname()} 127.0.0.1"  # replaces DNS in the browser
FLAGS = [
    *words(
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    ),
    f"--host-resolver-rules={NAMES}",
]
PANES = """() => [...document.querySelectorAll('.window')].map(pane => {
  const text = selector => pane.querySelector(selector)?.textContent
  const all = selector => [...pane.querySelectorAll(selector)].map(e => e.textContent)
  return {
    title: text('.bar div.pull-right'), top: pane.getBoundingClientRect().top + scrollY, head: text('.gtitle'),
    x: text('.xtitle'), y: text('.ytitle'), legend: all('.legendtext'), notes: all('.annotation-text'),
    bars: pane.querySelectorAll('.bars .point').length, lines: pane.querySelectorAll('.scatterlayer .trace').length,
    picture: pane.querySelector('img')?.src, text: pane.querySelector('.content-text')?.innerText,
  }})"""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)  # headless, a user folder of its own
        yield browser
        browser.close()


class Server:
    """experiments/dashboard.py as a process."""

    def __init__(self, folder, flags="", **env):
        self.port, self.folder = free_port(), folder
        command = [sys.executable, str(ROOT / "experiments/dashboard.py"), "--port", str(self.port), *words(flags)]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("the dashboard is at"):
                return
        if self.process.wait(10) == 1 and "are not available" in "".join(self.said):
            pytest.skip("".join(self.said))
        pytest.fail("".join(self.said))

    def environments(self):
        url = f"http://127.0.0.1:{self.port}/env_state"
        with urllib.request.urlopen(url, data=b"{}", timeout=10) as answer:
            return json.load(answer)

    def put(self, env, text):
        """A pane of one text, sent as a program does."""
        pane = dict(eid=env, win="w", data=[dict(type="text", content=text)], layout={}, opts={})
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/events", json.dumps(pane).encode(), timeout=10).close()

    def stop(self):
        """Ctrl-C; returns (exit code, what it printed)."""
        self.process.send_signal(signal.SIGINT)
        rest, _ = self.process.communicate(timeout=20)
        return self.process.returncode, "".join(self.said) + rest


@pytest.fixture(scope="module")
def board(tmp_path_factory, browser):
    server = Server(tmp_path_factory.mktemp("board"))
    yield server
    code, said = server.stop()
    assert (code, "Traceback" in said) == (0, False), said


@pytest.fixture
def visit(browser, board):
    """visit(environment, number of panes) -> the page; what goes wrong on it fails the test. Nothing is passed over."""
    pages, wrong = [], []

    def visit(env, count=None):
        until(lambda: env in board.environments())  # the page of one that is not there yet is that of 'main'
        page = browser.new_page(viewport=dict(width=1600, height=1000))
        pages.append(page)
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
        page.on("response", lambda answer: answer.status >= 400 and wrong.append(f"{answer.url}: {answer.status}"))
        page.goto(f"http://127.0.0.1:{board.port}/env/{env}")
        if count is not None:
            page.wait_for_function(f"document.querySelectorAll('.window').length == {count}", timeout=15_000)
            page.wait_for_timeout(500)  # plots draw themselves after their panes, in turns of 100 ms
        return page

    yield visit
    for page in pages:
        page.close()
    assert not wrong


def panes_of(page):
    return {pane["title"]: SimpleNamespace(**pane) for pane in page.evaluate(PANES)}


def pixels(source):
    """A data URL -> (h, w, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


@pytest.fixture(scope="module")
def runs(board, shapes, tmp_path_factory):
    """A folder with runs of both training scripts and of every experiment, which all had the board.

    Returns a SimpleNamespace(folder=, results={script: last row of its metrics.jsonl}).
    """
    folder = tmp_path_factory.mktemp("runs")
    shown = f"--visdom --visdom_server 127.0.0.1 --visdom_port {board.port}"
    train = "--steps_per_log 1 --steps_per_eval 8 --steps_per_display_output 8 --steps_per_save_output 8 --ema"
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(features, "Inception", SmallExtractor)
        train_stage_1(shapes, "ae", f"{shown} --train_steps 24 --disc_start_step 5 {train}")
        train_stage_2(shapes, "before", "ae", 24, "--train_steps 9 --steps_per_log 1")
        train_stage_2(shapes, "prior", "ae", 24, f"{shown} --visdom_compare before --train_steps 24 {train}")
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), "alexnet.pth")
        for script, more in {
            get_samples: "--n_sheets 1",
            calc_FID: "--n_samples 9",
            calc_PRDC: "--n_samples 9 --nearest_k 2",
            calc_approximate_ELBO: "--train_steps 4 --steps_per_eval 2 --steps_per_log 1",
            calc_nearest_neighbours: "--n_samples 2 --alexnet_weights alexnet.pth",
            generate_big_samples: "--shape 5 4",
            calc_VQGAN_FID: "--n_samples 9",
        }.items():
            name = script.__name__.rsplit(".", 1)[-1]
            models = "" if script is calc_VQGAN_FID else "--load_dir prior --load_step 24"
            flags = words(f"{models} {more} {shown}")
            if script is calc_VQGAN_FID:
                flags = vqgan_flags(shapes, name, [*flags, *words("--ae_load_dir ae --ae_load_step 24")])
            else:
                flags = sampler_flags(shapes, name, "ae", 24, flags)
            script.main(experiment(script, flags))
            results[name] = json.loads(Path("logs", name, "metrics.jsonl").read_text().splitlines()[-1])
    return SimpleNamespace(folder=folder, results=results)


STAGE_1 = (
    "loss l1 nll_loss codebook_loss g_loss d_loss d_weight perplexity codes_used mean_distance lr images_per_second"
).split()
VALIDATED = ("l1", "nll_loss", "codebook_loss")


def test_the_page_of_a_vqgan(visit, runs):
    page = visit("ae", len(STAGE_1) + 5)
    shown = panes_of(page)
    *titles, reconstructions, codebook = shown  # in this order, on a page that is opened anew
    assert titles == ["progress", "loss", "properties", *STAGE_1[1:], "codebook_usage"]
    assert reconstructions == f"reconstructions ({TRIPLES_CAPTION}), step 24"
    assert codebook.startswith("mean of the pixels of each code") and codebook.endswith(", step 24")
    for name in STAGE_1:
        pane = shown[name]
        assert (pane.head, pane.x, pane.y) == (name, "step (4 images each)", UNITS[name]) and not pane.notes, name
    for name in VALIDATED:
        assert shown[name].legend == ["train", "train (smoothed)", "validation"] and shown[name].lines >= 3
    assert shown["lr"].legend == ["train"] and shown["images_per_second"].legend[-1] == "smoothed"
    usage = shown["codebook_usage"]
    assert (usage.x, usage.y, usage.bars) == ("code", "uses in an epoch", 16)
    assert "finished" in shown["progress"].text and "24 of 24 (100%)" in shown["progress"].text
    assert "\t96" in shown["progress"].text and "images seen" in shown["progress"].text
    assert "disc_start_step\t5\n" in shown["properties"].text
    for title, name in ((reconstructions, "reconstructions_24"), (codebook, "codebook_24")):
        saved = np.asarray(Image.open(runs.folder / f"logs/ae/images/{name}.png"))
        assert np.array_equal(pixels(shown[title].picture), saved)
        assert shown[title].top > max(shown[other].top for other in titles)


def test_the_page_of_a_sampler_beside_an_earlier_one(visit, runs):
    page = visit("prior", 9)
    shown = panes_of(page)
    assert shown["bits"].y == "bits per code"
    assert shown["bits"].legend == ["train, prior", "validation, prior", "train, before"]
    assert shown["lr"].legend == ["train, prior", "train, before"]
    assert shown["images_per_second"].legend == ["images_per_second", "smoothed"]
    for name in ("loss_history", "bound_history"):
        assert (shown[name].x, shown[name].y, shown[name].bars) == ("time step t", UNITS[name], 16)
    before = [json.loads(line)["bits"] for line in (runs.folder / "logs/before/stats.jsonl").read_text().splitlines()]
    assert trace(page, "bits", "train, before") == dict(x=list(range(1, 10)), y=before, visible=True)
    saved = np.asarray(Image.open(runs.folder / "logs/prior/images/samples_24.png"))
    assert np.array_equal(pixels(shown["samples, step 24"].picture), saved)


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("get_samples", 1),
        ("calc_FID", 0),
        ("calc_PRDC", 0),
        ("calc_VQGAN_FID", 2),
        ("calc_approximate_ELBO", 0),
        ("calc_nearest_neighbours", 1),
        ("generate_big_samples", 4),
    ],
)
def test_the_page_of_an_experiment(visit, runs, name, pictures):
    page = visit(name.replace("_", "-"))
    page.wait_for_function("[...document.querySelectorAll('.content-text')].some(e => e.innerText.includes('log_dir'))")
    page.wait_for_timeout(500)
    shown = panes_of(page)
    assert f"log_dir\t{name}\n" in shown["properties"].text
    assert sum(pane.picture is not None for pane in shown.values()) == pictures
    values = {k: v for k, v in runs.results[name]["values"].items() if not k.endswith("_se")}
    assert values and all(f"{k}\t{v:.5g}" in shown["results"].text for k, v in values.items() if type(v) is float)
    assert all(f"{k}\t" in shown["results"].text for k in values)
    if name == "calc_approximate_ELBO":
        assert shown["bits_per_dim"].y == "bits / dimension" and shown["loss"].lines == 2
        assert "bits_per_dim_se" not in shown


def trace(page, title, name):
    """The points of a curve as plotly has them."""
    return page.evaluate(
        """([title, name]) => {
        const plots = [...document.querySelectorAll('.js-plotly-plot')]
        const plot = plots.find(p => p.querySelector('.gtitle')?.textContent == title)
        const {x, y, visible} = plot._fullData.find(t => t.name == name)
        return {x, y, visible}}""",
        [title, name],
    )


@pytest.fixture
def live(board, request):
    dashboard = Dashboard(
        "127.0.0.1",
        board.port,
        request.node.name,
        say=lambda line: line.startswith("dashboard: ") or pytest.fail(line),
        interval=0.1,
        images_per_step=8,
        plan=["progress", "curves-loss"],
    )
    yield dashboard
    dashboard.close()


def test_a_known_picture_is_shown_as_it_is(visit, live):
    """Four quarters of known colours, looked at where the page shows them."""
    colours = np.array([[[255, 0, 0], [0, 200, 0]], [[10, 20, 255], [250, 240, 30]]], np.uint8)
    live.image("known", colours.repeat(160, 0).repeat(160, 1).transpose(2, 0, 1))
    page = visit(live.env, 3)
    page.wait_for_function("document.querySelector('img')?.naturalWidth == 320")
    seen = np.asarray(Image.open(io.BytesIO(page.locator("img").screenshot())).convert("RGB"))
    height, width = seen.shape[:2]
    assert abs(height - width) < 20 and width > 300
    for row in (0, 1):
        for column in (0, 1):
            middle = seen[height * (1 + 2 * row) // 4, width * (1 + 2 * column) // 4]
            assert np.array_equal(middle, colours[row, column])


def test_an_open_page_follows_and_keeps_what_its_user_did(visit, live):
    live.scalars(1, {"loss/train": 3.0})
    page = visit(live.env, 2)
    fetched = []
    page.on("request", lambda request: "/env/" in request.url and fetched.append(request.url))
    for step in range(2, 42):
        live.scalars(step, {"loss/train": 1e-5 * step})  # which Python and browsers write differently
        if step == 30:
            page.wait_for_function("document.querySelectorAll('.legendtext').length == 2")
            page.wait_for_timeout(300)
            page.locator(".legendtoggle").first.click()  # the curve as it was put in
        page.wait_for_timeout(50)
    last = dict(x=list(range(1, 42)), y=[3.0, *(1e-5 * step for step in range(2, 42))])
    until(lambda: page.wait_for_timeout(100) or trace(page, "loss", "train") == dict(last, visible="legendonly"))
    assert trace(page, "loss", "train (smoothed)")["visible"] is True
    assert trace(page, "loss", "images seen")["y"] == [8 * step for step in range(1, 42)]
    assert not fetched  # an update is an update, not the whole environment again
    plot = page.locator(".plotly-graph-div").bounding_box()
    page.mouse.move(plot["x"] + plot["width"] / 2, plot["y"] + plot["height"] / 2)
    page.wait_for_selector(".hoverlayer .legendtext >> text=/\\d+ images seen/")
    page.get_by_title("smooth lines").click()  # visdom's own
    page.wait_for_selector(".widget input[type=range]")


def test_the_first_page_links_the_runs(visit, board):
    page = visit("main", 1)
    board.put("a run", "first")
    page.wait_for_selector("text=a run")  # on the open page
    assert "named after its --log_dir" in panes_of(page)["welcome"].text
    page.click("text=a run")
    page.wait_for_selector("text=first")
    assert page.url.endswith("/env/a%20run")


def test_login(browser, tmp_path, monkeypatch):
    for name, value in (("VISDOM_USERNAME", "me"), ("VISDOM_PASSWORD", "a secret")):
        monkeypatch.setenv(name, value)
    server = Server(tmp_path)
    said = []
    dashboard = Dashboard("127.0.0.1", server.port, "run", say=said.append, interval=0.1)
    dashboard.properties(dict(lr="known to few"))
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    for password, there in (("a guess", "Invalid Login"), ("a secret", "Environment")):
        page.fill("#inputUsername", "me")
        page.fill("#inputPassword", password)
        page.click("#submitButton")
        page.wait_for_selector(f"text={there}")
    page.goto(f"http://127.0.0.1:{server.port}/env/run")
    page.wait_for_selector("text=known to few")
    page.close()
    stranger = browser.new_context()
    assert stranger.request.get(f"http://127.0.0.1:{server.port}/env/run").status == 400
    stranger.close()
    dashboard.close()
    assert said == [f"dashboard: {dashboard.url}"] and server.stop()[0] == 0
    assert (tmp_path / "logs/.dashboard/COOKIE_SECRET").stat().st_mode & 0o077 == 0


ATTACK = """async target => {
    const pane = JSON.stringify({eid: 'evil', win: 'w', layout: {}, opts: {}, data: [
        {type: 'text', content: '<img src=x onerror="document.title = 1">'}]})
    const posted = await fetch(`http://${target}/events`, {method: 'POST', mode: 'no-cors', body: pane})
    const socket = new WebSocket(`ws://${target}/socket`)
    const opened = await new Promise(done => { socket.onopen = () => done(true); socket.onerror = () => done(false) })
    if (opened) socket.send(JSON.stringify({cmd: 'delete_env', eid: 'mine'}))
    return [posted.status, opened]
}"""


def test_foreign_pages_change_nothing(browser, board, tmp_path):
    """A page of another server, and a page whose host name points to the dashboard later (DNS rebinding)."""
    board.put("mine", "what is there")
    (tmp_path / "index.html").write_text("<title>another page</title>")
    other = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: SimpleHTTPRequestHandler(*args, directory=tmp_path))
    threading.Thread(target=other.serve_forever, daemon=True).start()
    page = browser.new_page()
    for host in ("evil.example", "localhost"):
        page.goto(f"http://{host}:{other.server_port}/")
        for target in ("127.0.0.1", "localhost", "0.0.0.0", "evil.example"):
            assert page.evaluate(ATTACK, f"{target}:{board.port}") == [0, False]  # 0: hidden from the page
    other.shutdown()
    rebound = f"evil.example:{board.port}"
    assert page.goto(f"http://{rebound}/").status == 403
    assert "--allow_host evil.example" in page.content()
    assert page.evaluate(ATTACK, rebound) == [403, False]
    page.close()
    assert "mine" in board.environments() and "evil" not in board.environments()


class Tunnel:
    """A port that forwards to another one, as with `ssh -L`."""

    def __init__(self, port):
        self.target, self.listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                near, far = self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source, to):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)


def test_the_page_by_every_name_and_address(browser, tmp_path):
    server = Server(tmp_path, "--address 0.0.0.0 --allow_host board.example")
    server.put("mine", "what is there")
    tunnel = Tunnel(server.port)
    hosts = ("localhost", "127.0.0.1", "0.0.0.0", socket.gethostname(), "board.example")
    for address in (*(f"{host}:{server.port}" for host in hosts), f"localhost:{tunnel.port}"):
        page = browser.new_page()
        page.goto(f"http://{address}/env/mine")
        page.wait_for_selector("text=what is there")  # sent over the web socket
        page.close()
    tunnel.listener.close()
    assert server.stop()[0] == 0


def test_a_second_server_on_the_port_is_refused(board, tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments/dashboard.py"), "--port", str(board.port)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and time.monotonic() - start < 15
    assert done.stderr.count("\n") == 1 and "is a dashboard running already?" in done.stderr

"""The dashboard against a server that answers, refuses, hangs, vanishes and returns; and the real one."""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port
from PIL import Image

from utils.core.errors import UsageError
from utils.display import dashboard_panes as panes
from utils.display.curves import Curve
from utils.display.live_dashboard import Dashboard, env_name, server_address

# visdom's own client calls logger.warn
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
FAST = dict(interval=0.02, backoff=(0.02, 0.1), timeouts=(1.0, 5.0))


@pytest.fixture(scope="module", autouse=True)
def imported():
    import visdom  # noqa: F401  takes seconds, which no test below wants to measure


def refuse_constant(text):
    raise AssertionError(f"{text} was sent: not JSON for a browser")


def points(trace):
    return list(zip(trace["x"], trace["y"], strict=True))


def put_in(name):
    """Whether a trace holds what was put in, and is not made from it (or an empty plot's)."""
    return name not in ("", "smoothed", panes.IMAGES_SEEN) and not name.endswith("(smoothed)")


class FakeVisdom:
    """Answers as visdom 0.2.4 does to the requests that matter, and records them."""

    def __init__(self):
        self.mode, self.requests, self.failures, self.released = "ok", [], [], threading.Event()
        self.start(0)

    def start(self, port=None):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if fake.mode == "hang":
                    fake.released.wait(30)
                    return
                failing = {"500": [self.path], "500 later": ["/events", "/update"]}.get(fake.mode, [])
                status, text = (500, "oops") if self.path in failing else (200, fake.answer(self.path, body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port if port is None else port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, body):
        try:
            message = json.loads(body, parse_constant=refuse_constant)
        except AssertionError as error:
            self.failures.append(error)
            raise
        known = [m for p, m in self.requests if p == "/events"]
        self.requests.append((path, message))
        if path == "/env_state":
            return json.dumps(["main", *{m["eid"] for m in known}])
        if path == "/win_exists":
            return json.dumps(message["win"] in [m["win"] for m in known])
        return message.get("win", "")

    def empty(self):
        """As if restarted in between."""
        self.requests.clear()

    def sent(self, path, win=None):
        return [m for p, m in list(self.requests) if p == path and win in (None, m["win"])]

    def windows(self):
        return {message["win"] for message in self.sent("/events")}

    def curves(self, derived=False):
        """{window: {trace: [(x, y), ...]}} as a browser would see them; derived: also those smoothed, and the images
        seen."""
        windows = {}
        for path, message in list(self.requests):
            if path == "/events" and message["data"][0]["type"] == "scatter":
                windows[message["win"]] = [(trace["name"], points(trace)) for trace in message["data"]]
            if path == "/update":
                assert message["append"] is True
                for (name, shown), trace in zip(windows[message["win"]], message["data"], strict=True):
                    assert name == trace["name"]
                    shown += points(trace)
        return {
            win.removeprefix("curves-"): {k: v for k, v in traces if derived or put_in(k)}
            for win, traces in windows.items()
        }


@pytest.fixture
def fake():
    server = FakeVisdom()
    yield server
    server.released.set()
    with contextlib.suppress(OSError):
        server.stop()
    assert not server.failures


@pytest.fixture
def make():
    made = []

    def make(server, **options):
        lines, announced = [], []

        def say(line):
            (announced if line.startswith("dashboard: ") and "(" not in line else lines).append(line)

        port = server if isinstance(server, int) else server.port
        made.append(Dashboard("127.0.0.1", port, "logs/run_1", say=say, **{**FAST, **options}))
        made[-1].lines, made[-1].announced = lines, announced
        return made[-1]

    yield make
    for dashboard in made:
        dashboard.close(0.5)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


def curve(steps, f=math.sqrt):
    return [(step, f(step)) for step in steps]


def put(dashboard, points, name="loss"):
    for step, value in points:
        dashboard.scalars(step, {name: value})


@pytest.mark.parametrize(
    "log_dir, name",
    [
        ("demo_vqgan", "demo-vqgan"),
        ("test", "test"),
        ("run-2.1", "run--2.1"),
        ("logs/vqgan_ffhq/", "logs---vqgan-ffhq"),
        ("../a  b+c", "a-b-c----........"),
        ("a__b", "a-b----........"),
        ("..", "run----........"),
        ("x" * 300, "x" * 100 + "----........"),
    ],
)
def test_env_name(log_dir, name):
    assert re.fullmatch(name, env_name(log_dir))
    assert not set(env_name(log_dir)) & set("/_+%?# ")


def test_each_run_has_an_environment_of_its_own():
    names = {Path("".join(c)).as_posix() for n in range(1, 6) for c in itertools.product("a0_-/ .", repeat=n)}
    names |= {env_name(name) for name in names} | {"x" * 300, "x" * 301, "a" + "-" * 60, "a" + "-" * 61}
    assert len({env_name(name) for name in names}) == len(names) > 20_000


def test_server_address():
    assert server_address(None, 8097) == ("http://localhost", 8097, "")
    assert server_address("box", 1) == ("http://box", 1, "")
    assert server_address("box:9000", 1) == ("http://box", 9000, "")
    assert server_address("https://box:9000/vis/", 1) == ("https://box", 9000, "/vis")
    assert server_address("http://[::1]", 1) == ("http://[::1]", 1, "")
    odd = "a box", "box\n", "http://box\\x", "javascript:alert(1)"
    for wrong in ("ftp://box", "http://", "box:port", "box:99999", *odd):
        with pytest.raises(UsageError, match="host name or an http"):
            server_address(wrong, 1)
    for login in ("u:pw@box", "https://u@box:9000/vis"):
        with pytest.raises(UsageError, match="no login.*VISDOM_PASSWORD") as caught:
            server_address(login, 1)
        assert "pw" not in str(caught.value)


def test_module_imports_neither_torch_nor_visdom():
    code = "import sys, utils.display.live_dashboard; assert not {'torch', 'visdom', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_points_arrive_once_and_together(fake, make):
    dashboard = make(fake)
    put(dashboard, curve(range(40)))
    until(lambda: fake.curves().get("loss") == {"loss": curve(range(40))})
    earlier = len(fake.sent("/update"))
    with dashboard._lock:  # so that they are all new at one send
        for step in range(40, 60):
            dashboard._plots["loss"].add("loss", step, math.sqrt(step))
    until(lambda: fake.curves()["loss"]["loss"] == curve(range(60)))
    assert [len(m["data"][0]["x"]) for m in fake.sent("/update")[earlier:]] == [20]
    assert all(m["eid"] == "logs---run-1" for _, m in fake.requests)
    for layout in (m["layout"] for m in fake.sent("/events")):
        assert layout["xaxis"]["title"]["text"] == "step" and layout["yaxis"]["title"]["text"] == "loss"
        assert layout["title"]["text"] == "loss"
    assert dashboard.lines == []


def test_the_address_is_printed_once_when_a_server_answers(fake, make):
    dashboard = make(fake)
    until(lambda: dashboard.announced)
    time.sleep(0.1)
    assert dashboard.announced == [f"dashboard: http://127.0.0.1:{fake.port}/env/logs---run-1"]
    assert dashboard.lines == []


def test_traces_share_a_window(fake, make):
    dashboard = make(fake)
    dashboard.scalars(1, {"loss/train": 5.0, "loss/validation": 6, "rate": 0.25})
    dashboard.scalars(1, {"memory/disk": 7.0, "memory/gpu": 8.0})
    expected = {
        "loss": {"train": [(1, 5.0)], "validation": [(1, 6.0)]},
        "rate": {"rate": [(1, 0.25)]},
        "memory": {"disk": [(1, 7.0)], "gpu": [(1, 8.0)]},
    }
    until(lambda: fake.curves() == expected)
    assert fake.sent("/events", "curves-loss")[-1]["layout"]["showlegend"] is True
    fake_updates = len(fake.sent("/update"))
    dashboard.scalars(2, {"loss/train": np.float32(0.5)})  # the other trace has no news
    expected["loss"]["train"].append((2, 0.5))
    until(lambda: fake.curves() == expected)
    assert len(fake.sent("/update")) == fake_updates + 1
    dashboard.scalars(3, {"loss/test": 9.0})  # a trace that the server does not know yet
    expected["loss"]["test"] = [(3, 9.0)]
    until(lambda: fake.curves() == expected)


def test_non_finite_values_are_not_sent(fake, make):
    dashboard = make(fake)
    values = [1.0, math.nan, math.inf, -math.inf, np.float32("nan"), None, 2.0]
    for step, value in enumerate(values):
        dashboard.scalars(step, {"loss": value, "never": math.nan})
    dashboard.bars("use", [1.0, math.nan, 3.0, math.inf])
    until(lambda: fake.sent("/events", "bars-use"))
    until(lambda: fake.curves() == {"loss": {"loss": [(0, 1.0), (6, 2.0)]}})
    data = fake.sent("/events", "bars-use")[-1]["data"]
    assert [(bar["x"], bar["y"], bar["type"]) for bar in data] == [([0, 2], [1.0, 3.0], "bar")]


def test_hanging_server_delays_nobody(fake, make):
    fake.mode = "hang"
    dashboard = make(fake, timeouts=(5.0, 30.0))
    time.sleep(0.2)  # by now the thread waits for an answer
    image = np.zeros((3, 64, 64), np.uint8)
    start = time.perf_counter()
    for step in range(1000):
        dashboard.scalars(step, {"loss/train": 1.0, "loss/validation": 2.0, "rate": 3.0})
        dashboard.image("samples", image)
        dashboard.bars("use", image[0, 0])
    assert time.perf_counter() - start < 1.0
    start = time.perf_counter()
    dashboard.close(timeout=0.3)
    assert time.perf_counter() - start < 0.6
    assert dashboard.lines == []
    start = time.perf_counter()
    dashboard.close()
    assert time.perf_counter() - start < 0.1


def test_one_warning_for_a_hanging_server_and_complete_afterwards(fake, make):
    fake.mode = "hang"
    dashboard = make(fake, timeouts=(0.3, 0.2))
    put(dashboard, curve(range(30)))
    time.sleep(1.0)  # several attempts
    assert len(dashboard.lines) == 1
    fake.mode = "ok"
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(30))}})
    until(lambda: len(dashboard.lines) == 2)


def test_absent_server_one_warning_then_everything(fake, make, capfd, caplog):
    port = fake.port
    fake.stop()
    dashboard = make(port)
    until(lambda: dashboard.lines)
    put(dashboard, curve(range(100)))
    dashboard.bars("use", [1, 2])
    dashboard.image("samples", np.zeros((3, 4, 4), np.uint8))
    dashboard.properties({"lr": 1})
    time.sleep(0.5)  # many attempts
    (line,) = dashboard.lines
    assert f"127.0.0.1:{port}" in line and "make dashboard" in line and "--no_visdom" in line
    assert "\n" not in line
    fake.start()
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(100))}} and len(dashboard.lines) == 2)
    assert fake.windows() == {"curves-loss", "bars-use", "image-samples", "properties"}
    assert dashboard.lines[1] == f"dashboard: {dashboard.url} (a server answers now)" and not dashboard.announced
    time.sleep(0.1)
    assert len(dashboard.lines) == 2
    assert capfd.readouterr() == ("", "") and not caplog.records  # visdom itself says nothing


@pytest.mark.parametrize("failure", ["500", "500 later", "stop"])
def test_curves_are_complete_after_an_outage(fake, make, failure):
    dashboard = make(fake)
    dashboard.properties({"lr": 1})
    put(dashboard, curve(range(50)))
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(50))}})
    fake.stop() if failure == "stop" else setattr(fake, "mode", failure)
    put(dashboard, curve(range(50, 300)))
    until(lambda: dashboard.lines)
    put(dashboard, curve(range(300, 400)))
    time.sleep(0.3)
    assert len(dashboard.lines) == 1 and ("500" in dashboard.lines[0]) == (failure != "stop")
    if failure == "stop":
        fake.empty()
        fake.start()
    fake.mode = "ok"
    put(dashboard, curve(range(400, 450)))
    until(lambda: fake.curves().get("loss") == {"loss": curve(range(450))} and len(dashboard.lines) == 2)
    assert fake.sent("/events", "properties")
    put(dashboard, curve(range(450, 460)))
    until(lambda: fake.curves()["loss"]["loss"] == curve(range(460)))
    assert fake.sent("/update")  # appends again
    assert len(dashboard.lines) == 2


def test_server_restarted_empty_without_a_failed_request(fake, make):
    dashboard = make(fake)
    dashboard.properties({"lr": 1})
    dashboard.bars("use", [1, 2])
    put(dashboard, curve(range(50)))
    until(lambda: len(fake.windows()) == 3 and fake.curves()["loss"]["loss"] == curve(range(50)))
    fake.empty()
    until(lambda: len(fake.windows()) == 3)  # with nothing new to send
    assert fake.curves() == {"loss": {"loss": curve(range(50))}}
    assert dashboard.lines == []


def test_window_closed_in_the_browser_returns_whole(fake, make):
    dashboard = make(fake)
    dashboard.properties({"lr": 1})
    put(dashboard, curve(range(50)))
    until(lambda: len(fake.windows()) == 2 and fake.curves()["loss"]["loss"] == curve(range(50)))
    fake.requests[:] = [r for r in fake.requests if r[1].get("win") != "curves-loss"]
    put(dashboard, curve(range(50, 60)))
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(60))}})
    assert dashboard.lines == []


def test_login_and_proxy(fake, make, monkeypatch):
    monkeypatch.setenv("VISDOM_USERNAME", "me")
    monkeypatch.setenv("VISDOM_PASSWORD", "secret")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    dashboard = make(fake)
    put(dashboard, curve(range(3)))
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(3))}})
    path, message = fake.requests[0]
    assert path in ("", "/")
    assert message == dict(username="me", password=hashlib.sha256(b"secret").hexdigest())


def test_another_program_on_the_port(fake, make):
    fake.answer = lambda path, body: "<html>"
    dashboard = make(fake)
    put(dashboard, curve(range(3)))
    time.sleep(0.5)
    (line,) = dashboard.lines
    assert "another program" in line


def test_what_cannot_be_shown_is_skipped(fake, make):
    dashboard = make(fake)
    for i in range(5):
        dashboard._put(dict(win=f"broken-{i}", data=object()))
    dashboard.properties({"lr": 1})
    put(dashboard, curve(range(10)))
    until(lambda: len(fake.windows()) == 2 and fake.curves() == {"loss": {"loss": curve(range(10))}})
    (line,) = dashboard.lines
    assert "TypeError" in line


def test_missing_visdom_is_one_line(fake, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "visdom", None)
    dashboard = make(fake)
    until(lambda: dashboard.lines)
    put(dashboard, curve(range(10)))
    assert len(dashboard.lines) == 1 and "cannot be imported" in dashboard.lines[0]
    assert fake.requests == []


def test_a_say_that_raises_does_no_harm(fake):
    def say(text):
        raise BrokenPipeError(text)

    fake.mode = "500"
    dashboard = Dashboard("127.0.0.1", fake.port, "run", say=say, **FAST)
    put(dashboard, curve(range(10)))
    time.sleep(0.2)
    fake.mode = "ok"
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(10))}})
    dashboard.close()


def test_the_plan_is_on_the_page_from_the_start_and_in_order(fake, make):
    plan = ["progress", "curves-loss", "properties", "curves-lr", "bars-use"]
    dashboard = make(fake, plan=plan)
    until(lambda: fake.windows() == set(plan))
    assert [m["win"] for m in fake.sent("/events")] == plan
    empty = fake.sent("/events", "curves-lr")[-1]
    assert empty["layout"]["annotations"][0]["text"] == "nothing yet" and empty["data"][0]["x"] == []
    dashboard.image("samples", np.zeros((3, 4, 4), np.uint8))
    put(dashboard, curve(range(3)), "later")
    put(dashboard, curve(range(3)), "lr/train")
    until(lambda: fake.curves().get("lr", {}).get("train") == curve(range(3)) and len(fake.windows()) == 7)
    assert "annotations" not in fake.sent("/events", "curves-lr")[-1]["layout"]
    fake.empty()
    until(lambda: len(fake.windows()) == 7)
    assert [m["win"] for m in fake.sent("/events")][:5] == plan  # also for a server that was restarted


def test_smoothed():
    c = Curve(1000)
    ys = np.random.default_rng(0).normal(size=400)
    rewritten = [c.add(n, float(y)) for n, y in enumerate(ys)]
    xs, _, means = c.take(whole=True, final=False)
    assert xs == list(range(400)) and [n for n, whole in enumerate(rewritten) if whole] == [19, 99]
    np.testing.assert_allclose(means[:3], np.cumsum(ys[:3]) / np.arange(1, 4))
    for n, span in ((3, 3), (50, 3), (119, 3), (199, 5), (399, 10)):  # y_n weighs 1 / span: the curve's fortieth
        np.testing.assert_allclose(means[n], means[n - 1] + (ys[n] - means[n - 1]) / span)
    again = Curve(1000)
    for n, y in [*enumerate(ys[:300]), *enumerate(ys[200:], start=200)]:  # a resumed run
        again.add(n, float(y))
    np.testing.assert_allclose(again.take(whole=True, final=False)[2], means)


def test_smoothed_and_images_seen_are_sent_with_the_curve(fake, make):
    dashboard = make(fake, images_per_step=4)
    put(dashboard, curve(range(10, 15)), "loss/train")
    until(
        lambda: (
            fake.curves(derived=True)
            == {"loss": {"train": curve(range(10, 15)), panes.IMAGES_SEEN: [(n, 4 * n) for n in range(10, 15)]}}
        )
    )
    assert fake.sent("/events")[-1]["layout"]["xaxis"]["title"]["text"] == "step (4 images each)"
    put(dashboard, curve(range(15, 70)), "loss/train")
    put(dashboard, curve(range(70, 100)), "lr/train")
    until(lambda: len(fake.curves(derived=True).get("loss", {}).get("train (smoothed)", ())) == 60)
    traces = fake.curves(derived=True)["loss"]
    assert traces[panes.IMAGES_SEEN] == [(n, 4 * n) for n in range(10, 70)]
    expected = Curve(100)
    for x, y in curve(range(10, 70)):
        expected.add(x, y)
    assert traces["train (smoothed)"] == list(zip(*expected.take(True, False)[::2], strict=True))
    faint, strong = fake.sent("/events", "curves-loss")[-1]["data"][:2]
    assert (faint["line"]["color"], strong["line"]["color"]) == ("#1f77b459", "#1f77b4")
    until(lambda: len(fake.curves().get("lr", {}).get("train", ())) == 30)
    assert set(fake.curves(derived=True)["lr"]) == {"train", panes.IMAGES_SEEN}  # a schedule is shown as it is


def test_another_run_stands_in_the_same_plots(fake, make):
    dashboard = make(fake, plan=["curves-loss"])
    other = [{"step": s, "loss/train": math.sqrt(s), "loss/validation": 1, "theirs/train": 2.0} for s in range(3)]
    dashboard.compare("before", [*other, {"loss/train": 3.0}, {"step": 3, "loss/train": math.nan}])
    dashboard.compare("long", ({"step": s, "loss/train": 5.0} for s in range(4000)))
    put(dashboard, curve(range(30)), "loss/train")
    names = {"train, logs/run_1 (raw)", "train, logs/run_1", "train, before", "validation, before", "train, long"}
    until(lambda: set(fake.curves().get("loss", ())) == names)
    shown = fake.curves()["loss"]
    assert fake.curves().keys() == {"loss"}  # this run has no plot 'theirs'
    assert shown["train, before"] == curve(range(3)) and shown["validation, before"] == [(s, 1.0) for s in range(3)]
    assert shown["train, logs/run_1 (raw)"] == curve(range(30))
    assert 500 <= len(shown["train, long"]) <= 1000 and shown["train, long"][-1] == (3999, 5.0)
    put(dashboard, curve(range(30, 40)), "loss/train")
    until(lambda: fake.curves()["loss"]["train, logs/run_1 (raw)"] == curve(range(40)))
    assert fake.curves()["loss"]["train, before"] == curve(range(3))
    put(dashboard, [(1, 2.0)], "theirs/train")
    until(lambda: fake.curves().get("theirs", {}).get("train, before") == [(s, 2.0) for s in range(3)])


def test_colour_means_run_and_dash_means_validation(fake, make):
    """In all plots, whichever curve comes first, and although a run lacks some curves."""
    dashboard = make(fake)
    dashboard.compare("first", [{"step": 1, "l1/train": 1.0}])
    dashboard.compare("second", [{"step": 1, "l1/validation": 2.0, "lr/train": 3.0, "l1/train": 2.0}])
    dashboard.scalars(1, {"l1/validation": 4.0, "lr/train": 5.0})
    dashboard.scalars(2, {"l1/train": 6.0})
    blue, orange, green = panes.COLOURS[:3]
    expected = {
        "l1": {
            "train, logs/run_1": (blue, "solid"),
            "validation, logs/run_1": (blue, "dash"),
            "train, first": (orange, "solid"),
            "train, second": (green, "solid"),
            "validation, second": (green, "dash"),
        },
        "lr": {"train, logs/run_1": (blue, "solid"), "train, second": (green, "solid")},
    }

    def styles(window):
        data = fake.sent("/events", f"curves-{window}")[-1]["data"]
        return [(trace["name"], (trace["line"]["color"], trace["line"]["dash"])) for trace in data]

    until(lambda: {window: len(fake.curves().get(window, {})) for window in expected} == {"l1": 5, "lr": 2})
    assert {window: styles(window) for window in expected} == {k: list(v.items()) for k, v in expected.items()}


def test_a_schedule_of_another_run_is_not_smoothed(fake, make):
    dashboard = make(fake)
    dashboard.compare("before", [{"step": s, "lr/train": s % 7 + 1} for s in range(50)])
    put(dashboard, curve(range(1, 5)), "lr/train")
    until(lambda: fake.curves().get("lr", {}).get("train, before") == [(s, s % 7 + 1) for s in range(50)])


def test_what_is_always_0_has_no_pane_unless_it_is_planned(fake, make):
    dashboard = make(fake, plan=["curves-planned", "curves-later"], notes={"curves-later": "from step 9 on"})
    for step in (1, 2):
        dashboard.scalars(step, {"zero/train": 0.0, "zero/validation": 0.0, "planned/train": 0.0, "other": 1.0})
    until(lambda: fake.curves().get("other") == {"other": [(1, 1.0), (2, 1.0)]})
    assert fake.windows() == {"curves-planned", "curves-later", "curves-other"}
    (note,) = fake.sent("/events", "curves-later")[-1]["layout"]["annotations"]
    assert note["text"] == "from step 9 on"
    dashboard.scalars(3, {"zero/train": 0.5})
    until(
        lambda: (
            fake.curves().get("zero") == {"train": [(1, 0.0), (2, 0.0), (3, 0.5)], "validation": [(1, 0.0), (2, 0.0)]}
        )
    )


def test_progress(fake, make):
    dashboard = make(fake)
    dashboard.progress(250, 1000, {"time left": "<b>"})
    until(lambda: fake.sent("/events", "progress"))
    text = fake.sent("/events", "progress")[-1]["data"][0]["content"]
    assert "250 of 1,000 (25%)" in text and "width:25.0%" in text and "&lt;b&gt;" in text and "running" in text
    assert ", until " in panes.time_left(86_400) and panes.time_left(1e7) == "116 days"


@pytest.mark.parametrize("limit", [2, 3, 10, 11])
def test_thinning(limit):
    c = Curve(limit)
    for n in range(1, 500):
        c.add(10 * n, n)
        xs, ys, means = c.take(whole=True, final=False)
        assert len(means) == len(xs)
        assert len(xs) <= limit and xs[-1] == 10 * n and xs[0] == 10
        assert xs == [10 * y for y in ys]
        gaps = {b - a for a, b in zip(xs[:-1], xs[1:-1], strict=False)}
        assert len(gaps) <= 1  # even, but for the newest
        assert n < limit or len(xs) >= limit // 2


def test_a_point_left_out_by_thinning_is_sent_once_and_late():
    c = Curve(4)
    for x in range(6):  # keeps 0, 2, 4
        c.add(x, x)
    assert c.take(whole=False, final=False)[0] == [0, 2, 4]
    assert c.take(whole=False, final=True)[0] == [5]
    assert c.take(whole=False, final=True)[0] == []
    assert c.take(whole=True, final=False)[0] == [0, 2, 4, 5]
    assert c.take(whole=False, final=True)[0] == []


def test_appended_points_stay_bounded_on_the_server(fake, make):
    dashboard = make(fake, max_points=50)
    for start in range(0, 2000, 20):
        put(dashboard, curve(range(start, start + 20)))
        time.sleep(0.003)
    dashboard.close()
    points = fake.curves()["loss"]["loss"]
    assert points[-1] == (1999, math.sqrt(1999)) and points[0] == (0, 0.0)
    assert len(points) <= 2 * 50
    assert points == curve(x for x, _ in points)
    assert [x for x, _ in points] == sorted({x for x, _ in points})


def test_a_step_back_replaces(fake, make):
    dashboard = make(fake)
    put(dashboard, curve(range(20)))
    until(lambda: fake.curves() == {"loss": {"loss": curve(range(20))}})
    put(dashboard, [(15, 7.0), (15, 8.0), (16, 9.0)])
    until(lambda: fake.curves() == {"loss": {"loss": [*curve(range(15)), (15, 8.0), (16, 9.0)]}})


def test_history_then_new_points(fake, make):
    dashboard = make(fake)
    rows = [
        {"step": s, "loss": math.sqrt(s), "note": "x", "flag": True, "lr/a": 0.5, "bad": math.nan} for s in range(200)
    ]
    dashboard.history([{"loss": 3.0}, {"step": None, "loss": 3.0}, *rows])
    put(dashboard, curve(range(200, 230)))
    expected = {"loss": {"loss": curve(range(230))}, "lr": {"a": [(s, 0.5) for s in range(200)]}}
    until(lambda: fake.curves() == expected)


def test_bars_images_and_properties(fake, make):
    dashboard = make(fake)
    dashboard.bars("use", np.arange(3), x=["a", "b", "c"], xlabel="code", ylabel="count")
    dashboard.bars("one", [5])
    dashboard.properties({"<b>name": "a & <script>", "lr": 1e-4})
    image = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    dashboard.image("samples", image, caption="step 7")
    shown = image.copy()
    image[:] = 0  # the caller's buffer is its own
    dashboard.image("untitled", image)
    until(lambda: len(fake.windows()) == 5)
    (use,), (one,) = fake.sent("/events", "bars-use"), fake.sent("/events", "bars-one")
    assert use["data"][0]["x"] == ["a", "b", "c"] and use["data"][0]["y"] == [0, 1, 2] and one["data"][0]["y"] == [5]
    assert use["layout"]["xaxis"]["title"]["text"] == "code" and use["layout"]["yaxis"]["title"]["text"] == "count"
    html = fake.sent("/events", "properties")[-1]["data"][0]["content"]
    assert "&lt;b&gt;name" in html and "a &amp; &lt;script&gt;" in html and "<script" not in html

    def pixels(name):
        content = fake.sent("/events", f"image-{name}")[-1]["data"][0]["content"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content["src"].split(",")[1])))), content

    assert np.array_equal(pixels("samples")[0], shown.transpose(1, 2, 0))
    assert fake.sent("/events", "image-samples")[-1]["opts"]["title"] == "step 7"
    assert fake.sent("/events", "image-untitled")[-1]["opts"]["title"] == "untitled"


def test_only_the_latest_image_is_sent(fake, make):
    fake.mode = "500"
    dashboard = make(fake)
    for value in range(50):
        dashboard.image("samples", np.full((3, 2, 2), value, np.uint8), caption=str(value))
    until(lambda: dashboard.lines)
    fake.mode = "ok"
    until(lambda: fake.sent("/events"))
    (message,) = fake.sent("/events", "image-samples")
    assert message["opts"]["title"] == "49"


def test_wrong_shapes(fake, make):
    dashboard = make(fake)
    for shape in ((4, 4), (4, 4, 3), (1, 4, 4), (3, 0, 4)):
        with pytest.raises(ValueError, match=r"instead of uint8 \(3, H, W\)"):
            dashboard.image("samples", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        dashboard.image("samples", np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="bars"):
        dashboard.bars("use", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="bars"):
        dashboard.bars("use", [1, 2], x=[1])
    with pytest.raises(TypeError):
        dashboard.scalars(1, {"loss": "low"})


def test_close_sends_what_is_left_and_ends(fake, make):
    dashboard = make(fake, interval=60.0)
    thread = dashboard._thread
    time.sleep(0.2)
    put(dashboard, curve(range(10)))
    dashboard.close()
    assert fake.curves() == {"loss": {"loss": curve(range(10))}}
    assert not thread.is_alive()
    count = len(fake.requests)
    put(dashboard, curve(range(10, 20)))
    dashboard.close()
    assert len(fake.requests) == count


def test_close_without_a_server_is_quick(make):
    dashboard = make(free_port(), backoff=(60.0, 60.0))
    until(lambda: dashboard.lines)
    start = time.perf_counter()
    dashboard.close()
    assert time.perf_counter() - start < 1.0
    assert len(dashboard.lines) == 1


def test_disabled_does_nothing():
    before = threading.active_count()
    dashboard = Dashboard("ftp://nonsense", "no port", "run", enabled=False, say=pytest.fail)
    assert threading.active_count() == before
    dashboard.scalars("no step", {"loss": "x"})
    dashboard.history([{"step": 1, "loss": 2.0}])
    dashboard.bars("use", "nothing")
    dashboard.image("samples", None)
    dashboard.properties(None)
    dashboard.close()
    assert not dashboard._plots and not dashboard._panes


def test_threads_lose_nothing(fake, make):
    dashboard = make(fake)
    threads = [threading.Thread(target=put, args=(dashboard, curve(range(1000)), f"w/{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dashboard.close()
    assert fake.curves() == {"w": {f"{i}": curve(range(1000)) for i in range(4)}}


# The real server.

SERVE = "import sys; sys.modules['torch'] = None\nfrom visdom.server.run_server import main; main()"
# main() does not download scripts, unlike the command `visdom`; torch would take seconds.


class RealServer:
    def __init__(self, folder, *options):
        self.folder, self.options, self.port, self.starts = folder, options, free_port(), 0
        (folder / ".visdom").mkdir()

    def start(self):
        self.starts += 1
        arguments = ["-port", str(self.port), "-bind_local", "-env_path", f"{self.folder}/env{self.starts}"]
        login = dict(VISDOM_USE_ENV_CREDENTIALS="1", VISDOM_COOKIE="c", HOME=str(self.folder))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *arguments, *self.options],
            env={**os.environ, **login},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.stop()
        pytest.skip("the visdom server does not start here")

    def stop(self):
        self.process.kill()
        self.process.wait()

    def window(self, win, **login):
        import visdom

        viewer = visdom.Visdom(
            "http://127.0.0.1",
            port=self.port,
            env="logs---run-1",
            use_incoming_socket=False,
            raise_exceptions=True,
            **login,
        )
        try:
            return json.loads(viewer.get_window_data(win))
        except ValueError:
            return None

    def curves(self, win, **login):
        window = self.window(win, **login)
        return window and {trace["name"]: points(trace) for trace in window["content"]["data"] if put_in(trace["name"])}


@pytest.fixture
def real(tmp_path):
    server = RealServer(tmp_path).start()
    yield server
    server.stop()


def test_real_server(real, make):
    dashboard = make(real)
    put(dashboard, curve(range(10)), "loss/train")
    put(dashboard, curve(range(5), math.exp), "loss/validation")
    dashboard.image("samples", np.zeros((3, 8, 8), np.uint8), caption="c")
    dashboard.bars("use", [1, 2])
    dashboard.properties({"a": "<b>"})
    until(lambda: real.window("properties"))
    put(dashboard, curve(range(10, 20)), "loss/train")
    expected = {"train": curve(range(20)), "validation": curve(range(5), math.exp)}
    until(lambda: real.curves("curves-loss") == expected)
    assert real.window("image-samples")["type"] == "image"
    assert real.window("image-samples")["title"] == "c"
    assert real.window("bars-use")["content"]["data"][0]["y"] == [1.0, 2.0]
    assert "&lt;b&gt;" in real.window("properties")["content"]
    assert real.window("curves-loss")["title"] == "loss"

    dashboard._client.close("curves-loss")  # the user closes the window: it returns whole
    put(dashboard, curve(range(20, 150)), "loss/train")
    expected["train"] = curve(range(150))
    until(lambda: real.curves("curves-loss") == expected)
    assert dashboard.lines == []

    real.stop()
    put(dashboard, curve(range(150, 200)), "loss/train")
    until(lambda: dashboard.lines)
    real.start()  # with another folder: it knows nothing
    put(dashboard, curve(range(200, 210)), "loss/train")
    expected["train"] = curve(range(210))
    until(lambda: real.curves("curves-loss") == expected and real.window("properties"))
    until(lambda: len(dashboard.lines) == 2)


def test_real_server_with_login(tmp_path, make, monkeypatch):
    monkeypatch.setenv("VISDOM_USERNAME", "me")
    monkeypatch.setenv("VISDOM_PASSWORD", "secret")
    server = RealServer(tmp_path, "-enable_login").start()
    try:
        dashboard = make(server)
        put(dashboard, curve(range(10)))
        login = dict(username="me", password="secret")
        until(lambda: server.curves("curves-loss", **login) == {"loss": curve(range(10))})
        assert dashboard.lines == []
        monkeypatch.setenv("VISDOM_PASSWORD", "wrong")
        refused = make(server)
        until(lambda: refused.lines)
        assert "VISDOM_PASSWORD" in refused.lines[0]
    finally:
        server.stop()

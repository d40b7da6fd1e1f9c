"""Published weights: fetched from a server on this machine, checked, complete or absent; what messages say of them."""

import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, free_port

from experiments import get_weights
from utils.core.errors import UserError
from utils.evaluation.weight_files import WEIGHT_FILES, fetch, missing

CONTENT = bytes(range(256)) * 1000
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
SENT = {  # folder of the address -> (status, declared length, body)
    "right": (200, len(CONTENT), CONTENT),
    "truncated": (200, len(CONTENT), CONTENT[:-1000]),
    "short": (200, len(CONTENT) - 1000, CONTENT[:-1000]),
    "other": (200, len(CONTENT), CONTENT[::-1]),
    "empty": (200, 0, b""),
    "absent": (404, 5, b"sorry"),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, length, body = SENT[self.path.split("/")[1]]
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    """The address of a server that sends SENT."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def served(server, tmp_path, monkeypatch):
    """served(kind): the 'vgg' weights are now CONTENT, and their address is that of SENT[kind]. Returns their place."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))

    def set_address(kind, address=server):
        weights = replace(WEIGHT_FILES["vgg"], file=f"vgg16-{DIGITS}.pth", folder=f"{address}/{kind}/")
        monkeypatch.setitem(WEIGHT_FILES, "vgg", weights)
        return Path(weights.place)

    return set_address


def test_the_right_file_is_put_in_place_once(served, capsys):
    place = served("right")
    assert "vgg16" in missing("vgg")
    get_weights.main(["vgg"])
    assert place.read_bytes() == CONTENT and os.listdir(place.parent) == [place.name]
    assert missing("vgg") is None
    served("absent")  # is not asked again
    assert fetch("vgg") is False
    get_weights.main(["vgg"])
    assert capsys.readouterr().out.splitlines() == [
        f"VGG16 weights for LPIPS: {done} {place}" for done in ("fetched to", "already at")
    ]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", f"does not begin with {DIGITS}"),
        ("short", f"does not begin with {DIGITS}"),
        ("other", f"does not begin with {DIGITS}"),
        ("empty", f"does not begin with {DIGITS}"),
        ("absent", "HTTP Error 404: Not Found"),
    ],
)
def test_anything_else_leaves_no_file(served, kind, reason):
    place = served(kind)
    with pytest.raises(UserError) as error:
        fetch("vgg")
    assert reason in str(error.value) and WEIGHT_FILES["vgg"].address in str(error.value)
    assert str(error.value).endswith(f"put the file by hand at {place}") and len(str(error.value).splitlines()) == 1
    assert os.listdir(place.parent) == []
    assert missing("vgg")


def test_a_damaged_file_is_replaced_only_by_the_right_one(served):
    place = served("truncated")
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT[:100])
    with pytest.raises(UserError):
        fetch("vgg")
    assert place.read_bytes() == CONTENT[:100]
    served("right")
    assert fetch("vgg") is True and place.read_bytes() == CONTENT


def test_no_server_answers(served):
    place = served("right", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="cannot be fetched .*refused"):
        fetch("vgg")
    assert os.listdir(place.parent) == []


def test_as_a_user_calls_it_without_a_network(tmp_path):
    dead = f"http://127.0.0.1:{free_port()}"
    env = dict(os.environ, TORCH_HOME=str(tmp_path), https_proxy=dead, no_proxy="")
    command = [sys.executable, str(ROOT / "experiments" / "get_weights.py"), "alexnet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith("error: https://download.pytorch.org/models/alexnet-owt-7be5be79.pth cannot be fetched (")
    assert line.endswith(f"put the file by hand at {tmp_path}/hub/checkpoints/alexnet-owt-7be5be79.pth")


@pytest.mark.parametrize(("words", "named"), [([], "name"), (["vg"], "'vg'"), (["vgg", "x"], "x")])
def test_mistakes(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        get_weights.parse(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named in line


def test_all_names_every_file():
    assert set(get_weights.parse(["all"])) == set(WEIGHT_FILES)
    assert get_weights.parse(["inception"]) == ("inception",)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_addresses_places_and_digits(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = WEIGHT_FILES[name]
    assert weights.address.startswith("https://") and weights.address.endswith("/" + weights.file)
    assert weights.place == str(tmp_path / "hub" / "checkpoints" / weights.file)
    assert len(weights.digits) == 8 and int(weights.digits, 16)
    line = missing(name)
    for part in (weights.address, weights.place, f"get_weights.py {name}`", f"--{weights.flag} PATH"):
        assert part in line
    assert missing(name, __file__) is None
    assert missing(name, "/no/such") == f"--{weights.flag} /no/such is not a file"

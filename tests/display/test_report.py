"""A run shown again from what it wrote: the report as a file, the dashboard as a server gets it; hostile files."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scripts import train_stage_1
from test_dashboard import FakeVisdom

from experiments import show_run
from utils.core.errors import printable
from utils.core.files import write_json
from utils.display import report_plots
from utils.display.report import write_report
from utils.display.saved_run import SavedRun, reduced

HOSTILE = "<script>alert(1)</script>\"'&$x^2$\x1b[31m\ud800"


class Page(html.parser.HTMLParser):
    """A page's tags, what its attributes refer to, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.places, self.text = [], [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.places += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action", "poster")]
        assert not any(k.startswith("on") for k, _ in attributes)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes):
    """The folder of a run of 12 steps, with everything that a run can have."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train_stage_1(
            shapes,
            "ae",
            "--train_steps 12 --steps_per_save_output 4 --steps_per_log 1 --steps_per_eval 6 --steps_per_checkpoint 6",
        )
    with open(place / "logs/ae/metrics.jsonl", "w") as f:
        row = dict(
            metric="calc_VQGAN_FID",
            time="2026-01-02T03:04:05",
            values=dict(rfid=12.3456, l1=0.5, l1_se=0.25),
            checkpoints=dict(autoencoder=dict(path="logs/ae/saved_models/vqgan_12.th")),
            feature_files=dict(fake_feats=dict(path="f/fakes.npy", sha256="0", made_by=None)),
        )
        f.write(json.dumps(row) + "\n")
    return place


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of it that may be spoilt; the current folder."""
    shutil.copytree(finished / "logs", tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(log_dir="ae"):
    run = SavedRun(Path("logs") / log_dir)
    return Page(write_report(run)), run


def dashboard(log_dir="ae"):
    """What show_run sends, as the server that got it."""
    server = FakeVisdom()
    try:
        flags = ["--log_dir", log_dir, "--visdom_server", "127.0.0.1", "--visdom_port", str(server.port)]
        show_run.main(show_run.parse(flags))
    finally:
        server.stop()
    return server


def test_the_report_of_a_finished_run(here):
    code = (
        "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch', 'visdom'} & set(sys.modules)"
    )
    flags = [str(ROOT / "experiments/show_run.py"), "--log_dir", "ae", "--no_visdom"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "report: logs/ae/report.html\n", "")
    page = Page("logs/ae/report.html")
    assert all(place.startswith("data:image/") for place in page.places)
    assert "://" not in re.sub(r'"data:[^"]*"', "", Path("logs/ae/report.html").read_text())
    for words in (
        "Stage 1: VQGAN",
        "38 images",
        "'custom'",
        "float32 on cpu",
        "batches of 4",
        "Finished: step 12 of 12",
        "original, reconstruction, difference x 4",
        "reconstructions through training",
        "codebook, step 12: the mean",
        "rfid 12.346",
        "0.5 \u00b1 0.25",
        "vqgan_12.th, fakes.npy",
        "step 6",
        "step 12",
        "codebook_restart_steps",
        "--log_dir ae --resume --train_steps 24",
        "written: checkpoint",
    ):
        assert words in page.text, words
    n_pictures = sum(place.startswith("data:image/png") for place in page.places)
    n_plots = sum(place.startswith("data:image/svg+xml") for place in page.places)
    assert n_pictures == 3 and n_plots == len(SavedRun("logs/ae").traces()) + 1  # the bars
    assert "perceptual" not in SavedRun("logs/ae").traces()  # its weight is 0
    assert not SavedRun("logs/ae").notes and "viewport" in Path("logs/ae/report.html").read_text()
    for path in Path("logs/ae/images").glob("*.png"):
        if path.stem in ("reconstructions_12", "codebook_12", "reconstructions_progress"):
            assert f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" in page.places


def test_curves_of_a_step_that_was_done_twice_and_of_validation(here):
    with open("logs/ae/stats.jsonl", "a") as f:
        f.write('{"step": 12, "images": 48, "loss": 7.0}\n')
    _, run = report()
    traces = run.traces()
    assert traces["loss"]["train"][0] == list(range(1, 13)) and traces["loss"]["train"][1][-1] == 7.0
    assert traces["l1"]["validation"][0] == [6, 12] and "images" not in traces
    assert traces["images_per_second"]["images_per_second"][0] == list(range(1, 13))


def test_damaged_and_missing_files_are_noted(here):
    with open("logs/ae/stats.jsonl", "ab") as f:
        f.write(b'{"step": 13, "loss"\n\xff\xfe\n[1]\n{"loss": 3}\n{"step": 1e400, "loss": 1}\n' + b"[" * 5000 + b"\n")
        f.write(b'{"step": 14, "loss": NaN, "l1": 1' + b"0" * 400 + b', "nll_loss": true}\n')
    Path("logs/ae/bars.json").write_text('{"a": [1')
    Path("logs/ae/config.json").write_text("[]")
    Path("logs/ae/images/reconstructions_12.png").write_bytes(b"\x89PNG")
    os.mkfifo("logs/ae/images/codebook_99.png")  # opening it would block
    os.mkfifo("logs/ae/images/other.png")
    page, run = report()
    text = " ".join(run.notes)
    assert "6 damaged lines of stats.jsonl" in text and "bars.json is damaged" in text
    assert "reconstructions_12.png cannot be shown" in text
    assert "codebook, step 12" in page.text
    assert all(note in page.text for note in run.notes)
    assert run.rows[-1]["step"] == 14 and run.traces()["loss"]["train"][0][-1] == 12
    os.unlink("logs/ae/log.txt")
    os.mkfifo("logs/ae/log.txt")
    for name in ("stats.jsonl", "speed.jsonl", "metrics.jsonl", "log.txt", "config.json", "bars.json"):
        Path("logs/ae", name).unlink()
    page, run = report()
    assert "step 12" in page.text and "Curves" not in page.text  # the checkpoints are still there


@pytest.mark.parametrize("depth", [25, 600, 100_000])
def test_values_nested_deeply_are_passed_over(here, capsys, depth):
    text = "[" * depth + "]" * depth
    Path("logs/ae/config.json").write_text(f'{{"script": "train_vqgan", "hparams": {{"lr": {text}}}}}')
    Path("logs/ae/bars.json").write_text(f'{{"x": {{"step": 1, "values": [1], "more": {text}}}}}')
    for name, more in (("metrics.jsonl", '"values": {"rfid": 99, "b": '), ("stats.jsonl", '"step": 99, "b": {"c": ')):
        with open(Path("logs/ae", name), "a") as f:
            f.write(f"{{{more}{text}}}}}\n")
    show_run.main(show_run.parse(["--log_dir", "ae", "--visdom_port", "1"]))
    page, run = Page("logs/ae/report.html"), SavedRun("logs/ae")
    assert len(run.notes) == 4 and all(note in page.text for note in run.notes)
    for name in ("config.json", "bars.json"):
        assert f"logs/ae/{name} is damaged: not readable as JSON (a value is nested more than 20 levels" in page.text
    assert "12.346" in page.text and "99" not in page.text.replace("0.99", "")


def test_a_page_shows_a_bounded_number_of_curves_bars_and_pictures(here, monkeypatch):
    for name, most in (("MOST_CURVES", 5), ("MOST_BARS", 3), ("MOST_PICTURES", 4)):
        monkeypatch.setattr(f"utils.display.saved_run.{name}", most)
    for path in Path("logs/ae/images").iterdir():
        path.unlink()
    for i in range(6):
        for name in (f"series{i}_1.png", f"other{i}.png"):
            Image.new("RGB", (8, 8)).save(Path("logs/ae/images", name))
    names = [f"a{i}" for i in range(20)] + [f"b/{i}" for i in range(20)]
    Path("logs/ae/stats.jsonl").write_text(json.dumps(dict(dict.fromkeys(names, 1.0), step=1)) + "\n")
    Path("logs/ae/speed.jsonl").unlink()
    write_json("logs/ae/bars.json", {name: dict(step=1, values=[1.0]) for name in names})
    page, run = report()
    assert sum(place.startswith("data:image/svg+xml") for place in page.places) == 5 + 3
    assert sum(place.startswith("data:image/png") for place in page.places) == 4 + 4
    for note in ("the first 5 of 40 curves", "the first 3 of 40 bar plots", "of 6 series of pictures", "of 6 more pic"):
        assert note in page.text
    assert len({w for w in dashboard().windows() if w.startswith(("curves-", "bars-"))} - {"curves-loss"}) == 5 + 3


def test_links_in_a_run_are_not_followed(here):
    """The page could otherwise carry a private file to whoever sent the folder."""
    Path("private").write_text('{"step": 9, "loss": 987.0, "hparams": {"key": 987}, "values": {"key": 987}}\n')
    Image.new("RGB", (8, 8)).save("private.png")
    names = ("config.json", "stats.jsonl", "speed.jsonl", "metrics.jsonl", "bars.json", "log.txt")
    for name in (*names, "images/reconstructions_99.png", "images/private.png"):
        path = Path("logs/ae", name)
        path.unlink(missing_ok=True)
        path.symlink_to(here / ("private.png" if name.endswith("png") else "private"))
    private = base64.b64encode(Path("private.png").read_bytes()).decode()
    page, run = report()
    assert "987" not in page.text and not any(private in place for place in page.places)
    assert all(f"{name} is a symbolic link; it is passed over" in page.text for name in names)
    assert "step 12" in page.text


def test_the_newest_of_many_checkpoints_are_listed(here):
    for step in range(20, 60):
        Path(f"logs/ae/saved_models/manifest_{step}.json").symlink_to("missing")
    page, run = report()
    assert "The newest 12 of 42." in page.text and "step 59" in page.text and "step 47" not in page.text


def test_texts_of_any_length_make_a_small_page(here):
    with open("logs/ae/log.txt", "a") as f:
        f.write("x" * 10**7 + "\n" + "the last\n")
    with open("logs/ae/stats.jsonl", "a") as f:
        f.write("1" * 3 * 2**20 + "\n" + json.dumps({"step": 13, "y" * 10**5: 1.0}) + "\n")
    write_json("logs/ae/bars.json", {"n": dict(step=1, values=[1.0] * 1000, x=["w" * 1000] * 1000)})
    size = os.path.getsize(write_report(SavedRun("logs/ae")))
    page, run = report()
    assert size < 2**21 and "the last" in page.text
    assert "3 damaged lines of stats.jsonl" in " ".join(run.notes) and run.rows[-1]["step"] == 13
    assert all(len(note) < 200 for note in run.notes)


def test_numbers_of_any_size_make_a_page(here):
    config = json.loads(Path("logs/ae/config.json").read_text())
    config["hparams"].update(batch_size=10**300, train_steps=10**300)
    write_json("logs/ae/config.json", config)
    with open("logs/ae/speed.jsonl", "a") as f:
        f.write(json.dumps(dict(step=10**300, images_per_second=5e-324)) + "\n")
    page, _ = report()
    assert "Not finished: step 12 of 1,000," in page.text


def test_an_empty_run_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("logs/nothing").mkdir(parents=True)
    page, run = report("nothing")
    assert "Nothing is written yet" in page.text and not page.places and not run.notes


def test_the_report_of_an_experiment_shows_hyperparameters_of_the_model_only(here):
    args = dict(lr=3e-3, train_steps=40, batch_size=20, amp=False, steps_per_eval=0)
    Path("logs/samples").mkdir(parents=True)
    Path("logs/samples/metrics.jsonl").write_text(json.dumps(dict(metric="get_samples", values={}, args=args)) + "\n")
    assert report("samples")[1].arguments() == dict(lr=3e-3, train_steps=40)


def test_names_of_anything_run_nothing(here, capsys):
    values = {HOSTILE: 1.0, "val_</svg>": 2.0}
    with open("logs/ae/stats.jsonl", "a") as f:
        f.write(json.dumps(dict(step=13, **values)) + "\n" + json.dumps(dict(step=14, big=1e308, small=-1e308)) + "\n")
    with open("logs/ae/metrics.jsonl", "a") as f:
        row = dict(metric=HOSTILE, time=[HOSTILE], values={HOSTILE: HOSTILE, "n": None}, checkpoints=[HOSTILE])
        f.write(json.dumps(row) + "\n" + json.dumps(dict(metric="x", values=3)) + "\n")
    config = json.loads(Path("logs/ae/config.json").read_text())
    config["hparams"].update({HOSTILE: HOSTILE, "dataset": HOSTILE, "batch_size": {"a": [HOSTILE]}, "train_steps": "x"})
    config["facts"] = dict(config["facts"], device=HOSTILE, precision=[HOSTILE])
    write_json("logs/ae/config.json", config)
    bars = {
        HOSTILE: dict(step=1, values=[1, None, 3], x=[HOSTILE, "b", 2], xlabel=HOSTILE, ylabel=None),
        "wrong": dict(step=1, values=["x"]),
        "short": dict(step=1, values=[1], x=[1, 2]),
        "no": 3,
    }
    write_json("logs/ae/bars.json", bars)
    with open("logs/ae/log.txt", "a", errors="surrogatepass") as f:
        f.write(HOSTILE + "\n")
    picture = Image.new("RGB", (8, 8))
    picture.save("logs/ae/images/<img src=x onerror=alert(1)>_5.png")
    page, run = report()
    assert set(page.tags) <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "p",
        "h1",
        "h2",
        "ul",
        "li",
        "b",
        "span",
        "div",
        "section",
        "figure",
        "img",
        "figcaption",
        "table",
        "tr",
        "td",
        "th",
        "pre",
        "dl",
        "dt",
        "dd",
        "details",
        "summary",
        "footer",
    }
    assert all(place.startswith("data:image/") for place in page.places) and "alert(1)" in page.text
    assert "\x1b" not in page.text
    assert list(run.bars) == [printable(HOSTILE)]
    os.rename("logs/ae/images/<img src=x onerror=alert(1)>_5.png", b"logs/ae/images/\xff_5.png")
    name = printable(HOSTILE)  # the server fails at names that are not Unicode, as visdom's does
    assert {f"curves-{name.partition('/')[0]}", f"bars-{name}", "image-\\udcff"} <= dashboard().windows()
    assert "dashboard: http://" in capsys.readouterr().out
    svg = report_plots.bars("<b>", [1.0, 2.0], ["<i>&", "$\\frac{$"])
    assert "<b>" not in svg and "&lt;b&gt;" in svg


def test_the_whole_dashboard_is_sent_again(here, capsys):
    server = dashboard()
    curves, windows = server.curves(), server.windows()
    out = capsys.readouterr().out.splitlines()
    assert out == [f"dashboard: http://127.0.0.1:{server.port}/env/ae", "report: logs/ae/report.html"]
    assert curves["loss"]["train"] == [(row["step"], row["loss"]) for row in SavedRun("logs/ae").rows if "loss" in row]
    assert [x for x, _ in curves["l1"]["validation"]] == [6, 12] and "images_per_second" in curves
    assert {
        "bars-codebook_usage",
        "image-reconstructions",
        "image-reconstructions_progress",
        "image-codebook",
        "properties",
        "results",
    } <= windows
    assert "12.346" in server.sent("/events", "results")[-1]["data"][0]["content"]


def test_without_a_server_one_line_says_so(here, capsys):
    show_run.main(show_run.parse(["--log_dir", "ae", "--visdom_port", "1"]))
    first, second = capsys.readouterr().out.splitlines()
    assert "no visdom server answers" in first
    assert second == "report: logs/ae/report.html"


def test_long_curves_are_thinned_and_smoothed():
    noise = np.random.default_rng(0).normal(size=10**4).tolist()
    for name, n_lines in (("l1", 2), ("lr", 1)):
        svg = report_plots.curves(name, {"train": (range(10**4), noise)})
        paths = re.findall('<path d="([^"]*)" clip-path', svg)
        sizes = [path.count("L") for path in paths if path.count("L") > 1]  # the others are the grid
        assert len(sizes) == n_lines and all(500 < size < report_plots.MOST_POINTS for size in sizes)


def test_validation_is_dashed_in_the_colour_of_the_run():
    svg = report_plots.curves("l1", {"validation": ([1, 2], [1.0, 2.0]), "train": ([1, 2], [3.0, 4.0])})
    train, validation = re.findall('<path d="[^"]*" clip-path[^>]*style="([^"]*)"', svg)[-2:]
    colours = [re.search("stroke: (#[0-9a-f]*)", style)[1] for style in (train, validation)]
    assert colours[0] == colours[1]
    assert "stroke-dasharray" in validation and "stroke-dasharray" not in train


def test_large_pictures_are_reduced(here):
    Image.effect_noise((3000, 1500), 99).save("logs/ae/images/big_1.png")
    (picture,) = [p for p in SavedRun("logs/ae").pictures() if p.name == "big"]
    assert reduced(SavedRun("logs/ae").open(picture)).size == (1600, 800)
    page, _ = report()
    (source,) = [place for place in page.places if place.startswith("data:image/jpeg;base64,")]
    content = base64.b64decode(source.partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (1600, 800) and len(content) < 3 << 20

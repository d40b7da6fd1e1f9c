"""What users see of a run: its lines, its pictures, commands to paste, samples while they are drawn."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, ROOT, TINY_SAMPLER, words
from PIL import Image
from scripts import experiment, prior_flags, sampler_flags, train_stage_1, vqgan_flags

import train_vqgan
from experiments import get_samples
from experiments.common.pictures import GREY, CodeMeans, decode_canvas, states_of_sampling
from experiments.common.weights import load_autoencoder
from hparams import get_hparams
from models.build import build_sampler
from utils.core import progress
from utils.core.errors import UserError
from utils.core.seed import sample_uniforms
from utils.data.pixels import to_uint8
from utils.display import commands
from utils.display.grids import Grid, labelled, progress_strip, read_cells, write_gif, write_strips
from utils.display.images import save_png, sheet, sheet_grid
from utils.display.run_files import pictures_by_step, read_bars
from utils.evaluation.weight_files import WEIGHT_FILES
from utils.training.amp import Precision

CPU = torch.device("cpu")


def flat(value, n=3, size=8):
    """n images of one grey."""
    return torch.full((n, 3, size, size), value, dtype=torch.uint8)


def save_sheet(folder, name, images, **layout):
    save_png(folder / name, sheet(images, **layout), 64, sheet_grid(images, **layout))


# ---------------------------------------------------------------------- sheets and strips


@pytest.mark.parametrize("layout", [{}, dict(n_columns=2, padding=1), dict(n_columns=6, group=3, gap=5)], ids=str)
def test_a_saved_sheet_is_read_back_image_by_image(tmp_path, layout):
    images = torch.randint(0, 256, (9, 3, 4, 6), dtype=torch.uint8)
    save_sheet(tmp_path, "a.png", images, **layout)
    cells = [cell for group in read_cells(tmp_path / "a.png", 9) for cell in group]
    assert len(cells) == 9 and len(read_cells(tmp_path / "a.png", 2)) == 2
    for image, cell in zip(images, cells, strict=True):
        factor = cell.size[0] // 6
        assert factor > 1
        assert np.array_equal(np.asarray(cell)[::factor, ::factor], image.permute(1, 2, 0))


def test_a_strip_has_a_row_for_each_step_and_leaves_out_what_is_damaged(tmp_path):
    for step, value in ((1, 10), (5, 90), (20, 170), (100, 250)):
        save_sheet(tmp_path, f"samples_{step}.png", flat(value))
    (tmp_path / "samples_5.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    # An earlier version wrote this sheet without the positions of its images.
    save_png(tmp_path / "samples_30.png", sheet(flat(0)))
    said = []
    (path,) = write_strips(str(tmp_path), said.append)
    assert path == str(tmp_path / "samples_progress.png")
    assert len(said) == 1 and "samples_5.png is left out" in said[0]
    with Image.open(path) as strip:
        column = np.asarray(strip.convert("L"))[:, -40]  # through the last images
    values, lengths = np.unique(column[column < 255], return_counts=True)
    assert values.tolist() == [10, 170, 250] and len(set(lengths)) == 1
    assert column.tolist().index(10) < column.tolist().index(250)
    assert write_strips(str(tmp_path), said.append) == [path]  # it does not take itself for a picture


def test_a_strip_of_comparisons_begins_with_the_originals(tmp_path):
    for step, value in ((2, 50), (4, 100)):
        images = torch.stack([flat(0), flat(value), flat(200)], 1).flatten(0, 1)
        save_sheet(tmp_path, f"r_{step}.png", images, n_columns=9, group=3)
    strip = np.asarray(progress_strip(pictures_by_step(str(tmp_path))["r"], print).convert("L"))
    assert np.unique(strip[:, -40][strip[:, -40] < 255]).tolist() == [0, 50, 100]


def test_one_step_makes_no_strip_and_parts_are_no_pictures(tmp_path):
    save_sheet(tmp_path, "samples_5.png", flat(1))
    (tmp_path / "samples_5_0.png").write_bytes(b"")
    assert write_strips(str(tmp_path), print) == []
    assert pictures_by_step(str(tmp_path)) == {"samples": [(5, str(tmp_path / "samples_5.png"))]}
    assert pictures_by_step(str(tmp_path / "nowhere")) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"count": -1}', "[" * 10000, None])
def test_a_grid_that_is_not_the_pictures_own_is_refused(tmp_path, text):
    image = Image.new("RGB", (32, 32))
    image.info["grid"] = (
        text
        if text is not None
        else '{"count": 1, "height": 5, "width": 5, "columns": 1, "padding": 0, "group": 1, "gap": 0}'
    )
    with pytest.raises((ValueError, RecursionError)):
        Grid.of(image)


def test_labels_and_animations(tmp_path):
    frames = [Image.new("RGB", (64, 64), (v, v, v)) for v in (0, 128, 255)]
    picture = labelled([frames, frames], ["one", "another"], ["a", "b", "c"])
    assert picture.size[1] > 128 and picture.getpixel((picture.size[0] - 68 - 30, picture.size[1] - 30))[0] == 128
    write_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)
        gif.seek(1)
        assert abs(gif.convert("L").getpixel((9, 9)) - 128) <= 2


# ---------------------------------------------------------------------- what a sample is made of


def sampler_of(name, sample_type="diffusion"):
    given = dict(
        sampler=name,
        codebook_size=11,
        block_size=12,
        bert_n_emb=16,
        bert_n_head=2,
        bert_n_layers=1,
        total_steps=9,
        sample_steps=9,
        loss_type="elbo",
        sample_type=sample_type,
        latent_shape=[1, 3, 4],
    )
    torch.manual_seed(0)
    return build_sampler(SimpleNamespace(**{**DEFAULTS, **given})).eval()


def test_the_canvases_are_those_that_the_network_saw():
    sampler = sampler_of("absorbing")
    u = sample_uniforms(3, [0], sampler.draws_per_sample())
    seen = []
    hook = sampler._denoise_fn.register_forward_pre_hook(lambda net, args: seen.append(args[0][0].clone()))
    ids = sampler.sample(u, 1.0)
    hook.remove()
    share = sampler.revealed_at(ids, u)[0]
    assert len(seen) > 3
    for canvas in seen:
        known = canvas != sampler.mask_id
        assert torch.equal(canvas[known], ids[0][known])
        assert not known.any() or torch.equal(known, share <= share[known].max())
    assert sorted({round(float(s) * sampler.S) for s in share}) == sorted(
        {sampler.S - int(r * sampler.S) for r in u[0, 0]}
    )


@pytest.mark.parametrize("name", ["absorbing", "autoregressive"])
def test_canvases_go_from_nothing_to_the_sample(name):
    sampler = sampler_of(name)
    u = sample_uniforms(0, range(4), sampler.draws_per_sample())
    ids = sampler.sample(u, 1.0)
    states = states_of_sampling(sampler, u, ids, 8, 1.0)
    assert states.shape == (8, 4, 12)
    assert (states[0] == sampler.mask_id).all() and torch.equal(states[-1], ids)
    known = states != sampler.mask_id
    assert (known[1:] >= known[:-1]).all() and (known.sum((1, 2))[1:-1] % 48 > 0).all()
    if name == "autoregressive":
        assert known[4].sum(1).tolist() == [int(12 * 4 / 7)] * 4
        assert (known[..., :-1] >= known[..., 1:]).all()


def test_masked_language_modelling_has_no_steps_to_show():
    sampler = sampler_of("absorbing", "mlm")
    u = sample_uniforms(0, [0], sampler.draws_per_sample())
    with pytest.raises(UserError, match="no steps"):
        sampler.revealed_at(sampler.sample(u), u)


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_show_steps(trained, shapes, monkeypatch, sampler, capsys):
    monkeypatch.chdir(trained)
    flags = prior_flags(shapes, f"steps_{sampler}", "--n_sheets 1 --show_steps", sampler)
    get_samples.main(experiment(get_samples, flags))
    images = Path(f"logs/steps_{sampler}/images")
    with Image.open(images / "denoising_0.png") as strip, Image.open(images / "denoising_0.gif") as gif:
        assert strip.size[0] > 8 * 64 and strip.size[1] > 5 * 64
        assert gif.n_frames == 8
        first = np.asarray(gif.convert("L"))
        gif.seek(7)
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert np.bincount(first[first < 250]).argmax() == round(255 * GREY)
    with Image.open(images / "samples_0-24.png") as samples:
        drawn = np.asarray(samples).astype(int)
    assert last.shape == drawn.shape and np.abs(last - drawn).mean() < 8  # a GIF has 256 colours
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"written: logs/steps_{sampler}/metrics.jsonl and logs/steps_{sampler}/images"


def test_a_canvas_is_grey_where_it_is_masked_and_as_decoded_elsewhere(trained, shapes, monkeypatch):
    monkeypatch.chdir(trained)
    H = experiment(get_samples, prior_flags(shapes, "x"))
    ae = load_autoencoder(H, CPU).model
    ids = torch.arange(16)[None]
    plain = Precision(False, "auto", CPU)
    whole = decode_canvas(ae, ids, 16, (4, 4), plain)
    with torch.no_grad():
        assert torch.equal(whole, to_uint8(ae.decode(ids, 4, 4)))
    part = decode_canvas(ae, ids.masked_fill(ids % 4 == 1, 16), 16, (4, 4), plain)
    assert (part[..., 4:8] == round(255 * GREY)).all() and not torch.equal(part[..., :4], part[..., 4:8])


def test_what_codes_stand_for():
    x = torch.zeros(2, 3, 4, 4)
    x[0, :, :, 2:], x[1] = 1.0, 0.5
    means = CodeMeans(5, 3, 2, CPU)
    means.add(x, torch.tensor([[0, 1, 0, 1], [4, 4, 4, 4]]))
    assert means.counts.tolist() == [2, 2, 0, 0, 4]
    picture = means.sheet()[0]  # in order 4, 0, 1, then those without use; 4 x 4 pixels around each 2 x 2 cell
    assert picture[1:5, 1:5].unique().tolist() == [128]
    assert picture[1:5, 6:10].tolist() == [[0, 0, 0, 255]] * 4
    assert picture[1:5, 11:15].tolist() == [[0, 255, 255, 255]] * 4
    assert picture[6:10, 1:10].unique().tolist() == [200, 255]
    assert "3 of 5 used" in means.caption()


# ---------------------------------------------------------------------- words


def test_a_forecast_is_made_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 0.0)
    forecast, said = progress.Forecast(1021), []
    for step in range(1, 60):
        now[0] += 100.0 if step == 1 else 0.5  # the first step is no measure
        said.append(forecast.text(step))
    assert [i + 1 for i, text in enumerate(said) if text] == [21]
    assert said[20].startswith("0.5 s per step: 8.3 min to step 1021 (1970-01-01 ")
    slow, said = progress.Forecast(10**12), []
    for step in range(1, 5):
        now[0] += 31.0
        said.append(slow.text(step))
    assert said[1].endswith("days to step 1000000000000 (in decades)") and said.count(None) == 3
    assert forecast.left == 500.0 and slow.left > 3650 * 86400
    soon = progress.Forecast(25)
    for step in range(1, 25):
        now[0] += 0.1
        assert soon.text(step) is None  # by the time it is read it is over


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0213, "0.021 s"),
        (5.2, "5.2 s"),
        (45, "45 s"),
        (89, "89 s"),
        (200, "3.3 min"),
        (3000, "50 min"),
        (12600, "3.5 h"),
        (4 * 86400, "4 days"),
        (10**9, "11574 days"),
    ],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words


def test_without_a_terminal_lines_become_rarer(monkeypatch, capsys):
    now, when = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "say", lambda line: when.append(now[0]))
    with progress.Progress(10**6, "run", "step") as bar:
        for _ in range(36_000):  # ten hours
            now[0] += 1.0
            bar.update(1)
        assert when[:3] == [15, 30, 45] and 100 < len(when) < 220
        assert when[-1] - when[-2] == 300


SCREEN = """
import sys, time
sys.path.insert(0, sys.argv[1])
from utils.core.progress import Progress, say
say("before")
with Progress(4, "run", "step") as bar:
    for i in range(4):
        time.sleep(0.25)
        say(f"line {i}")
        bar.update(1, {"loss": 0.5, "img/s": 12.5})
say("after")
"""


def shown_by(output):
    """The lines that a terminal shows of what was written to it."""
    lines, row, column = [[]], 0, 0
    for token in re.findall(r"\x1b\[A|\x1b\[\d*K|[^\x1b]|\x1b.", output):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        elif token == "\r":
            column = 0
        elif token == "\x1b[A":
            row -= 1
        else:
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines]


def test_lines_do_not_break_the_bar():
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", SCREEN, str(ROOT)],
        stdout=slave,
        stderr=slave,
        env=dict(os.environ, PYTHONIOENCODING="utf-8"),
    )
    os.close(slave)
    output = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # as Linux ends it
            break
        if not piece:
            break
        output += piece
    os.close(master)
    assert process.wait(60) == 0
    lines = [line for line in shown_by(output.decode()) if line]
    assert lines[:5] == ["before", "line 0", "line 1", "line 2", "line 3"] and lines[-1] == "after"
    (bar,) = lines[5:-1] or [""]
    assert re.fullmatch(r"run 4/4 100% \|.*\| 00:0\d<00:00, loss 0.5, img/s 12.5", bar)


# ---------------------------------------------------------------------- commands


def test_commands_are_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = commands.command("train_vqgan.py", log_dir="a b'; rm", lr=0.0, amp=True, ema=False, x=None, dataset="-y")
    assert shlex.split(text) == [
        commands.python(),
        str(ROOT / "train_vqgan.py"),
        "--log_dir",
        "a b'; rm",
        "--lr",
        "0.0",
        "--amp",
        "--dataset=-y",
    ]
    monkeypatch.chdir(ROOT)
    assert shlex.split(commands.command("train_vqgan.py"))[1] == "train_vqgan.py"
    assert commands.resume("rm", {}) is None
    assert commands.resume("train_vqgan", dict(dataset="x", log_dir="y")).endswith("--dataset x --log_dir y --resume")


@pytest.mark.parametrize(
    ("flags", "shows"),
    [("", True), ("--sample_order confidence", True), ("--remask_eta 0.1", False), ("--sample_type mlm", False)],
)
def test_the_command_after_stage_2_is_not_refused(trained, shapes, monkeypatch, flags, shows):
    """Samples whose codes are drawn more than once have no --show_steps."""
    monkeypatch.chdir(trained)
    H = get_hparams("sampler", "", sampler_flags(shapes, "prior", "ae", 4, flags), script="train_sampler")
    words = shlex.split(commands.after_sampler(H, 3, 40)[0].split("get_samples.py ")[1])
    assert experiment(get_samples, words).show_steps == shows


def test_commands_of_several_processes_begin_with_torchrun(tmp_path, monkeypatch):
    for name in ("python", "torchrun"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.chdir(ROOT)
    start = "torchrun --standalone --nproc_per_node 4 train_vqgan.py "
    assert commands.resume("train_vqgan", dict(dataset="x", log_dir="y")) == f"{start}--dataset x --log_dir y --resume"
    assert commands.show_run("y") == "python experiments/show_run.py --log_dir y --no_visdom"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "first")
    several = "torchrun --nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint first:29500 train_vqgan.py"
    assert commands.command("train_vqgan.py") == several
    (tmp_path / "torchrun").unlink()
    assert commands.command("train_vqgan.py").startswith("python -m torch.distributed.run --nnodes 2 ")


def test_commands_name_paths_on_another_drive(monkeypatch):
    def relpath(path):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")  # as Windows

    monkeypatch.setattr(commands.os.path, "relpath", relpath)
    assert shlex.split(commands.command("train_vqgan.py"))[1] == str(ROOT / "train_vqgan.py")


def test_a_new_name_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.new_name("a") == "a"
    (tmp_path / "logs" / "a").mkdir(parents=True)
    (tmp_path / "logs" / "a_2").mkdir()
    assert commands.new_name("a") == "a_3"


def following(text, what):
    """The words of the command that a run's last lines offer."""
    (line,) = re.findall(rf"^next, {what}:\n  (.*)$", text, re.MULTILINE)
    return shlex.split(line)


def called(words, cwd):
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_a_run_offers_next_can_be_pasted(tmp_path, shapes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    images = tmp_path / "with a blank"
    images.symlink_to(shapes)
    flags = [*vqgan_flags(images, "my run"), *words("--train_steps 3 --steps_per_save_output 1")]
    train_vqgan.train(get_hparams("vqgan", "", flags, script="train_vqgan"))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "40 images of 'custom', batch 4, float32 on cpu" in lines[0]
    assert lines[1] == "writing to logs/my run"
    assert "written: checkpoint of step 3 in logs/my run/saved_models; codebook, reconstructions in" in out
    stage_2 = following(out, "a prior over these codes")
    assert stage_2[stage_2.index("--train_steps") + 1] == "3", "as stage 1, since its preset has no number"
    stage_2 += [*TINY_SAMPLER, "--train_steps", "2"]
    out = called(stage_2, tmp_path)
    assert "absorbing: " in out
    assert following(out, "the weights that their FID needs")[1:] == [f"{ROOT}/experiments/get_weights.py", "inception"]
    distance = following(out, "their distance to the images, with a network that is installed")
    assert distance[1] == f"{ROOT}/experiments/calc_FID.py" and distance[-2:] == ["--extractor", "efficientnet_lite0"]
    assert out.count("calc_FID") == 1, "with Inception it cannot run without them"
    called(following(out, "samples"), tmp_path)
    place = Path(WEIGHT_FILES["inception"].place)
    place.parent.mkdir(parents=True)
    place.touch()
    again = called([*stage_2, "--resume", "--train_steps", "3"], tmp_path)
    fid = following(again, "their FID")
    assert f"{ROOT}/experiments/calc_FID.py" in fid and "--extractor" not in fid
    assert (tmp_path / "logs" / "my run_absorbing_samples" / "images" / "denoising_0.gif").is_file()


def test_pictures_and_bars_of_a_run(tmp_path, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "ae", "--train_steps 21 --steps_per_save_output 7")
    images = Path("logs/ae/images")
    assert sorted(p.name for p in images.iterdir()) == [
        "codebook_21.png",
        "reconstructions_14.png",
        "reconstructions_21.png",
        "reconstructions_7.png",
        "reconstructions_progress.png",
    ]
    usage = read_bars("logs/ae/bars.json")["codebook_usage"]
    assert usage["step"] == 20 and len(usage["values"]) == 16 and sum(usage["values"]) == 10 * 4 * 16
    first = read_cells(images / "reconstructions_21.png")[0]
    original, recon, difference = (np.asarray(cell).astype(int) for cell in first)
    assert np.array_equal(difference, np.minimum(255, 4 * abs(original - recon)))

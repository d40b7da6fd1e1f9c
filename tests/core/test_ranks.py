"""Several processes of one job compute what one process computes: both stages, resumed runs, every experiment.

The processes are forked (tests/ranks.py); tests/test_torchrun.py has them started by PyTorch's launcher.
"""

import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import draw_shapes
from ranks import together
from scripts import experiment, prior_flags, train_stage_1, train_stage_2, vqgan_flags
from test_metrics import SmallExtractor

from experiments import (
    calc_approximate_ELBO,
    calc_FID,
    calc_nearest_neighbours,
    calc_PRDC,
    calc_VQGAN_FID,
    edit_images,
    generate_big_samples,
    get_samples,
    sweep_sampling,
)
from hparams import get_hparams
from models.build import build_vqgan
from models.quantizers import QUANTIZERS
from utils.core import checkpoint, distributed
from utils.core.files import load_tensors
from utils.evaluation import features

LAST = 20
# Two channels a group (--nf 64): of one channel a group norm takes any bias away again, whose gradient is then
# rounding noise, which Adam makes steps of. An adaptive weight below its maximum; a rate at which rounding does not
# grow to other codes.
STAGE_1 = (
    f"--train_steps {LAST} --batch_size 6 --img_size 8 --ch_mult 1 1 --nf 64 --lr 5e-5 --disc_start_step 4 "
    "--disc_weight_max 1e4 --diff_aug --horizontal_flip --ema --steps_per_update_ema 2 --steps_per_log 5 "
    "--steps_per_eval 10 --steps_per_checkpoint 0"
)
CALM = "--lr 3e-5"  # rounding grows less: a latent between two codes stays with its code
PLACED = "--codebook_init kmeans --codebook_init_step 3 --codebook_restart_steps 4"
STAGE_2 = (
    f"--train_steps {LAST} --batch_size 6 --lr 1e-4 --ema --steps_per_update_ema 2 --steps_per_log 5 "
    "--steps_per_eval 10 --steps_per_checkpoint 0 --horizontal_flip"
)
# Softmax ignores a constant added to all keys: the exact gradient is zero, and only rounding errors remain.
WITHOUT_GRADIENT = re.compile(r"\.(k|key)\.bias$")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(name):
    return [json.loads(line) for line in Path("logs", name, "stats.jsonl").read_text().splitlines()]


def difference(one, other, start=None):
    """The largest difference of the weights (averages among them) of two runs after their last step; with start
    (a state dict), also how far the first has moved from there."""
    worst, moved = 0.0, 0.0
    names = [p.name for p in Path("logs", one, "saved_models").glob(f"*_{LAST}.th") if "optim" not in p.name]
    assert names
    for name in names:
        a, b = (load_tensors(Path("logs", run, "saved_models", name)) for run in (one, other))
        assert a.keys() == b.keys()
        for key in a:
            if not WITHOUT_GRADIENT.search(key):
                worst = max(worst, float((a[key].double() - b[key].double()).abs().max()))
                if start is not None:
                    moved = max(moved, float((a[key].double() - start[key].double()).abs().max()))
    return worst, moved


def assert_same_curves(one, other):
    """The same rows of stats.jsonl, to rounding: means, validation, use of the codebook."""
    first, second = rows_of(one), rows_of(other)
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def assert_equal_runs(one, other, start=None):
    worst, moved = difference(one, other, start)
    assert worst <= 1e-5
    assert start is None or moved > 5e-4, "there is nothing to compare"
    assert_same_curves(one, other)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "more,jobs",
    [
        ("", [(2, 1), (3, 1), (1, 3)]),
        *((f"--quantizer {name} {CALM}", [(2, 3)]) for name in QUANTIZERS if name != "nearest"),
        ("--disc_warmup_steps 2 --disc_ramp_steps 6 --lecam_weight 0.1", [(2, 1)]),
        *((f"--quantizer {name} {PLACED}", [(2, 1)]) for name in ("nearest", "ema")),
    ],
)
def test_stage_1_equals_one_process(here, shapes, more, jobs):
    """jobs: numbers of (processes, parts of --accumulate_steps)."""
    together(1, lambda: train_stage_1(shapes, "one", f"{STAGE_1} {more}"), here)
    assert max(row.get("d_weight", 0) for row in rows_of("one")) < 1e4
    torch.manual_seed(1)
    start = build_vqgan(get_hparams("vqgan", "", vqgan_flags(shapes, "x", f"{STAGE_1} {more}"))).state_dict()
    for processes, parts in jobs:
        name = f"job_{processes}_{parts}"
        flags = f"{STAGE_1} {more} --accumulate_steps {parts}"
        together(processes, partial(train_stage_1, shapes, name, flags), here)
        assert_equal_runs("one", name, start)


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_stage_2_equals_one_process(here, shapes, trained, sampler):
    Path("logs").mkdir()
    Path("logs/ae").symlink_to(trained / "logs" / "ae")

    def train(processes, name, more=""):
        text = together(
            processes, lambda: train_stage_2(shapes, name, "ae", 4, f"{STAGE_2} {more}", sampler=sampler), here
        )[0]
        shutil.rmtree("latents")
        return text

    train(1, "one")
    for processes, parts in [(2, 1), (3, 2)]:
        assert "codes cached" in train(processes, "several", f"--accumulate_steps {parts}")
        assert_equal_runs("one", "several")
        shutil.rmtree("logs/several")


def test_a_run_goes_on_with_any_number_of_processes(here, shapes):
    """From the middle of a log interval and of an epoch, whose sums and counts are those of all processes."""
    flags = f"{STAGE_1} --steps_per_log 4 --steps_per_checkpoint 9"
    together(1, lambda: train_stage_1(shapes, "one", flags), here)
    together(2, lambda: train_stage_1(shapes, "two", flags), here)
    for before, processes in [("two", 1), ("one", 2), ("two", 3)]:
        shutil.copytree(f"logs/{before}", "logs/parts")
        for step in (18, LAST):
            Path(f"logs/parts/saved_models/manifest_{step}.json").unlink()
        text = together(processes, lambda: train_stage_1(shapes, "parts", f"{flags} --resume"), here)[0]
        assert "resumed logs/parts after step 9" in text
        assert_equal_runs("one", "parts")
        shutil.rmtree("logs/parts")


def test_what_only_the_main_process_meets_ends_all(here, shapes, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "vqgan_4.th")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    texts = together(2, lambda: train_stage_1(shapes, "run", f"{STAGE_1} --steps_per_checkpoint 4"), here, codes=[1, 1])
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith("error")]
    assert line.startswith("error: No space left on device: vqgan_4.th")


# ---------------------------------------------------------------------- data


def test_processes_that_see_other_images_are_told(here, shapes):
    """As on machines that do not share their files: each has a folder of its own under the same name."""
    places = [here / "first", here / "second"]
    for place, count in zip(places, (12, 13), strict=True):
        draw_shapes(place / "images", count)

    def work():
        os.chdir(places[distributed.rank()])
        train_stage_1("images", "run", STAGE_1)

    texts = together(2, work, here, codes=[1, 1])
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith("error")]
    assert "the list of images (--custom_dataset_path) must be the same in all processes" in line
    assert "differs from that of rank 0 in rank 1." in line


def test_broken_images_are_named_whoever_meets_them(here):
    """And are counted together: two of forty are no more than 5%, three are."""
    folder = draw_shapes(here / "images", 40)
    for broken, code in ((["0001.png", "0038.png"], 0), (["0007.png"], 1)):
        for name in broken:
            (folder / name).write_bytes(b"")
        shutil.rmtree("logs", ignore_errors=True)
        work = partial(train_stage_1, folder, "run", f"{STAGE_1} --steps_per_eval 0 --train_steps 12")
        texts = together(2, work, here, codes=[code] * 2)
        if code == 0:
            assert all(texts[0].count(f"{name}' cannot be decoded") == 1 for name in broken)
        else:
            assert "".join(texts).count("3 of 40 images cannot be decoded") == 1


# ---------------------------------------------------------------------- experiments


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    state = torchvision.models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, path)
    return path


EXPERIMENTS = {
    "samples": (get_samples, "--n_sheets 1 --save_latents"),
    "single samples": (get_samples, "--n_samples 5 --first_sample 3 --batch_size 2"),
    "FID": (calc_FID, "--n_samples 13 --kid --isc --save_images --save_latents --batch_size 3 --feature_batch 8"),
    "PRDC": (calc_PRDC, "--n_samples 25 --batch_size 4 --real_feats real.npy --fake_feats fake.npy"),
    "reconstructions": (calc_VQGAN_FID, "--save_images --feature_batch 7"),
    "likelihood": (  # of a low rate: Adam enlarges the rounding of sums
        calc_approximate_ELBO,
        "--train_steps 4 --steps_per_eval 2 --batch_size 2 --lr 1e-5 --elbo_passes 4 --steps_per_log 1",
    ),
    "neighbours": (calc_nearest_neighbours, "--n_samples 5 --n_neighbours 3 --query_batch 3 --batch_size 4"),
    "edited pictures": (edit_images, "--numbers 0 1 --keep left --variants 3 --batch_size 2 --blend 1 --show_steps"),
    "sweep": (
        sweep_sampling,
        "--n_samples 10 --seeds 1 --passes 2 --temps 1 --orders random halton confidence --schedules uniform",
    ),
    "outpainting": (edit_images, "--numbers 0 1 --shape 5 6 --at 1 0 --variants 3 --batch_size 2 --blend 1"),
    "larger images": (generate_big_samples, "--shape 6 5 --n_samples 3 --batch_size 1"),
    "larger images, in steps": (
        generate_big_samples,
        "--shape 6 5 --n_samples 3 --batch_size 1 --sample_order confidence --remask_eta 0.5",
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_finds_the_same(here, shapes, trained, alexnet, name):
    module, more = EXPERIMENTS[name]
    flags = prior_flags(shapes, "out", more)
    if module is calc_VQGAN_FID:
        flags = vqgan_flags(shapes, "out", f"--load_dir ae --load_step 4 {more}")
    if module is sweep_sampling:
        at = flags.index("--sample_steps")
        del flags[at : at + 2]
    if module is calc_nearest_neighbours:
        flags += ["--alexnet_weights", str(alexnet)]

    def work():
        features.Inception = SmallExtractor
        torch.set_num_threads(1)
        module.main(experiment(module, flags))

    found = {}
    for processes in (1, 2, 3)[: 3 if name in ("single samples", "FID") else 2]:
        place = here / str(processes)
        (place / "logs").mkdir(parents=True)
        for model in ("ae", "prior"):
            (place / "logs" / model).symlink_to(trained / "logs" / model)
        texts = together(processes, work, place)
        assert texts[0] and not any(texts[1:]), "the main process alone speaks"
        found[processes] = everything_written(place)
    for processes in found:
        assert found[processes].keys() == found[1].keys() and len(found[1]) > 1
        for path, value in found[processes].items():
            assert_close(value, found[1][path])


def everything_written(place):
    """{path: what it holds} of all that an experiment leaves."""
    found = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(("out_", "attempt"))):
        name = str(path.relative_to(place))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line)["values"] for line in path.read_text().splitlines()]
            found[name] = [{**row, "seconds": 0} for row in rows]
        elif path.suffix == ".th":
            found[name] = list(load_tensors(path))
        elif path.suffix in (".png", ".npy") or path.name in ("nearest_neighbours.json", "latents.pt", "edits.json"):
            found[name] = path.read_bytes()
        elif path.parent.name == "features":
            found[name] = {k: v.tolist() for k, v in load_tensors(path)["tensors"].items()}
    return found


def assert_close(a, b):
    """Equal, but for floats, which sums over all processes round."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    else:
        assert a == b

"""Numbers with which training cannot continue, and numbers at the limits of what makes sense."""

import math
import re
import shutil
from pathlib import Path

import lmdb
import pytest
import torch
from conftest import draw_shapes
from test_resume import assert_same_runs

import train_sampler
import train_vqgan
from experiments import get_samples
from experiments.common.calls import curve, rows
from faults.forks import forked
from faults.hostile import assert_one_line, measuring
from faults.stages import STAGES, stage_1, stage_2
from hparams import config
from utils.core.checkpoint import Checkpoints
from utils.core.files import load_tensors
from utils.data.images import held_out
from utils.data.sources import FolderImages
from utils.training.amp import Precision

BOTH = pytest.mark.parametrize("stage", STAGES)
LAST = 8  # step; a checkpoint every 2
SHORT = ("--train_steps", str(LAST))
ERRORS = (torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")


def weights(path):
    return {k: v for k, v in load_tensors(path).items() if v.is_floating_point()}


def assert_all_checkpoints_good(place):
    store = Checkpoints(place / "logs" / "run")
    for step in store.steps():
        store.verify(step)
    for path in store.models.glob("*.th"):
        if "_optim_" not in path.name:
            assert all(v.isfinite().all() for v in weights(path).values()), path.name


# ---------------------------------------------------------------------- not a number


def poison_loss(step, value):
    """The loss of a step is `value`."""
    generator_step, sampler_step = train_vqgan.generator_step, train_sampler.sampler_step
    calls = []

    def of_vqgan(*args):
        scalars, x_hat, quantized = generator_step(*args)
        return dict(scalars, loss=scalars["loss"] + (value if args[5] == step else 0.0)), x_hat, quantized

    def of_sampler(*args):
        calls.append(1)
        out = sampler_step(*args)
        out.loss = out.loss + (value if len(calls) == step else 0.0)
        return out

    train_vqgan.generator_step, train_sampler.sampler_step = of_vqgan, of_sampler


def poison_update(step, value):
    """In the step-th update of the first optimiser one gradient is `value`: of that step's loss nothing shows."""
    plain, calls = Precision.step, []

    def poisoned(self, optimiser):
        calls.append(optimiser)
        if calls.count(calls[0]) == step and optimiser is calls[0]:
            parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
            parameters[-1].grad.view(-1)[0] = value
        plain(self, optimiser)

    Precision.step = poisoned


def poison_weights(step, value):
    """A weight is `value` before the step-th update: that step's loss shows it, or another's."""
    plain, calls = Precision.step, []

    def poisoned(self, optimiser):
        calls.append(optimiser)
        plain(self, optimiser)
        if calls.count(calls[0]) == step - 1 and optimiser is calls[0]:
            optimiser.param_groups[0]["params"][0].data.view(-1)[0] = value

    Precision.step = poisoned


POISONS = {"loss": poison_loss, "update": poison_update, "weights": poison_weights}


@BOTH
@pytest.mark.parametrize("poison", POISONS)
def test_a_number_that_is_none_stops_the_run(stage, poison, whole, new_place, few_or_all, figures):
    """It reports the step and keeps the earlier checkpoints. --resume then continues as if nothing had happened."""
    same, _ = whole(stage, *SHORT)
    cases = [(step, value) for step in range(2, LAST + 1) for value in (math.nan, math.inf, -math.inf)]
    at = sorted(POISONS).index(poison)
    for step, value in few_or_all([cases[6 + at], cases[-3 + at]], cases):
        place = new_place()

        def poisoned(step=step, value=value):
            POISONS[poison](step, value)
            STAGES[stage](*SHORT)()

        outcome = forked(poisoned, place)
        assert_one_line(outcome, 1, "not finite")
        told = int(re.search(r"not finite \w+ step (\d+)", outcome.text)[1])
        assert told in (step, step + 1) or (poison == "weights" and told == step - 1)  # at that step's checkpoint
        assert_all_checkpoints_good(place)
        saved = Checkpoints(place / "logs" / "run").steps()
        assert saved == list(range(2, told, 2)) or saved == list(range(2, step, 2))
        resumed = forked(STAGES[stage](*SHORT, "--resume"), place)
        assert resumed.code == 0, resumed.text
        assert_same_runs(same, place / "logs" / "run", LAST)
        figures("numbers that are none")["stopped, resumed, equal"] += 1
        shutil.rmtree(place)


@pytest.mark.parametrize("flags", ["", "--disc_start_step 10000", "SAMPLER"])
def test_fp16_updates_that_overflow_are_skipped_and_counted(place, flags, figures):
    """The loss scale starts far too high and is halved at each step until training continues."""
    work = stage_2 if flags == "SAMPLER" else stage_1
    more = "--amp --amp_dtype fp16 --train_steps 60 --steps_per_save_output 0 --steps_per_checkpoint 0".split()

    def scaled():
        plain = torch.amp.GradScaler
        torch.amp.GradScaler = lambda *args, **kw: plain(*args, init_scale=2.0**36, **kw)
        work(*more, *flags.replace("SAMPLER", "").split())()

    outcome = forked(scaled, place)
    assert outcome.code == 0, outcome.text
    skipped = curve(place / "logs/run", "skipped_updates")
    assert skipped[0] >= 1 and 5 < skipped[-1] < 100 and skipped[-1] == skipped[-10]
    assert all(map(math.isfinite, curve(place / "logs/run", "loss")))
    assert_all_checkpoints_good(place)
    scaler = load_tensors(place / "logs/run/saved_stats/stats_60")["precision"]["scaler"]
    assert scaler["scale"] < 2.0**36
    figures("fp16 updates that overflowed")["skipped"] += int(skipped[-1])


@BOTH
@pytest.mark.parametrize("kind,message", [ERRORS, (MemoryError, ""), (RuntimeError, "not enough memory: you tried")])
def test_memory_that_is_full_in_a_step(stage, kind, message, place, whole):
    same, _ = whole(stage, *SHORT)
    name = "generator_step" if stage == "vqgan" else "sampler_step"
    module, calls = (train_vqgan if stage == "vqgan" else train_sampler), []

    def full():
        plain = getattr(module, name)

        def step(*args):
            calls.append(1)
            if len(calls) == 4:
                raise kind(message)
            return plain(*args)

        setattr(module, name, step)
        STAGES[stage](*SHORT)()

    outcome = forked(full, place)
    assert_one_line(outcome, 1, "the memory is full")
    assert all(flag in outcome.text for flag in ("--batch_size", "--amp", "--nf", "--bert_n_emb"))
    outcome = forked(STAGES[stage](*SHORT, "--resume"), place)
    assert outcome.code == 0, outcome.text
    assert_same_runs(same, place / "logs" / "run", LAST)


# ---------------------------------------------------------------------- sets of images


def image_lmdb(folder, images):
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as env, env.begin(write=True) as txn:
        for number, image in enumerate(images):
            txn.put(b"%d" % number, image.read_bytes())


@BOTH
def test_one_image(place, stage):
    draw_shapes(place / "one", 1)
    one = ["--dataset", "custom", "--custom_dataset_path", "one", "--train_steps", "2", "--batch_size", "5"]
    outcome = forked(STAGES[stage](*one, "--steps_per_eval", "0"), place)
    assert outcome.code == 0, outcome.text
    assert len(curve(place / "logs/run", "loss")) == 2
    shutil.rmtree(place / "logs" / "run")
    assert_one_line(forked(STAGES[stage](*one, "--steps_per_eval", "1"), place), 1, "(--steps_per_eval)")


@BOTH
@pytest.mark.parametrize("n_train,n_val,named", [(0, 3, "leave none for 'train'"), (3, 0, "leave none for 'val'")])
def test_an_lmdb_without_images(place, stage, n_train, n_val, named):
    images = sorted((place / "data" / "shapes").iterdir())
    image_lmdb(place / "lsun" / "x_train_lmdb", images[:n_train])
    image_lmdb(place / "lsun" / "x_val_lmdb", images[:n_val])
    (place / "datasets.yaml").write_text("pics: {paths: lsun, category: x}\n")
    assert_one_line(forked(STAGES[stage](), place), 1, named)


@BOTH
def test_validation_images_that_are_all_broken(place, stage):
    images = draw_shapes(place / "images", 40)
    source = FolderImages([images])
    for number in held_out(source, "hash").nonzero()[0]:
        Path(source.name(number)).write_bytes(b"no image")
    flags = ["--dataset", "custom", "--custom_dataset_path", "images", "--train_steps", "4"]
    assert_one_line(forked(STAGES[stage](*flags), place), 1, " of 2 images cannot be decoded")


# ---------------------------------------------------------------------- models at the edge


def both_stages(place, vqgan="", sampler=""):
    """Train both and draw samples."""
    works = (
        stage_1("--log_dir", "edge", "--train_steps", "4", *vqgan.split()),
        stage_2("--ae_load_dir", "edge", "--ae_load_step", "4", "--train_steps", "4", *sampler.split()),
        measuring(get_samples, f"--ae_load_dir edge --ae_load_step 4 --n_samples 3 {sampler}"),
    )
    for work in works:
        outcome = forked(work, place)
        assert outcome.code == 0, outcome.text
    assert all(math.isfinite(v) for row in rows(place / "logs/run") + rows(place / "logs/edge") for v in row.values())
    assert len(list((place / "logs" / "out" / "images").iterdir())) == 3


@pytest.mark.parametrize("quantizer", config.QUANTIZERS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_codebook_of_one_or_two(place, quantizer, size):
    placed = "--codebook_init kmeans --codebook_init_step 2 --codebook_restart_steps 2"
    more = placed if "codebook_init" in config.QUANTIZERS[quantizer] else ""
    sampler = "--sampler autoregressive" if size == 2 else ""
    both_stages(place, f"--codebook_size {size} --quantizer {quantizer} {more}", sampler)
    for figure in curve(place / "logs/edge", "perplexity") + curve(place / "logs/edge", "val_perplexity"):
        assert 1 <= figure <= size + 1e-5
    if size == 1:
        assert set(curve(place / "logs/run", "bits")) == {0.0}, "a code that is certain costs nothing"


@pytest.mark.parametrize(
    "vqgan,sampler",
    [
        (
            "--img_size 6 --ch_mult 1 --emb_dim 1 --batch_size 50",
            "--total_steps 1 --loss_type elbo --sample_steps 1 --batch_size 50",
        ),
        (
            "--img_size 8 --ch_mult 1 1 1 1 --nf 64 --ndf 1",
            "--bert_n_emb 1 --bert_n_head 1 --sample_steps 3 --total_steps 2",
        ),
        ("--n_channels 1 --batch_size 1", "--sample_type mlm --sample_steps 1 --mask_schedule fixed --batch_size 1"),
        ("--ema_beta 0 --beta 0 --disc_weight_max 0", "--ema_beta 1 --temp 1e300 --warmup_iters 0 --loss_type elbo"),
        ("--ema_beta 1 --lr 1e-300", "--temp 1e-37 --attn_pdrop 0.999 --loss_type mlm --lr 1e-300"),
    ],
)
def test_the_smallest_and_the_largest(place, vqgan, sampler):
    both_stages(place, vqgan, sampler)

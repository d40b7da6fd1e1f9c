"""The runs of the smallest size that have everything: checkpoints, averages, validation, pictures, codes in parts."""

import json

from conftest import TINY_SAMPLER, TINY_VQGAN, words
from scripts import experiment
from test_metrics import SmallExtractor
from test_resume import assert_same_runs, assert_same_values

import train_sampler
import train_vqgan
from experiments import calc_FID, get_samples
from hparams import get_hparams
from utils.core.checkpoint import Checkpoints
from utils.core.files import load_tensors, read_json
from utils.data import codes
from utils.evaluation import features

SMALL = words("--dataset pics --batch_size 2")
OFTEN = words(
    "--steps_per_log 1 --steps_per_checkpoint 2 --steps_per_eval 3 --steps_per_save_output 3 --ema "
    "--steps_per_update_ema 1 --horizontal_flip --log_dir run"
)
AUTOENCODER = words("--img_size 8 --ch_mult 1 1")
PART = 8  # images of a part of the codes


def stage_1(*flags):
    """A function that trains a VQGAN in logs/run."""
    flags = [*TINY_VQGAN, *SMALL, *AUTOENCODER, *OFTEN, *words("--disc_start_step 2 --diff_aug"), *flags]
    return lambda: train_vqgan.train(get_hparams("vqgan", "", flags, script="train_vqgan"))


def stage_2(*flags):
    """A function that trains a prior in logs/run on the codes of logs/ae."""
    flags = [
        *TINY_SAMPLER,
        *SMALL,
        *words("--sampler absorbing --ae_load_dir ae --ae_load_step 2"),
        *OFTEN,
        *words("--resid_pdrop 0.1"),
        *flags,
    ]

    def work():
        codes.PART = PART
        train_sampler.train(get_hparams("sampler", "", flags, script="train_sampler"))

    return work


def again(stage):
    """A function that resumes logs/run as its user would: all else is in its config.json."""
    flags = words("--dataset pics --log_dir run --resume --no_visdom --num_workers 0 --device cpu")
    if stage == "vqgan":
        return lambda: train_vqgan.train(get_hparams("vqgan", "", flags, script="train_vqgan"))
    flags += words("--sampler absorbing --ae_load_dir ae --ae_load_step 2")

    def work():
        codes.PART = PART
        train_sampler.train(get_hparams("sampler", "", flags, script="train_sampler"))

    return work


STAGES = {"vqgan": stage_1, "sampler": stage_2}


def train_autoencoder():
    """logs/ae (step 2), in this process."""
    flags = words("--log_dir ae --train_steps 2 --ema --steps_per_update_ema 1")
    train_vqgan.train(get_hparams("vqgan", "", [*TINY_VQGAN, *SMALL, *AUTOENCODER, *flags], script="train_vqgan"))


# ---------------------------------------------------------------------- what must hold of logs/run


def draw(rng, events):
    """One event, all pairs of file and operation alike: not most often somewhere within the largest file."""
    groups = {}
    for event in events:
        groups.setdefault((event.file, event.kind), []).append(event)
    return rng.choice(groups[rng.choice(sorted(groups))])


def assert_nothing_half_counts(place):
    """Whatever has a manifest is a whole checkpoint, and what a resume reads first is readable."""
    store = Checkpoints(place / "logs" / "run")
    for step in store.steps():
        store.verify(step)
    if (store.folder / "config.json").exists():
        read_json(store.folder / "config.json")


def leftovers(place):
    """What an interrupted write has left, anywhere."""
    return [p for pattern in (".*.tmp", ".unfinished_*") for p in (place / "logs").rglob(pattern)]


def assert_same_and_tidy(same, place, step):
    """The run in this place ended as the uninterrupted one, and nothing else lies about."""
    assert_same_runs(same, place / "logs" / "run", step)
    assert not leftovers(place)
    steps, other_steps = (Checkpoints(run).steps() for run in (same, place / "logs" / "run"))
    # One that was killed right after its last checkpoint did not come to removing the oldest.
    assert other_steps[-len(steps) :] == steps and len(other_steps) <= len(steps) + 1
    names = [p.name for p in (place / "logs" / "run" / "saved_models").iterdir()]
    assert all(any(name.endswith((f"_{s}.th", f"_{s}.json")) for s in other_steps) for name in names)


# ---------------------------------------------------------------------- experiments


def experiment_work(module, *more):
    """A function that runs an experiment in logs/out on the models logs/ae (step 2) and logs/run (step 4)."""
    flags = [
        *TINY_SAMPLER,
        *SMALL,
        *words("--sampler absorbing --ae_load_dir ae --ae_load_step 2"),
        *words("--load_dir run --load_step 4 --log_dir out --save_latents"),
        *more,
    ]

    def work():
        features.Inception = SmallExtractor
        module.main(experiment(module, flags))

    return work


EXPERIMENTS = {
    "calc_FID": experiment_work(calc_FID, "--n_samples", "4"),
    "get_samples": experiment_work(get_samples, "--n_samples", "3"),
}


def results(place):
    """What an experiment has found: figures, codes and pictures."""
    out = place / "logs" / "out"
    metrics = out / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for row in rows:
        row["values"].pop("seconds", None)
    pictures = {p.name: p.read_bytes() for p in sorted((out / "images").glob("*"))}
    return dict(values=rows[-1:] and rows[-1]["values"], ids=load_tensors(out / "latents.pt")["ids"], **pictures)


def assert_same_results(place, other):
    assert_same_values(results(place), results(other))

"""Files that are damaged between two runs. Allowed: an error of one line; a reported file that is skipped or made
again; or no difference at all. Never: a traceback, a run that does not end, or a different result without a message."""

import itertools
import json
import os
import random
import shutil

import pytest
from test_files import mutations
from test_resume import assert_same_runs

from faults.forks import Disk, die_at, forked
from faults.stages import EXPERIMENTS, STAGES, again, assert_same_results

LAST = 6
FLAGS = ("--train_steps", str(LAST))
FOREIGN = [
    b"",
    b"nothing of the kind\n",
    b"[]",
    b"{}",
    b"null",
    b"3",
    bytes(3000),
    b"\x93NUMPY",
    b"PK\x03\x04",
    b"\x80\x02.",
]

# Where a run stands when the damage is done (an event that it was killed before), and what can be damaged then.
CHECKPOINT = [
    "logs/run/saved_models/*_4.*",
    "logs/run/saved_stats/stats_4",
    "logs/run/config.json",
    "logs/run/stats.jsonl",
    "datasets.yaml",
]
AUTOENCODER = ["logs/ae/saved_models/vqgan_ema_*", "logs/ae/saved_models/manifest_*", "logs/ae/config.json"]
TRAINING = {
    "vqgan, resumed": ("vqgan", lambda e: e.step == 5, CHECKPOINT),
    "sampler, resumed": ("sampler", lambda e: e.step == 5, [*CHECKPOINT, *AUTOENCODER, "latents/*"]),
    "sampler, from parts of the codes": (
        "sampler",
        lambda e: e.kind == "replace" and e.file.endswith("_flipped.pt"),
        [*AUTOENCODER, "latents/*"],
    ),
}
LOADED = [
    "logs/run/saved_models/absorbing_ema_4.th",
    "logs/run/saved_models/manifest_4.json",
    "logs/run/config.json",
    *AUTOENCODER,
    "datasets.yaml",
]
MEASURING = {"get_samples": LOADED, "calc_FID": [*LOADED, "features/*"]}


OTHER_IMAGES = "continues with other images than it was trained on"


def damaged(rng, content):
    """What a file of this content holds afterwards; None: it is gone."""
    how = rng.choice(("cut", "flipped", "overwritten", "moved", "foreign", "random", "gone"))
    if how == "gone":
        return None
    if how == "foreign":
        return rng.choice(FOREIGN)
    if how == "random":
        return rng.randbytes(rng.randrange(1, 5000))
    number = ("cut", "flipped", "overwritten", "moved").index(how)
    tries = itertools.chain.from_iterable(mutations(content, 4, seed=rng.random()) for _ in itertools.count())
    return next(itertools.islice(tries, number, None))


def damage_one(rng, place, patterns, turn):
    """Damage one of the files, each in turn. Returns its path."""
    files = sorted({p for pattern in patterns for p in place.glob(pattern)})
    path = files[turn % len(files)]
    content = damaged(rng, path.read_bytes())
    path.unlink()  # the file may be shared with the undamaged place
    if content is not None:
        path.write_bytes(content)
    return path


def copied(template, place):
    """A copy in which the large files are shared: they are only ever replaced."""

    def copy(source, target):
        (os.link if source.endswith(".th") else shutil.copy2)(source, target)

    return shutil.copytree(template, place, symlinks=True, copy_function=copy)


def verdict(outcome, path):
    """What the run made of the damage."""
    assert "Traceback" not in outcome.text, outcome.text
    if outcome.code:
        lines = outcome.text.splitlines()
        assert outcome.code in (1, 2), outcome
        assert [line for line in lines if "error: " in line] == lines[-1:], outcome.text
        assert path.name in outcome.text, outcome.text
        return "refused in one line"
    lines = [line for line in outcome.text.splitlines() if "has no effect" not in line]
    told = any("warning: " in line or "note: " in line for line in lines)
    return "named and passed over" if told else "no difference"


@pytest.mark.parametrize("case", TRAINING)
def test_training_goes_on_or_says_why_not(case, few_or_all, whole, new_place, tmp_path, figures):
    stage, is_the_moment, patterns = TRAINING[case]
    same, events = whole(stage, *FLAGS)
    template, rng, tried = new_place(), random.Random(case), figures(f"damage, {case}")
    moment = next(e for e in events if is_the_moment(e))
    forked(STAGES[stage](*FLAGS), template, Disk(die_at(moment, "before")))
    for turn in range(few_or_all(6, 75)):
        place = copied(template, tmp_path / str(turn))
        path = damage_one(rng, place, patterns, turn)
        outcome = forked(again(stage), place)
        result = verdict(outcome, path)
        if not outcome.code and OTHER_IMAGES not in outcome.text:
            if path.name == "stats.jsonl" and f"{path.name} is not what was written" in outcome.text:
                shutil.copy(same / "stats.jsonl", place / "logs" / "run")
            assert_same_runs(same, place / "logs" / "run", LAST)
        tried[result] += 1
        shutil.rmtree(place)


@pytest.mark.parametrize("stage", STAGES)
def test_a_path_that_was_cut_off_and_still_leads_to_images(stage, whole, new_place):
    _, events = whole(stage, *FLAGS)
    place = new_place()
    moment = next(e for e in events if e.step == 5)
    forked(STAGES[stage](*FLAGS), place, Disk(die_at(moment, "before")))
    (place / "datasets.yaml").write_text("pics:\n  paths: data\n")  # it was data/shapes
    outcome = forked(again(stage), place)
    assert outcome.code == 0 and OTHER_IMAGES in outcome.text, outcome.text


def test_a_changed_number_of_a_configuration_is_not_believed(whole, place):
    """It can still be a number that makes sense, of a run with another result."""
    run, _ = whole("vqgan", *FLAGS)
    shutil.copytree(run, place / "logs" / "run")
    path = place / "logs" / "run" / "config.json"
    for manifest in (place / "logs" / "run" / "saved_models").glob("manifest_*.json"):  # as earlier versions wrote it
        older = {k: v for k, v in json.loads(manifest.read_text()).items() if k not in ("hparams", "digest")}
        manifest.write_text(json.dumps(older))
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.001', '"lr": 0.003'))
    assert path.read_text() != text
    outcome = forked(again("vqgan"), place)
    assert outcome.code == 2 and "config.json is damaged" in outcome.text


def test_averaged_weights_that_are_gone_are_missed(trained_place):
    """The others, which are there, are not the ones that were asked for."""
    for path in ("logs/ae/saved_models/vqgan_ema_2.th", "logs/run/saved_models/absorbing_ema_4.th"):
        place = trained_place()
        (place / path).unlink()
        outcome = forked(EXPERIMENTS["get_samples"], place)
        assert outcome.code == 1 and f"{path} does not exist" in outcome.text


@pytest.mark.parametrize("script", MEASURING)
def test_an_experiment_gives_the_same_or_says_why_not(
    script, few_or_all, trained_place, finished_experiment, tmp_path, figures
):
    same, _ = finished_experiment(script)
    rng, tried = random.Random(script), figures(f"damage, {script}")
    for turn in range(few_or_all(8, 75)):
        place = copied(same, tmp_path / str(turn))
        shutil.rmtree(place / "logs" / "out")
        path = damage_one(rng, place, MEASURING[script], turn)
        outcome = forked(EXPERIMENTS[script], place)
        result = verdict(outcome, path)
        # config.json records which images were held out. Without it, a message reports this, and none are held out.
        if not outcome.code and "config.json is gone" not in outcome.text:
            assert_same_results(same, place)
        tried[result] += 1
        shutil.rmtree(place)

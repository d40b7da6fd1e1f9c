"""What a run starts from, and what it must never overwrite."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, words
from ranks import together
from scripts import experiment, sampler_flags, start, train_stage_1, train_stage_2, vqgan_flags
from test_hparams import refused, resolved, save_run
from test_resume import assert_same_weights, wait_for_step

import train_vqgan
from experiments import calc_FID
from hparams import get_hparams
from hparams.sources import flags_given
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import hash_json, read_json, write_json
from utils.display import commands
from utils.display.saved_run import SavedRun
from utils.training.start import agree_on_steps

LOAD = "--load_dir prior --load_step 3 --ema"


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of the trained models, as the current folder."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fine_tune(images, name, more):
    train_stage_2(images, name, "ae", 4, f"--steps_per_log 1 {more}")


def contents(folder):
    """{path: bytes} of all files under a folder, except the lock."""
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p): p.read_bytes() for p in files}


def forget(name, step, *flags):
    """Make logs/<name> look as if it began before there were these flags."""
    for path in (f"logs/{name}/config.json", f"logs/{name}/saved_models/manifest_{step}.json"):
        value = read_json(path)
        for flag in flags:
            value["hparams"].pop(flag)
        value.pop("digest")
        write_json(path, dict(value, digest=hash_json(value["hparams"] if "facts" in value else value)))


# ---------------------------------------------------------------------- the model that a run begins with


def test_a_fine_tune_killed_before_its_first_checkpoint_begins_with_its_model_again(place, shapes, capsys):
    fine_tune(shapes, "undisturbed", f"{LOAD} --train_steps 8")
    flags = sampler_flags(shapes, "killed", "ae", 4, f"{LOAD} --steps_per_log 1 --train_steps 100000")
    process = start("train_sampler.py", flags, place)
    wait_for_step(place / "logs/killed", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    capsys.readouterr()
    fine_tune(shapes, "killed", "--resume --train_steps 8")
    out = capsys.readouterr().out
    assert "nothing to resume in logs/killed: starting from step 3 of logs/prior" in out
    assert "an earlier start are kept in logs/killed/stats_1.jsonl" in out
    assert_same_weights(place / "logs/undisturbed", place / "logs/killed", 8)
    hparams = read_json("logs/killed/config.json")["hparams"]
    assert (hparams["load_dir"], hparams["load_step"]) == ("prior", 3)


def test_the_same_command_with_resume_starts_and_continues_and_needs_its_model_once(place, shapes, capsys):
    fine_tune(shapes, "undisturbed", f"{LOAD} --train_steps 8")
    fine_tune(shapes, "run", f"{LOAD} --resume --train_steps 5")
    assert "starting from step 3 of logs/prior" in capsys.readouterr().out
    shutil.rmtree("logs/prior")
    fine_tune(shapes, "run", f"{LOAD} --resume --train_steps 8")
    assert "resumed logs/run after step 5" in capsys.readouterr().out
    assert_same_weights(place / "logs/undisturbed", place / "logs/run", 8)
    assert read_json("logs/run/config.json")["hparams"]["load_step"] == 3


def test_another_model_to_begin_with_is_refused(place, shapes, capsys):
    fine_tune(shapes, "run", f"{LOAD} --train_steps 5")
    for flags, began in [("run", "at step 3 of prior"), ("prior", "afresh")]:
        with pytest.raises(SystemExit) as stopped:
            fine_tune(shapes, flags, "--load_dir prior --load_step 2 --resume --train_steps 8")
        assert stopped.value.code == 2
        assert f"logs/{flags} began {began}: leave them out" in capsys.readouterr().err


# ---------------------------------------------------------------------- checkpoints that are not there


@pytest.mark.parametrize("gone", [("saved_models",), ("saved_models", "saved_stats")])
@pytest.mark.parametrize("resume", ["--resume", ""])
def test_a_run_whose_checkpoints_are_not_mounted_is_left_alone(place, shapes, gone, resume):
    train_stage_1(shapes, "run", "--train_steps 4 --steps_per_log 1")
    for name in gone:
        os.rename(f"logs/run/{name}", f"{name}_elsewhere")
    os.makedirs("logs/run/saved_models")  # an empty mount point
    before = contents("logs/run")
    with pytest.raises(UserError, match="had a checkpoint of step 4"):
        train_stage_1(shapes, "run", f"--train_steps 8 {resume}")
    assert contents("logs/run") == before
    shutil.rmtree("logs/run/saved_models")
    for name in gone:
        os.rename(f"{name}_elsewhere", f"logs/run/{name}")
    train_stage_1(shapes, "run", "--train_steps 6 --resume")


def test_the_folder_of_another_script_is_left_alone(place, shapes):
    for more in ("", "--resume"):
        before = contents("logs/ae")
        with pytest.raises((UserError, SystemExit)):
            train_stage_2(shapes, "ae", "ae", 4, f"--train_steps 2 {more}")
        assert contents("logs/ae") == before
    Path("logs/new").mkdir()
    shutil.copy("logs/ae/config.json", "logs/new")  # a run of stage 1 that has no checkpoint yet
    with pytest.raises(UserError, match="logs/new is not a run of this script"):
        train_stage_2(shapes, "new", "ae", 4, "--train_steps 2")


# ---------------------------------------------------------------------- the configuration


def out_of_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    "more,broken,error",
    [
        ("--train_steps 8 --batch_size 8", "generator_step", torch.OutOfMemoryError),
        ("--train_steps 8 --perceptual_weight 1 --perceptual_weights no.pth", None, UserError),
        ("--train_steps 3", None, None),
    ],
)
def test_a_resume_that_trains_nothing_leaves_the_configuration_alone(place, shapes, monkeypatch, more, broken, error):
    train_stage_1(shapes, "run", "--train_steps 4")
    before = Path("logs/run/config.json").read_bytes()
    with monkeypatch.context() as patch:
        if broken:
            patch.setattr(train_vqgan, broken, out_of_memory)
        with pytest.raises(error) if error else contextlib.nullcontext():
            train_stage_1(shapes, "run", f"{more} --resume")
    assert Path("logs/run/config.json").read_bytes() == before


def test_averages_of_a_run_without_them_begin_at_its_weights(place, shapes):
    train_stage_1(shapes, "run", "--train_steps 4")
    train_stage_1(shapes, "run", "--train_steps 6 --resume --ema --steps_per_update_ema 100")
    averaged = torch.load("logs/run/saved_models/vqgan_ema_6.th")
    begun = torch.load("logs/run/saved_models/vqgan_4.th")
    assert all(torch.equal(averaged[k], v) for k, v in begun.items() if v.is_floating_point() and "running" not in k)
    train_stage_1(shapes, "run", "--train_steps 7 --resume")
    assert Path("logs/run/saved_models/vqgan_ema_7.th").exists()


def test_what_was_given_comes_first_also_after_resumes(place, shapes):
    train_stage_1(shapes, "run", "--train_steps 2 --seed 5")
    train_stage_1(shapes, "run", "--train_steps 3 --resume --steps_per_log 1")
    H = get_hparams(
        "vqgan", "", words("--dataset custom --custom_dataset_path x --log_dir run --resume --steps_per_eval 2")
    )
    given = {
        "seed",
        "ndf",
        "steps_per_log",
        "steps_per_eval",
        "resume",
        "train_steps",
    }  # of all three, TINY_VQGAN's too
    values = H.known()
    first = set(list(values)[: len({*H.explicit, *H.given_before})])
    assert values == H.to_dict() and given <= first and not {"ema", "beta", "diff_aug"} & first
    assert list(H.to_dict())[: len(first)] != list(values)[: len(first)]
    shown = SavedRun("logs/run").arguments()
    assert {"seed", "steps_per_log"} <= set(list(shown)[: len(H.given_before)]) and shown["seed"] == 5
    Path("logs/run/config.json").write_text(json.dumps(dict(read_json("logs/run/config.json"), given=7)))
    assert flags_given("run") == [] and SavedRun("logs/run").given == []


def test_a_checkpoint_knows_its_configuration(place, shapes, capsys):
    Path("logs/prior/config.json").unlink()
    H = resolved(f"--log_dir new {LOAD}", "sampler")
    assert H.bert_n_emb == 16
    train_stage_2(shapes, "prior", "ae", 4, "--train_steps 4 --resume")
    assert "config.json is gone" not in capsys.readouterr().err
    assert read_json("logs/prior/config.json")["checkpoint"] == 4


def test_settings_that_an_older_run_did_not_record_stay_what_they_were(place, shapes, capsys):
    shutil.copytree("logs/prior", "logs/other")
    forget("other", 3, "codes_precision", "unique_images", "split_rule")
    capsys.readouterr()
    for name in ("prior", "other"):
        train_stage_2(shapes, name, "ae", 4, "--train_steps 6 --resume")
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert note == (
        "note: logs/other was started by an earlier version and continues as it began: unique_images False, "
        "split_rule last"
    )
    assert_same_weights(place / "logs/prior", place / "logs/other", 6)
    assert read_json("logs/other/config.json")["hparams"]["codes_precision"] == "float32"
    assert read_json("logs/prior/config.json")["hparams"]["codes_precision"] == "float32"


def test_stage_2_and_experiments_divide_the_images_as_stage_1_did(place):
    def stage_2(words, **more):
        return resolved(f"--sampler absorbing --ae_load_step 1 --ae_load_dir {words}", "sampler", **more)

    H = resolved("--log_dir new_ae")
    assert H.split_rule == "hash"
    save_run("new_ae", H)
    save_run("old_ae", H, split_rule="ABSENT")
    assert stage_2("new_ae --log_dir s").split_rule == "hash"
    assert stage_2("old_ae --log_dir s").split_rule == "last"
    assert stage_2("old_ae --log_dir s", dataset="ffhq").split_rule == "hash", "other images are not concerned"
    assert resolved("--log_dir run --load_dir old_ae --load_step 1").split_rule == "last", "weights to start from"
    save_run("old", stage_2("old_ae --log_dir old"))
    assert stage_2("new_ae --log_dir old --resume").split_rule == "last"
    words = "--log_dir f --n_samples 10 --ae_load_dir new_ae --ae_load_step 1 --load_dir old --load_step 1"
    H = experiment(calc_FID, ["--dataset", "churches", "--sampler", "absorbing", *words.split()])
    assert H.split_rule == "last", "the training of the sampler counts"


def test_the_averages_of_an_older_run_are_not_warmed_up(place, shapes, capsys):
    every = "--ema --steps_per_update_ema 1"
    fine_tune(shapes, "without", f"{every} --no_ema_warmup --train_steps 6")
    fine_tune(shapes, "warm", f"{every} --train_steps 6")
    fine_tune(shapes, "old", f"{every} --no_ema_warmup --train_steps 3")
    forget("old", 3, "ema_warmup")
    capsys.readouterr()
    fine_tune(shapes, "old", "--resume --train_steps 6")
    assert "continues as it began: ema_warmup False\n" in capsys.readouterr().err
    assert_same_weights(place / "logs/without", place / "logs/old", 6)
    with pytest.raises(AssertionError):
        assert_same_weights(place / "logs/without", place / "logs/warm", 6)
    fine_tune(shapes, "plain", "--train_steps 3")
    forget("plain", 3, "ema_warmup")
    capsys.readouterr()
    fine_tune(shapes, "plain", "--resume --train_steps 6")
    assert "as it began" not in capsys.readouterr().err, "it has no averages"


@pytest.mark.parametrize(("before", "now"), [("--amp", ""), ("--amp", "--no_amp"), ("", ""), ("", "--amp")])
def test_an_older_run_keeps_the_number_format_of_its_codes(place, before, now):
    """Whatever --amp says when it is resumed; a new run has float32."""
    H = resolved(f"--log_dir run {before}", "sampler")
    assert H.codes_precision == "float32"
    del H.codes_precision
    save_run("run", H)
    H = resolved(f"--log_dir run --resume {now}", "sampler")
    assert H.codes_precision == ("amp" if before else "float32")
    assert H.older.get("codes_precision") == ("amp" if before else None)


def test_settings_without_a_flag_have_none():
    assert "unknown flag --unique_images" in refused("--unique_images")


def test_a_resumed_run_prints_what_changes(place, shapes, capsys):
    printed = []
    for _ in range(2):
        capsys.readouterr()
        fine_tune(shapes, "prior", "--resume --lr 1e-4 --train_steps 4")
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")])
    ((line,), again) = printed
    changes = {"lr 1e-3 -> 1e-4", "train_steps 3 -> 4", "steps_per_log 10 -> 1"}
    assert set(line.removeprefix("changed: ").split(", ")) == changes and again == []
    assert line in Path("logs/prior/log.txt").read_text()


def test_where_the_dashboard_is_comes_from_the_command_line_alone(place):
    theirs = resolved("--visdom_server http://theirs.example --visdom_port 9999 --no_visdom")
    save_run("run", theirs)
    H = resolved("--log_dir run --resume")
    assert (H.visdom_server, H.visdom_port, H.no_visdom) == (None, 8097, False)
    assert "theirs" not in commands.resume("train_vqgan", vars(theirs))


def test_a_run_of_months_states_what_takes_less_and_the_command_that_continues_has_all_it_needs(place, shapes):
    flags = vqgan_flags(shapes, "run", "--visdom_server http://here.example --train_steps 1e10 --steps_per_log 1")
    process = start("train_vqgan.py", flags, place)
    wait_for_step(place / "logs/run", 25, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    lines = Path("out_0.txt").read_text().splitlines()
    (expected,) = [i for i, line in enumerate(lines) if line.startswith("expected: ") and " days to step" in line]
    assert (
        lines[expected + 1].startswith("more than a month: fewer --train_steps")
        and "--preset small" in lines[expected + 1]
    )
    (line,) = [w for w in lines if w.startswith("  ") and "--resume" in w]
    assert "--train_steps 10000000000 " in line
    assert words("--visdom_server http://here.example --no_visdom") == [
        w for w in line.split() if "visdom" in w or "here" in w
    ]


# ---------------------------------------------------------------------- several processes


def test_the_main_process_decides_which_steps_are_loaded(tmp_path):
    def work():
        newest = 6 + 2 * distributed.rank()  # a run that is under way has written a checkpoint in between
        H = SimpleNamespace(explicit=["load_step"], load_step=newest, ae_load_step=newest)
        agree_on_steps(H)
        print(H.load_step, H.ae_load_step)

    assert together(2, work, tmp_path) == ["6 6\n", "8 6\n"]  # what is given must agree; it is not changed

"""The flags, their defaults, where values come from, and what is refused."""

import contextlib
import io
import json
import math
import os
import shutil
from pathlib import PureWindowsPath

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.calc_FID import FIDConfig
from experiments.calc_VQGAN_FID import ReconstructionConfig
from hparams import config, get_hparams, sources
from hparams.checks import shown
from hparams.presets import PRESETS
from hparams.resolve import size_of_stage_2
from utils.core.errors import UsageError

SAMPLER = "--sampler absorbing --ae_load_dir ae --ae_load_step 1"

# The frozen interface: name -> (type, default with --dataset churches[, choices]). A change
# here breaks command lines of users.
COMMON = {
    "dataset": ("str", "churches"),
    "custom_dataset_path": ("str", None),
    "preset": ("str", None, ["bedrooms", "churches", "custom", "demo", "ffhq", "small"]),
    "log_dir": ("str", "test"),
    "load_dir": ("str", "test"),
    "load_step": ("int", 0),
    "load_optim": ("bool", False),
    "weights": ("str", "ema", ["ema", "raw"]),
    "resume": ("bool", False),
    "seed": ("int", 0),
    "device": ("str", "auto", ["auto", "cpu", "cuda", "mps"]),
    "num_workers": ("int", 2),
    "cache_images": ("bool", False),
    "dry_run": ("bool", False),
    "train_steps": ("int", 100000000),
    "batch_size": ("int", 3),
    "accumulate_steps": ("int", 1),
    "lr": ("float", 3 * 4.5e-6),
    "amp": ("bool", False),
    "amp_dtype": ("str", "auto", ["auto", "bf16", "fp16"]),
    "compile": ("str", "auto", ["auto", "off", "on"]),
    "ema": ("bool", False),
    "ema_beta": ("float", 0.995),
    "steps_per_update_ema": ("int", 10),
    "ema_warmup": ("bool", True),
    "steps_per_log": ("int", 10),
    "steps_per_eval": ("int", 0),
    "steps_per_display_output": ("int", 5000),
    "steps_per_save_output": ("int", 5000),
    "steps_per_checkpoint": ("int", 25000),
    "keep_checkpoints": ("int", 0),
    "save_individually": ("bool", False),
    "visdom_port": ("int", 8097),
    "visdom_server": ("str", None),
    "visdom_compare": ("list of str", None),
    "no_visdom": ("bool", False),
    "img_size": ("int", 256),
    "n_channels": ("int", 3, [1, 3]),
    "nf": ("int", 128),
    "ch_mult": ("list of int", [1, 1, 2, 2, 4]),
    "res_blocks": ("int", 2),
    "attn_resolutions": ("list of int", [16]),
    "latent_shape": ("list of int", [1, 16, 16]),
    "emb_dim": ("int", 256),
    "codebook_size": ("int", 1024),
    "quantizer": ("str", "nearest", ["ema", "fsq", "gumbel", "nearest", "rotation"]),
    "codebook_decay": ("float", 0.99),
    "fsq_least_levels": ("int", 5),
    "codebook_init": ("str", "uniform", ["kmeans", "uniform"]),
    "codebook_init_step": ("int", 500),
    "codebook_restart_steps": ("int", 0),
    "beta": ("float", 0.25),
    "gumbel_kl_weight": ("float", 1e-8),
    "gumbel_straight_through": ("bool", False),
    "base_lr": ("float", 4.5e-6),
    "perceptual_weight": ("float", 1.0),
    "perceptual_net": ("str", "vgg", ["efficientnet_lite0", "vgg"]),
    "perceptual_weights": ("str", None),
    "ndf": ("int", 64),
    "disc_layers": ("int", 3),
    "disc_start_step": ("int", 30001),
    "disc_warmup_steps": ("int", 0),
    "disc_ramp_steps": ("int", 0),
    "lecam_weight": ("float", 0.0),
    "mse_weight": ("float", 0.0),
    "adam_beta2": ("float", 0.999),
    "disc_weight_max": ("float", 1.0),
    "diff_aug": ("bool", False),
    "random_crop": ("float", 1.0),
    "horizontal_flip": ("bool", False),
}
OF_SAMPLERS = {
    "ae_load_dir": ("str", "ae"),
    "ae_load_step": ("int", 1),
    "sampler": ("str", "absorbing", ["absorbing", "autoregressive"]),
    "bert_n_emb": ("int", 512),
    "bert_n_head": ("int", 8),
    "bert_n_layers": ("int", 24),
    "block_size": ("int", 256),
    "crops": ("int", 1),
    "embd_pdrop": ("float", 0.0),
    "attn_pdrop": ("float", 0.0),
    "resid_pdrop": ("float", 0.0),
    "loss_type": ("str", "reweighted_elbo", ["elbo", "mlm", "reweighted_elbo"]),
    "mask_schedule": ("str", "random", ["fixed", "random"]),
    "total_steps": ("int", 256),
    "sample_steps": ("int", 256),
    "sample_type": ("str", "diffusion", ["diffusion", "mlm"]),
    "temp_end": ("float", None),
    "top_k": ("int", 0),
    "top_p": ("float", 1.0),
    "remask_eta": ("float", 0.0),
    "sample_order": ("str", "random", ["confidence", "halton", "random", "raster"]),
    "sample_schedule": ("str", "uniform", ["arccos", "cosine", "uniform"]),
    "temp": ("float", 1.0),
    "warmup_iters": ("int", 10000),
    "greedy_epochs": ("int", None),
    "greedy": ("bool", False),
    "sample_block_size": ("int", None),
    "batch_size": ("int", 20),
    "lr": ("float", 2e-4),
}
FROZEN = {"vqgan": COMMON, "sampler": {**COMMON, **OF_SAMPLERS}}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with datasets.yaml and the (empty) folder of an autoencoder; two cores."""
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    (tmp_path / "logs" / "ae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def resolved(words, family="vqgan", dataset="churches"):
    words = f"--dataset {dataset} {words}" if dataset else words
    if family == "sampler" and "--ae_load_dir" not in words:
        words = f"{SAMPLER} {words}"
    return get_hparams(family, "", words.split(), script=f"train_{family}")


def refused(*args, **kw):
    """The one line that refuses a command line, with exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        resolved(*args, **kw)
    assert stop.value.code == 2
    (line,) = err.getvalue().splitlines()
    return line


def save_run(name, H, **changes):
    """What utils/training/run.py writes at the start of a run."""
    values = {k: v for k, v in {**H.to_dict(), "log_dir": name, **changes}.items() if v != "ABSENT"}
    os.makedirs(f"logs/{name}", exist_ok=True)
    with open(f"logs/{name}/config.json", "w") as f:
        json.dump(dict(format=1, script=H.script, hparams=values), f)


def datasets(text):
    with open("datasets.yaml", "w") as f:
        f.write(text)


# ---------------------------------------------------------------------- the interface


@pytest.mark.parametrize("family", ["vqgan", "sampler"])
def test_every_flag_is_frozen(family):
    H = resolved("", family)
    flags = config.flags_of(getattr(config, f"{family}_family")())
    actual = {}
    for flag in flags:
        row = ("list of " * flag.is_list + flag.type.__name__, getattr(H, flag.name))
        actual[flag.name] = row + ((sorted(flag.meta["choices"]),) if "choices" in flag.meta else ())
    assert actual == FROZEN[family]
    assert len(flags) == len(actual)
    assert {f.name for f in flags if f.meta.get("required")} == {"dataset"} | (
        {"ae_load_dir", "sampler"} if family == "sampler" else set()
    )


@pytest.mark.parametrize("family", ["vqgan", "sampler"])
@pytest.mark.parametrize("dataset", ["churches", "bedrooms", "ffhq", "custom --custom_dataset_path x"])
def test_presets_of_the_paper(family, dataset):
    H = resolved("", family, dataset)
    expected = {k: v[1] for k, v in FROZEN[family].items()}
    if dataset == "ffhq" and family == "sampler":
        expected.update(lr=1e-4, warmup_iters=30000)
    for name in set(expected) - {"dataset", "custom_dataset_path"}:
        assert getattr(H, name) == expected[name], name


def test_demo_preset():
    stage_1, stage_2 = resolved("", dataset="demo"), resolved("", "sampler", "demo")
    assert (stage_1.img_size, stage_1.latent_shape, stage_1.perceptual_weight) == (32, [1, 8, 8], 0.0)
    assert (stage_2.img_size, stage_2.latent_shape, stage_2.block_size) == (32, [1, 8, 8], 64)
    assert stage_2.codebook_size == stage_1.codebook_size == 256
    # How the autoencoder is trained is no matter of the sampler's.
    assert stage_2.codebook_init == "uniform" and stage_2.perceptual_weight == 1.0


def test_presets_are_valid_and_not_shared():
    for name in PRESETS:
        datasets(f"mine: {{paths: x, preset: {name}}}")
        for family in ("vqgan", "sampler"):
            first = resolved("", family, "mine")
            first.ch_mult.append(7)
            assert resolved("", family, "mine").ch_mult != first.ch_mult


def test_a_preset_by_flag_goes_before_the_data_sets_and_its_own_values_before_both():
    datasets("mine: {paths: x, preset: ffhq, hparams: {batch_size: 5}}")
    H = resolved("--preset small --nf 64", dataset="mine")
    assert (H.preset, H.img_size, H.batch_size, H.nf) == ("small", 64, 5, 64)
    wanted = dict(preset="command line", img_size="preset small", batch_size="datasets.yaml", nf="command line")
    wanted.update(latent_shape="derived", seed="")
    assert {name: H.sources[name] for name in wanted} == wanted
    H = resolved("--preset demo", "sampler", "mine")
    assert (H.bert_n_emb, H.temp, H.codebook_size, H.latent_shape) == (128, 0.7, 256, [1, 8, 8])
    assert "did you mean small?" in refused("--preset smal")
    datasets("small: {paths: x}")  # the name of a preset, which is none of a data set
    assert (resolved("", dataset="small").img_size, resolved("", dataset="small").preset) == (256, None)


def test_the_small_preset_needs_no_weights_and_no_number_of_steps():
    stage_1 = resolved("--preset small")
    assert (stage_1.img_size, stage_1.latent_shape, stage_1.perceptual_weight) == (64, [1, 8, 8], 0.0)
    assert stage_1.disc_start_step > stage_1.train_steps > stage_1.codebook_init_step
    assert resolved("--preset small --img_size 128").latent_shape == [1, 16, 16]
    save_run("ae", stage_1)
    stage_2 = resolved(f"--sampler absorbing --ae_load_dir ae --ae_load_step {stage_1.train_steps}", "sampler")
    assert (stage_2.block_size, stage_2.total_steps, stage_2.train_steps < 10**5) == (64, 64, True)


def test_a_preset_is_recorded(capsys):
    save_run("ae", resolved("--preset small --codebook_init uniform"))
    capsys.readouterr()
    H = resolved("", "sampler")  # stage 2 follows stage 1
    assert (H.preset, H.sources["preset"], H.bert_n_emb) == ("small", "--ae_load_dir ae", 192)
    assert capsys.readouterr().err == "note: --preset small, as --ae_load_dir ae was trained with\n"
    assert resolved("--preset demo", "sampler").bert_n_emb == 128
    save_run("prior", H)
    H = resolved("--log_dir prior --resume", "sampler")
    assert (H.preset, H.bert_n_emb) == ("small", 192)
    assert "--preset demo contradicts --resume: logs/prior" in refused(
        "--preset demo --log_dir prior --resume", "sampler"
    )
    assert resolved("--preset small --log_dir prior --resume", "sampler").preset == "small"
    save_run("other", resolved("", "sampler"), preset="ABSENT", bert_n_emb=64)  # from before there was the flag
    assert resolved("--log_dir other --resume", "sampler").preset is None
    save_run("ae", resolved(""))
    words = f"--dataset churches {SAMPLER} --load_dir prior --load_step 1 --n_samples 2"
    save_run(
        "prior", resolved("--preset demo", "sampler"), img_size="ABSENT", latent_shape="ABSENT", codebook_size=1024
    )
    H = get_hparams("sampler", "", words.split(), extra=(FIDConfig,), reads=("temp",), script="s")
    assert (H.preset, H.temp) == ("demo", 0.7)  # samples are drawn as its preset does


def test_switches_undo_a_preset():
    assert resolved("", dataset="demo").ema
    assert not resolved("--no_ema", dataset="demo").ema
    assert resolved("--no_visdom").no_visdom and not resolved("--no_visdom --visdom").no_visdom


def test_quantizers_and_samplers_are_found_in_their_folders():
    from models.quantizers import QUANTIZERS
    from models.samplers import SAMPLERS

    assert sorted(config.registered("quantizers")) == sorted(QUANTIZERS)
    assert sorted(config.registered("samplers")) == sorted(SAMPLERS)


def test_flags_without_effect_are_named_once(capsys, monkeypatch):
    resolved("--greedy --greedy_epochs 3 --sample_block_size 2 --ema_beta 0.9 --load_optim --no_amp", "sampler")
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[1] for line in lines) == [
        "--ema_beta",
        "--greedy",
        "--greedy_epochs",
        "--load_optim",
        "--sample_block_size",
    ]
    assert "without --ema" in next(line for line in lines if "--ema_beta" in line)
    resolved("--ema_beta 0.9 --ema --no_load_optim --no_greedy", "sampler")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    resolved("--greedy", "sampler")
    assert capsys.readouterr().err == ""


def test_flags_that_this_script_does_not_heed(capsys):
    def noted(words, family="sampler", **kw):
        get_hparams(family, "", f"--dataset churches {words}".split(), script="s", **kw)
        return [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines()]

    assert noted(f"{SAMPLER} --diff_aug --temp 0.5 --loss_type elbo") == ["--diff_aug has no effect in this script"]
    assert noted("--ae_load_dir ae --ae_load_step 1 --sampler autoregressive --sample_steps 3") == [
        "--sample_steps has no effect without --sampler absorbing"
    ]
    assert noted("--quantizer gumbel --beta 0.5", "vqgan") == [
        "--beta has no effect without --quantizer nearest or rotation"
    ]
    assert noted("--quantizer rotation --beta 0.5 --codebook_init kmeans --train_steps 600", "vqgan") == []
    assert noted("--quantizer fsq --codebook_decay 0.5", "vqgan") == [
        "--codebook_decay has no effect without --quantizer ema"
    ]
    measuring = dict(extra=(FIDConfig,), reads=("temp", "lr"))
    assert noted(f"{SAMPLER} --n_samples 4 --temp 0.5 --sample_steps 3 --lr 1 --loss_type elbo", **measuring) == [
        "--loss_type has no effect in this script",
        "--sample_steps has no effect in this script",
    ]
    assert noted(f"{SAMPLER} --n_samples 4 --temp 0.5 --latents_path x", **measuring) == [
        "--temp has no effect beside --latents_path"
    ]
    assert noted(f"{SAMPLER} --n_samples 4 --mask_schedule fixed", **measuring) == [  # it is for sampling of type mlm
        "--mask_schedule has no effect in this script"
    ]
    reads = dict(extra=(ReconstructionConfig,), reads=("perceptual_weights",))
    assert noted("--perceptual_weights x --disc_layers 9 --beta 1", "vqgan", **reads) == [
        "--beta has no effect in this script",
        "--disc_layers has no effect in this script",
    ]


def test_runs_to_compare_with(workplace, capsys):
    for name in ("one", "two"):
        (workplace / "logs" / name).mkdir()
        (workplace / "logs" / name / "stats.jsonl").write_text("")
    assert resolved("--visdom_compare one two").visdom_compare == ["one", "two"]
    assert "did you mean one?" in refused("--visdom_compare two onee")
    assert "logs/ae has no stats.jsonl: it holds no training run" in refused("--visdom_compare ae")
    assert "is not a name under logs" in refused("--visdom_compare ../one")
    save_run("run", resolved("--visdom_compare one --seed 3"))
    H = resolved("--log_dir run --resume")  # which says anew what to compare with
    assert H.visdom_compare is None and H.seed == 3
    capsys.readouterr()
    resolved("--visdom_compare one --no_visdom")
    assert capsys.readouterr().err == "note: --visdom_compare has no effect beside --no_visdom\n"


# ---------------------------------------------------------------------- derived values


def test_derived_from_image_size_and_levels():
    H = resolved("--img_size 128 --ch_mult 1 2 4", "sampler")
    assert (H.latent_shape, H.block_size, H.attn_resolutions) == ([1, 32, 32], 1024, [32])
    H = resolved("--img_size 96 --attn_resolutions 12 6", "sampler")
    assert (H.latent_shape, H.block_size, H.attn_resolutions) == ([1, 6, 6], 36, [12, 6])
    H = resolved("--img_size 64 --ch_mult 1 --latent_shape 1 64 64 --block_size 4096", "sampler")
    assert H.attn_resolutions == [64]


def test_the_levels_follow_the_image_size(capsys):
    sides = {256: 16, 128: 16, 64: 16, 512: 16, 1024: 16, 96: 12, 112: 14, 48: 12, 32: 8, 24: 12, 16: 8, 8: 4}
    for size, side in sides.items():
        H = resolved(f"--img_size {size} --disc_layers 1")
        assert H.latent_shape == [1, side, side] and len(H.ch_mult) - 1 == math.log2(size / side), size
    assert resolved("").ch_mult == resolved("--img_size 240").ch_mult == [1, 1, 2, 2, 4]
    capsys.readouterr()
    resolved("--img_size 64")
    assert capsys.readouterr().err == "note: --ch_mult 1 2 4, chosen for --img_size 64: 16 x 16 codes\n"
    resolved("--img_size 64 --ch_mult 1 2 4")
    resolved("")
    assert capsys.readouterr().err == ""


def test_a_model_without_a_configuration_has_the_levels_of_the_paper():
    """The folder of `ae` holds none, as a published one."""
    assert resolved("--img_size 64", "sampler").ch_mult == [1, 1, 2, 2, 4]
    assert resolved("--img_size 64 --load_dir ae --load_step 2").ch_mult == [1, 1, 2, 2, 4]
    assert resolved("--img_size 64 --log_dir ae --resume").ch_mult == [1, 2, 4]  # it starts afresh
    save_run("ae", resolved("--img_size 64 --ch_mult 1 1 2 2 4"), ch_mult="ABSENT")
    assert resolved("", "sampler").ch_mult == [1, 1, 2, 2, 4]


def test_learning_rate_follows_the_batch_size():
    assert resolved("--batch_size 4").lr == pytest.approx(4 * 4.5e-6)
    assert resolved("--batch_size 4 --base_lr 1e-5").lr == pytest.approx(4e-5)
    assert resolved("--batch_size 4 --lr 0.5").lr == 0.5


def test_a_base_rate_without_effect_is_named(capsys):
    save_run("run", resolved("--batch_size 4"))
    capsys.readouterr()
    cases = (("--lr 0.5", "churches", "0.5"), ("", "demo", "0.002"), ("--log_dir run --resume", "churches", "1.8e-05"))
    for words, dataset, lr in cases:
        resolved(f"{words} --base_lr 1e-5", dataset=dataset)
        assert f"note: --base_lr has no effect: --lr is {lr}, from " in capsys.readouterr().err
    for words in ("--base_lr 1e-5", "--base_lr 4.5e-6 --log_dir run --resume"):
        resolved(words)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("family", "words", "named"),
    [
        ("vqgan", "--latent_shape 1 8 8", ["--latent_shape 1 8 8", "--img_size 256", "--ch_mult", "1 16 16"]),
        ("vqgan", "--latent_shape 16 16", ["--latent_shape 16 16", "--img_size"]),
        ("vqgan", "--latent_shape 3 16 16", ["--latent_shape", "1 16 16"]),
        ("vqgan", "--attn_resolutions 16 24", ["--attn_resolutions 24", "--img_size", "--ch_mult"]),
        ("vqgan", "--img_size 100", ["--img_size 100", "--ch_mult", "give --img_size 96 or 112"]),
        ("vqgan", "--img_size 500", ["--img_size 500", "--ch_mult", "give --img_size 480 or 512"]),
        ("vqgan", "--img_size 102 --ch_mult 1 1 1", ["--img_size 102", "--ch_mult", "give --img_size 100 or 104"]),
        ("vqgan", "--ch_mult" + " 1" * 12, ["--img_size 256", "--ch_mult", "give --img_size 2048"]),
        ("vqgan", "--ch_mult" + " 1" * 40, ["--img_size 256", "--ch_mult", "give fewer levels"]),
        ("vqgan", "--nf 48", ["--nf 48", "give --nf 32 or 64"]),
        ("vqgan", "--nf 32 --img_size 8 --ch_mult 2 2 1 2 --disc_layers 1", ["--nf 32", "--img_size 8", "1 x 1 codes"]),
        ("vqgan", "--disc_layers 7", ["--disc_layers 7", "--img_size 256", "give --disc_layers 6 or fewer"]),
        ("vqgan", "--img_size 4 --disc_layers 1", ["--disc_layers 1", "--img_size 4", "give --img_size 6 or more"]),
        (
            "vqgan",
            "--codebook_init kmeans --train_steps 100",
            ["--train_steps 100", "give --train_steps 500 or more, or --codebook_init_step 100 or less"],
        ),
        ("vqgan", "--quantizer gumbel --codebook_init kmeans", ["--quantizer gumbel", "--codebook_init kmeans"]),
        ("vqgan", "--quantizer gumbel --codebook_restart_steps 5", ["--quantizer", "--codebook_restart_steps 5"]),
        ("vqgan", "--custom_dataset_path x", ["--custom_dataset_path", "--dataset churches"]),
        ("sampler", "--block_size 64", ["--block_size 64", "--latent_shape 1 16 16"]),
        ("sampler", "--bert_n_emb 100", ["--bert_n_head 8", "give --bert_n_emb 96 or 104"]),
        ("sampler", "--sample_type mlm --sample_order halton", ["--sample_order halton", "--sample_type mlm"]),
        ("sampler", "--sample_type mlm --sample_schedule cosine", ["--sample_schedule cosine", "--sample_type mlm"]),
        ("sampler", "--sample_type mlm --remask_eta 0.1", ["--remask_eta 0.1", "--sample_type mlm"]),
        ("sampler", "--sampler autoregressive --remask_eta 1", ["--remask_eta 1", "--sampler autoregressive"]),
        ("sampler", "--sampler autoregressive --temp_end 0.5", ["--temp_end 0.5", "--sampler autoregressive"]),
        ("sampler", "--sampler autoregressive --top_k 2000", ["--top_k 2000", "1024", "give fewer, or 0"]),
        ("sampler", "--sampler autoregressive --sample_order halton", ["--sample_order halton", "--sampler auto"]),
        ("sampler", "--sampler absorbing --total_steps 1", ["--total_steps 1", "--loss_type reweighted_elbo"]),
    ],
)
def test_contradictions_name_both_flags(family, words, named):
    line = refused(words, family)
    for part in named:
        assert part in line


def test_one_time_step_trains_with_the_other_losses_and_is_measured_with_any():
    for words in (
        "--sampler absorbing --loss_type elbo",
        "--sampler absorbing --loss_type mlm",
        "--sampler autoregressive",
    ):
        assert resolved(f"--total_steps 1 {words}", "sampler").total_steps == 1
    words = f"--dataset churches {SAMPLER} --n_samples 4 --total_steps 1"
    assert get_hparams("sampler", "", words.split(), extra=(FIDConfig,), script="s").total_steps == 1


def test_a_preset_gives_way_without_contradiction():
    H = resolved("--quantizer gumbel", dataset="demo")  # the demo places its codes by k-means
    assert (H.codebook_init, H.codebook_restart_steps) == ("uniform", 0)
    assert resolved("--img_size 64", dataset="demo").latent_shape == [1, 16, 16]


def test_custom_needs_a_path():
    assert "--custom_dataset_path" in refused("", dataset="custom")


def test_the_printed_stage_2_has_a_batch_that_the_processes_can_share(monkeypatch):
    H = {name: resolved(f"--preset {name}") for name in PRESETS}
    assert all("batch_size" not in size_of_stage_2(each) for each in H.values())
    monkeypatch.setenv("WORLD_SIZE", "8")
    batches = {name: size_of_stage_2(each).get("batch_size") for name, each in H.items()}
    assert batches == dict(bedrooms=24, churches=24, custom=24, demo=None, ffhq=24, small=None)


def test_every_process_takes_as_much_of_a_batch(monkeypatch):
    assert refused("--batch_size 6 --accumulate_steps 4").endswith(
        "--batch_size 6 (of all processes together) is not divisible by --accumulate_steps 4: give --batch_size 4 or 8"
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    H = resolved("--batch_size 6 --accumulate_steps 2")
    assert H.lr == 6 * 4.5e-6 and H.num_workers == 1
    assert "not divisible by 3 processes times --accumulate_steps 4" in refused("--batch_size 6 --accumulate_steps 4")
    assert "not divisible by 3 processes" in refused("--batch_size 4", "sampler")


# ---------------------------------------------------------------------- precedence and loaded models


def test_precedence():
    assert resolved("", "sampler").codebook_size == 1024  # class default
    datasets("mine: {paths: x, hparams: {codebook_size: 300, emb_dim: 32, batch_size: 5, beta: 0.5}}")
    H = resolved("", "sampler", "mine")
    assert (H.codebook_size, H.batch_size) == (300, 5)  # < data set
    save_run("ae", resolved("--codebook_size 400 --batch_size 9", dataset="mine"))
    H = resolved("", "sampler", "mine")
    assert (H.codebook_size, H.emb_dim, H.batch_size) == (400, 32, 5)  # < loaded model, its shape alone
    H = resolved("--batch_size 7 --codebook_size 400", "sampler", "mine")
    assert (H.codebook_size, H.batch_size) == (400, 7)  # < command line


def test_loaded_vqgan_gives_its_architecture_only():
    save_run("old", resolved("--img_size 64 --nf 32 --ch_mult 1 2 --ndf 16 --lr 0.5 --batch_size 9 --ema"))
    H = resolved("--load_dir old --load_step 10")
    assert (H.img_size, H.nf, H.ch_mult, H.ndf, H.latent_shape) == (64, 32, [1, 2], 16, [1, 32, 32])
    assert (H.lr, H.batch_size, H.ema, H.log_dir) == (3 * 4.5e-6, 3, False, "test")
    assert resolved("--load_dir old --load_step 0").img_size == 256  # nothing is loaded


def test_what_a_resume_changes_is_known_and_the_rest_is_not_named():
    save_run("run", resolved("--img_size 64 --lr 1e-4 --ema --steps_per_log 3"), ema_warmup="ABSENT")
    H = resolved("--log_dir run --resume --lr 1e-3 --steps_per_log 3 --no_ema --no_visdom --ema_warmup")
    assert sorted(H.changed) == ["ema True -> False", "ema_warmup False -> True", "lr 1e-4 -> 1e-3"]
    assert resolved("--log_dir nothing --resume --lr 1e-3").changed == [] == resolved("--lr 1e-3").changed
    assert (shown(1e-3), shown(1.35e-5), shown(0.5), shown([1, 2]), shown(True)) == (
        "1e-3",
        "1.35e-5",
        0.5,
        "1 2",
        True,
    )


def test_resume_takes_everything_that_holds():
    save_run("run", resolved("--img_size 64 --lr 0.5 --ema --seed 7 --train_steps 50 --load_optim --steps_per_log 3"))
    H = resolved("--log_dir run --resume --train_steps 80")
    assert (H.img_size, H.lr, H.ema, H.seed, H.steps_per_log) == (64, 0.5, True, 7, 3)
    assert (H.train_steps, H.resume, H.load_optim, H.log_dir) == (80, True, True, "run")
    assert resolved("--log_dir nothing --resume").img_size == 256  # nothing there: starts afresh


def test_a_sampler_takes_its_autoencoder_and_its_own_shape():
    save_run("ae", resolved("--quantizer gumbel --img_size 64"))
    save_run("old", resolved("--bert_n_emb 64 --total_steps 32 --lr 0.5", "sampler"))
    H = resolved("--load_dir old --load_step 3", "sampler")
    assert (H.quantizer, H.img_size, H.block_size) == ("gumbel", 64, 256)
    assert (H.bert_n_emb, H.total_steps, H.lr) == (64, 32, 2e-4)
    assert resolved("", "sampler", "demo").quantizer == "gumbel"  # the preset's k-means does not interfere


def test_what_a_loaded_sampler_says_unless_the_command_line_does():
    save_run("old", resolved("--mask_schedule fixed --steps_per_eval 7 --sampler absorbing", "sampler"))
    H = resolved("--load_dir old --load_step 3", "sampler")
    assert (H.mask_schedule, H.steps_per_eval) == ("fixed", 0)  # a new run follows its own flags
    assert resolved("--load_dir old --load_step 3 --mask_schedule random", "sampler").mask_schedule == "random"

    def measured(words, dataset="churches"):
        words = f"--dataset {dataset} {SAMPLER} --load_dir old --load_step 3 --n_samples 2 {words}"
        return get_hparams("sampler", "", words.split(), extra=(FIDConfig,), script="s").steps_per_eval

    assert measured("") == 7  # the training images are those that it was trained on
    assert measured("--steps_per_eval 0") == 0 and measured("", "ffhq") == 0
    H = resolved("--steps_per_eval 7 --custom_dataset_path here", "sampler", "custom")
    save_run("old", H)
    H.script = "calc_FID"
    save_run("fid", H)
    assert measured("--custom_dataset_path ./here", "custom") == 7
    assert measured("--custom_dataset_path elsewhere", "custom") == 0
    assert measured("--custom_dataset_path here --resume --log_dir fid", "custom") == 7  # --resume is not heeded


@pytest.mark.parametrize("file", ["config.json", "saved_models/vqgan_ema_9.th", "saved_models/absorbing_9.th"])
def test_a_measurement_does_not_write_into_a_training_run(file):
    save_run("run", resolved("", "sampler"))
    if file != "config.json":
        os.remove("logs/run/config.json")
        os.makedirs("logs/run/saved_models")
        open(f"logs/run/{file}", "w").close()
    words = f"--dataset churches {SAMPLER} --n_samples 2 --log_dir".split()
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        get_hparams("sampler", "", [*words, "run"], extra=(FIDConfig,), script="s")
    assert stop.value.code == 2
    assert "--log_dir run: logs/run holds a training run: give another --log_dir" in err.getvalue()
    assert "run_results" in err.getvalue()
    os.makedirs("logs/nll/saved_models")  # of calc_approximate_ELBO
    open("logs/nll/saved_models/logsigma_9.th", "w").close()
    assert get_hparams("sampler", "", [*words, "nll"], extra=(FIDConfig,), script="s").log_dir == "nll"


def test_custom_needs_its_folder_where_images_are_read(capsys):
    words = f"--dataset custom {SAMPLER} --n_samples 2".split()
    with pytest.raises(SystemExit):
        get_hparams("sampler", "", words, extra=(FIDConfig,), script="s")
    assert "--dataset custom needs --custom_dataset_path" in capsys.readouterr().err
    H = get_hparams("sampler", "", words, extra=(FIDConfig,), script="s", reads_images=False)
    assert H.data_entry["paths"] == [] and H.dataset == "custom"


def test_a_measurement_takes_nothing_from_a_run_that_it_does_not_resume(capsys):
    H = resolved("--temp 0.3 --seed 7 --disc_layers 5", "sampler")
    H.script = "calc_approximate_ELBO"
    save_run("run", H)
    words = f"--dataset churches {SAMPLER} --n_samples 2 --log_dir run --resume"
    H = get_hparams("sampler", "", words.split(), extra=(FIDConfig,), reads=("temp",), script="s")
    assert (H.temp, H.seed) == (1.0, 0) and "--resume has no effect" in capsys.readouterr().err
    save_run("ae", resolved("--disc_layers 5"))
    words = "--dataset churches --load_dir ae --load_step 1 --disc_layers 4"
    get_hparams("vqgan", "", words.split(), extra=(ReconstructionConfig,), script="s")
    assert "contradicts" in refused("--load_dir ae --load_step 1 --disc_layers 4")


@pytest.mark.parametrize(
    ("family", "words", "named"),
    [
        ("sampler", "--img_size 256", ["--img_size 256", "--ae_load_dir ae", "--img_size 64"]),
        ("sampler", "--ch_mult 1 2", ["--ch_mult 1 2", "--ae_load_dir ae", "--ch_mult 1 1 2 2 4"]),
        ("sampler", "--load_dir s --load_step 2 --bert_n_emb 8", ["--bert_n_emb 8", "--load_dir s", "512"]),
        ("sampler", "--log_dir s --resume --total_steps 8", ["--total_steps 8", "--resume", "256"]),
        ("vqgan", "--load_dir ae --load_step 2 --ndf 8", ["--ndf 8", "--load_dir ae", "--ndf 64"]),
        ("vqgan", "--log_dir ae --resume --nf 32", ["--nf 32", "--resume", "--nf 128"]),
        ("vqgan", "--log_dir s --resume", ["--resume", "logs/s", "--log_dir"]),
        ("sampler", "--log_dir ae --resume", ["--resume", "logs/ae", "--log_dir"]),
    ],
)
def test_contradicting_a_loaded_model(family, words, named):
    save_run("ae", resolved("--img_size 64 --ch_mult 1 1 2 2 4"))
    save_run("s", resolved("", "sampler"))
    line = refused(words, family)
    for part in named:
        assert part in line


def test_resuming_with_another_data_set():
    save_run("run", resolved(""))
    line = refused("--log_dir run --resume", dataset="ffhq")
    assert "--dataset ffhq" in line and "--resume" in line and "--dataset churches" in line


def test_models_that_do_not_belong_together():
    save_run("ae", resolved("--codebook_size 512"))
    save_run("old", resolved("", "sampler"), codebook_size=1024)
    line = refused("--load_dir old --load_step 3", "sampler")
    assert all(part in line for part in ("--load_dir old", "--ae_load_dir ae", "512", "1024"))


def test_a_configuration_with_gaps_or_strangers_is_fine():
    save_run("ae", resolved("--img_size 64"), nf="ABSENT", unheard_of=[{}], lr=None)
    H = resolved("", "sampler")
    assert (H.img_size, H.nf, H.lr) == (64, 128, 2e-4) and not hasattr(H, "unheard_of")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"format": 1}',
        '{"hparams": 3}',
        '{"hparams": ["nf"]}',
        "\xff\xfe",
        "[" * 100000,
        '{"hparams": {"nf": "128"}}',
        '{"hparams": {"nf": -32}}',
        '{"hparams": {"ch_mult": 4}}',
        '{"hparams": {"ch_mult": [1, "2"]}}',
        '{"hparams": {"ema": 1}}',
        '{"hparams": {"lr": NaN}}',
        '{"hparams": {"quantizer": "magic"}}',
        '{"hparams": {"nf": true}}',
    ],
)
def test_damaged_configuration(workplace, text):
    (workplace / "logs/ae/config.json").write_bytes(text.encode("latin-1"))
    line = refused("", "sampler")
    assert os.path.join("logs", "ae", "config.json") in line and "damaged" in line and "remove it" in line


def test_unreadable_configuration(workplace):
    (workplace / "logs/ae/config.json").mkdir()
    assert "config.json cannot be read" in refused("", "sampler")
    (workplace / "logs/file").write_text("")
    assert "logs/file/config.json cannot be read" in refused("--log_dir file --resume")


def test_an_autoencoder_without_its_codes_is_refused():
    save_run("ae", resolved("--codebook_init kmeans --codebook_init_step 5"))
    for step in (5, 6):
        assert resolved(f"--sampler absorbing --ae_load_dir ae --ae_load_step {step}", "sampler").ae_load_step == step
    line = refused("--sampler absorbing --ae_load_dir ae --ae_load_step 4", "sampler")
    assert "--ae_load_step 4: logs/ae puts its codes in place at step 5 (--codebook_init kmeans)" in line


def test_missing_folders_are_named_with_what_there_is():
    assert "did you mean ae?" in refused("--sampler absorbing --ae_load_dir aes --ae_load_step 1", "sampler")
    open("logs/README.md", "w").close()  # which is no run
    assert refused("--load_dir nothing --load_step 4").endswith("logs/ holds ae")
    assert "did you mean ae?" in refused("--load_dir logs/ae --load_step 4")
    assert resolved("--load_dir nothing --load_step 4 --dry_run").load_step == 4  # needs only the shapes


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", ".", "./", ".."])
def test_names_stay_under_logs(name):
    assert "under logs/" in refused(f"--log_dir {name}")
    assert "under logs/" in refused(f"--load_dir {name} --load_step 1")
    assert "under logs/" in refused(f"--sampler absorbing --ae_load_step 1 --ae_load_dir {name}", "sampler")


def test_names_stay_under_logs_on_windows(monkeypatch):
    monkeypatch.setattr(sources, "Path", PureWindowsPath)
    for name in ("C:evil", "C:", r"C:\x", r"\x", r"a\..\..\x", r"\\host\share\x"):
        with pytest.raises(UsageError, match="is not a name under logs"):
            sources.run_folder(name)
    assert sources.run_folder(r"a\b").name == r"a\b"


def test_empty_names_and_deep_names():
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
        get_hparams("vqgan", "", ["--dataset", "churches", "--log_dir", ""])
    assert "under logs/" in err.getvalue()
    assert resolved("--log_dir a/b").log_dir == "a/b"
    assert "too long" in refused(f"--resume --log_dir {'x' * 300}")


# ---------------------------------------------------------------------- datasets.yaml


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, ["there is no datasets.yaml beside logs/: copy"]),
        ("mine: [", ["datasets.yaml is not valid YAML"]),
        ("\x00", ["datasets.yaml is not valid YAML"]),
        ("mine: {paths: 2001-99-99}", ["datasets.yaml is not valid YAML"]),
        ("[" * 5000, ["datasets.yaml is not valid YAML"]),
        ("", ["one entry per data set"]),
        ("- mine", ["one entry per data set"]),
        ("other: {paths: x}", ["--dataset mine", "no entry", "other, custom"]),
        ("mine2: {paths: x}", ["--dataset mine", "did you mean mine2?"]),
        ("mine:", ["'mine'", "'paths'"]),
        ("mine: some/folder", ["'mine'", "'paths'"]),
        ("mine: {path: x}", ["'mine'", "'paths'"]),
        ("mine: {paths: }", ["'mine'", "'paths'"]),
        ("mine: {paths: 3}", ["'mine'", "'paths'"]),
        ("mine: {paths: [x, '']}", ["'mine'", "'paths'"]),
        ("mine: {paths: x, val_paths: 3}", ["'mine'", "'val_paths'"]),
        ("mine: {paths: x, category: 3}", ["'mine'", "'category'"]),
        ("mine: {paths: x, presett: demo}", ["'mine'", "presett", "did you mean preset?"]),
        ("mine: {paths: x, preset: demmo}", ["'mine'", "demmo", "did you mean demo?"]),
        ("mine: {paths: x, preset: [demo]}", ["'mine'", "preset"]),
        ("mine: {paths: x, hparams: 3}", ["'mine'", "'hparams'"]),
        ("mine: {paths: x, hparams: [nf]}", ["'mine'", "'hparams'"]),
        ("mine: {paths: x, hparams: {vqgan: 3}}", ["'mine'", "'hparams'"]),
        ("mine: {paths: x, hparams: {nff: 3}}", ["'mine'", "nff", "did you mean nf?"]),
        ("mine: {paths: x, hparams: {3: 3}}", ["'mine'", "no such flag: 3"]),
        ("mine: {paths: x, hparams: {dataset: y}}", ["'mine'", "no such flag: dataset"]),
        ("mine: {paths: x, hparams: {preset: small}}", ["'mine'", "'preset' belongs beside 'hparams'"]),
        ("mine: {paths: x, hparams: {nf: big}}", ["'mine'", "--nf 'big' must be a whole number"]),
        ("mine: {paths: x, hparams: {nf: 64.0}}", ["'mine'", "--nf 64.0 must be a whole number"]),
        ("mine: {paths: x, hparams: {nf: 3}}", ["'mine'", "--nf 3 is too small"]),
        ("mine: {paths: x, hparams: {nf: }}", ["'mine'", "--nf None"]),
        ("mine: {paths: x, hparams: {lr: fast}}", ["'mine'", "--lr 'fast' must be a number"]),
        ("mine: {paths: x, hparams: {lr: .nan}}", ["'mine'", "--lr nan is not a finite number"]),
        ("mine: {paths: x, hparams: {ch_mult: 4}}", ["'mine'", "--ch_mult 4 must be a list"]),
        ("mine: {paths: x, hparams: {ch_mult: []}}", ["'mine'", "--ch_mult [] must be a list"]),
        ("mine: {paths: x, hparams: {ema: maybe}}", ["'mine'", "--ema 'maybe' must be true or false"]),
        ("mine: {paths: x, hparams: {quantizer: magic}}", ["'mine'", "--quantizer magic", "gumbel"]),
        ("mine: {paths: x, hparams: {bert_n_head: 0}}", ["'mine'", "--bert_n_head 0 is too small"]),
    ],
)
def test_faults_of_datasets_yaml(workplace, text, named):
    (workplace / "datasets.yaml").unlink() if text is None else datasets(text)
    line = refused("", dataset="mine")
    for part in named:
        assert part in line


def test_a_users_entry_needs_only_paths():
    datasets("mine: {paths: my/folder}\n7: {paths: [a, b]}")
    H = resolved("", dataset="mine")
    assert H.data_entry["paths"] == ["my/folder"] and "'mine' of datasets.yaml" in H.data_entry["origin"]
    assert (H.img_size, H.batch_size) == (256, 3)
    assert (resolved("", "sampler", "mine").lr, resolved("", dataset="7").data_entry["paths"]) == (2e-4, ["a", "b"])


def test_local_entries_are_read_over_the_shared_ones(workplace):
    datasets("mine: {paths: shared, category: church_outdoor, preset: demo}\nother: {paths: a}")
    (workplace / "datasets.local.yaml").write_text("mine: {paths: own, val_paths: held, category: }\nnew: {paths: b}")
    H = resolved("", dataset="mine")
    found = {k: v for k, v in H.data_entry.items() if k not in ("name", "file")}
    assert found == dict(
        paths=["own"], val_paths=["held"], preset="demo", origin="the entry 'mine' of datasets.local.yaml"
    )
    assert H.img_size == 32
    origins = [resolved("", dataset=name).data_entry["origin"] for name in ("other", "new")]
    assert origins == ["the entry 'other' of datasets.yaml", "the entry 'new' of datasets.local.yaml"]
    (workplace / "datasets.local.yaml").write_text("mine: {paths: }")
    assert "datasets.local.yaml, 'mine': needs an attribute 'paths'" in refused("", dataset="mine")
    (workplace / "datasets.local.yaml").write_text("- mine")
    assert "datasets.local.yaml must hold one entry per data set" in refused("", dataset="mine")
    (workplace / "datasets.yaml").unlink()
    (workplace / "datasets.local.yaml").write_text("new: {paths: b}")
    assert resolved("", dataset="new").data_entry["paths"] == ["b"], "it may be the only one"


def test_own_values_of_an_entry():
    datasets("""
mine:
  paths: x
  preset: ffhq
  hparams:
    img_size: 128
    lr: 1e-3           # YAML 1.1 takes this for text
    bert_n_emb: 64     # a flag of the other stage's is no mistake
    vqgan: {batch_size: 2}
    sampler: {batch_size: 50, lr: 2.0e-3}
""")
    stage_1, stage_2 = resolved("", dataset="mine"), resolved("", "sampler", "mine")
    assert (stage_1.img_size, stage_1.lr, stage_1.batch_size) == (128, 1e-3, 2)
    assert not hasattr(stage_1, "bert_n_emb")
    assert (stage_2.img_size, stage_2.lr, stage_2.batch_size) == (128, 2e-3, 50)
    assert (stage_2.bert_n_emb, stage_2.warmup_iters, stage_2.latent_shape) == (64, 30000, [1, 8, 8])


# ---------------------------------------------------------------------- ranges

POSITIVE = (
    "batch_size",
    "train_steps",
    "steps_per_log",
    "steps_per_update_ema",
    "lr",
    "base_lr",
    "img_size",
    "nf",
    "ch_mult",
    "res_blocks",
    "attn_resolutions",
    "latent_shape",
    "emb_dim",
    "codebook_size",
    "ndf",
    "disc_layers",
    "visdom_port",
    "bert_n_emb",
    "bert_n_head",
    "bert_n_layers",
    "block_size",
    "total_steps",
    "sample_steps",
    "temp",
)
ALL_FLAGS = config.flags_of(config.sampler_family())
NUMERIC = [flag for flag in ALL_FLAGS if flag.type in (int, float)]


@pytest.mark.parametrize("flag", NUMERIC, ids=lambda flag: flag.name)
def test_out_of_range(flag):
    """Whatever is not a number in range is refused in one line that names the flag."""
    bad = ["-1", "nan", "inf", "-inf", "1e999", "x", *(["0"] if flag.name in POSITIVE else [])]
    bad += ["1.5", str(10**30), "9" * 5000] if flag.type is int else ["-1e-9"]
    for value in bad:
        line = refused(f"{SAMPLER} --{flag.name} {value}", "sampler")
        assert f"--{flag.name}" in line, value


def test_numbers_and_lists_as_people_write_them():
    assert resolved("--train_steps 1e3").train_steps == 1000 and resolved("--train_steps 2.5e+2").train_steps == 250
    for words in ("--ch_mult 1,2,2", "--ch_mult 1, 2, 2", "--ch_mult 1 2,2"):
        assert resolved(words).ch_mult == [1, 2, 2]
    for words in ("1.5", "1e-1", "2.5e0", "1,2", "1.2.3e5"):
        assert f"--train_steps: '{words}' is not a whole number" in refused(f"--train_steps {words}")
    assert "--lr: 'fast' is not a number" in refused("--lr fast")
    assert "--ch_mult [] must be a list" in refused("--ch_mult ,")


def test_a_switch_takes_no_value():
    for words in ("--amp True", "--amp=1", "--amp off --seed 1"):
        assert refused(words).endswith("--amp takes no value: write --amp or --no_amp")
    assert "--no_visdom takes no value: write --no_visdom or --visdom" in refused("--no_visdom false")
    assert "unexpected word 'fast'" in refused("--amp fast")


def test_a_probability_and_a_decay_have_an_upper_bound():
    for words in ("--ema_beta 1.01", "--attn_pdrop 1", "--visdom_port 65536", "--codebook_size 1000001"):
        assert "too large" in refused(words, "sampler")


def test_a_temperature_has_a_lower_bound():
    assert refused("--temp 1e-38", "sampler").endswith("--temp 1e-38 is too small: the least is 1e-37")


WORDS = st.one_of(
    st.sampled_from(
        [
            "0",
            "1",
            "-1",
            "3",
            "32",
            "64",
            "256",
            "nan",
            "inf",
            "-inf",
            "1e-320",
            "1e400",
            "-0.0",
            "0.5",
            "x",
            "",
            "--",
            "-",
            "1_0",
            str(2**31),
            str(2**63),
            str(10**400),
            "churches",
            "ae",
            "load_dir",
        ]
    ),
    st.integers(-4, 600).map(str),
    st.floats().map(str),
    st.text(st.characters(blacklist_characters="\x00"), max_size=6),
)
PLAUSIBLE = {int: ["1", "2", "32", "64", "256"], float: ["0.5", "1e-3", "1"], str: ["ae", "churches"], bool: []}


@st.composite
def flag_and_words(draw):
    """A flag with what follows it, more often plausible than not."""
    flag = draw(st.sampled_from(ALL_FLAGS))
    if flag.type is bool:
        return [draw(st.sampled_from([f"--{flag.name}", f"--no_{flag.name}"]))]
    good = st.sampled_from([str(c) for c in flag.meta.get("choices") or PLAUSIBLE[flag.type]])
    word = st.one_of(good, good, WORDS)
    return [f"--{flag.name}", *draw(st.lists(word, max_size=4) if flag.is_list else st.tuples(word))]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(family=st.sampled_from(["vqgan", "sampler"]), flags=st.lists(flag_and_words(), max_size=3))
def test_any_command_line_works_or_is_refused_in_one_line(family, flags):
    argv = ["--dataset", "churches"] + (SAMPLER.split() if family == "sampler" else [])
    argv += [word for words in flags for word in words]
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            H = get_hparams(family, "", argv)
    except SystemExit as stop:
        assert stop.code == 2
        assert len(err.getvalue().splitlines()) == 1, err.getvalue()
        return
    side = H.img_size // 2 ** (len(H.ch_mult) - 1)
    assert H.latent_shape == [1, side, side] and H.lr > 0 and math.isfinite(H.lr)
    json.dumps(H.to_dict())

"""Both stages end to end on tiny models, in this process: every kind of data, quantizer, sampler, precision."""

import json
import os
import signal
from pathlib import Path

import lmdb
import pytest
import torch
from conftest import draw_shapes, free_port
from PIL import Image
from scripts import run, sampler_flags, train_stage_1, train_stage_2, vqgan_flags

import train_sampler
import train_vqgan
import utils.training.run_display
from experiments.common.calls import curve, rows
from experiments.common.weights import has_perceptual, load_autoencoder, load_sampler
from hparams import get_hparams
from hparams.config import QUANTIZERS
from models.build import build_vqgan
from utils.core.checkpoint import Checkpoints
from utils.core.errors import UserError
from utils.core.files import load_tensors, save_tensors


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vqgan_H(*args):
    return get_hparams("vqgan", "", vqgan_flags(*args))


def sampler_H(*args, **kw):
    return get_hparams("sampler", "", sampler_flags(*args, **kw))


def write_lmdb(path, images):
    env = lmdb.open(str(path), map_size=1 << 24)
    with env.begin(write=True) as txn:
        for image in sorted(images.iterdir()):
            txn.put(image.stem.encode(), image.read_bytes())
    env.close()


def test_both_stages_learn_and_sample(here, shapes):
    events = "--train_steps 60 --steps_per_eval 30 --steps_per_save_output 30 --ema --steps_per_log 5"
    train_stage_1(shapes, "ae", events)
    loss = curve(Path("logs/ae"), "loss")
    assert len(loss) == 12
    assert loss[-1] < 0.6 * loss[0]
    assert len(curve(Path("logs/ae"), "val_l1")) == 2
    assert 1 <= curve(Path("logs/ae"), "perplexity")[-1] <= 16
    train_stage_2(shapes, "prior", "ae", 60, events)
    bits = curve(Path("logs/prior"), "bits")
    assert bits[-1] < bits[0]
    assert len(curve(Path("logs/prior"), "val_bits")) == 2
    assert any(json.loads(Path("logs/prior/bars.json").read_text())["loss_history"]["values"]), "of the trained sampler"
    for name in ("logs/ae/images/reconstructions_60.png", "logs/prior/images/samples_60.png"):
        with Image.open(name) as picture:
            assert min(picture.size) >= 256
    for name in (
        "config.json",
        "log.txt",
        "stats.jsonl",
        "saved_stats/stats_60",
        "saved_models/absorbing_60.th",
        "saved_models/absorbing_ema_60.th",
        "saved_models/absorbing_optim_60.th",
    ):
        assert Path("logs/prior", name).is_file(), name


def test_stage_1_and_2_on_an_lsun_lmdb(here, shapes):
    (here / "lsun").mkdir()
    write_lmdb(here / "lsun/church_outdoor_train_lmdb", shapes)
    write_lmdb(here / "lsun/church_outdoor_val_lmdb", draw_shapes(here / "more", 7, seed=5))
    Path("datasets.yaml").write_text("churches: {paths: lsun, category: church_outdoor}\n")
    tiny = vqgan_flags("unused", "ae", "--train_steps 4 --steps_per_eval 2 --num_workers 2")
    at = tiny.index("--dataset")
    named = [*tiny[:at], "--dataset", "churches", *tiny[at + 4 :]]
    train_vqgan.train(get_hparams("vqgan", "", named))
    assert "47 images of 'churches' (40 train, 7 validate)" in Path("logs/ae/log.txt").read_text()
    flags = sampler_flags("unused", "prior", "ae", 4, "--train_steps 4 --steps_per_eval 2")
    at = flags.index("--dataset")
    train_sampler.train(get_hparams("sampler", "", [*flags[:at], "--dataset", "churches", *flags[at + 4 :]]))
    sizes = sorted(len(load_tensors(p)["tensors"]["ids"]) for p in Path("latents").iterdir())
    assert sizes == [7, 40]


def test_both_stages_on_mixed_and_partly_broken_images(here, capsys):
    folder = draw_shapes(here / "images", 60)
    (folder / "sub").mkdir()
    for i, (mode, size, name) in enumerate(
        [
            ("RGBA", (40, 20), "a.png"),
            ("L", (17, 50), "sub/b.jpg"),
            ("CMYK", (30, 30), "c.jpeg"),
            ("P", (9, 9), "d.bmp"),
            ("RGB", (64, 65), "sub/e.webp"),
            ("1", (20, 33), "f.PNG"),
        ]
    ):
        Image.new(mode, size, i).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "cut.png").write_bytes((folder / "0000.png").read_bytes()[:40])
    train_stage_1(folder, "ae", "--train_steps 20")
    train_stage_2(folder, "prior", "ae", 20, "--train_steps 3")
    printed = capsys.readouterr().out
    for name in ("empty.png", "text.jpg", "cut.png"):
        assert printed.count(f"{name}' cannot be decoded") == 2  # once in each run
    (cache,) = Path("latents").iterdir()
    assert load_tensors(cache)["tensors"]["ids"].shape == (66, 16)


def test_too_many_broken_images_stop_the_run(here):
    folder = draw_shapes(here / "images", 20)
    for i in range(5):
        (folder / f"0{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be decoded"):
        train_stage_1(folder, "ae", "--train_steps 20")


@pytest.mark.parametrize(
    "sampler,more",
    [
        ("absorbing", "--mask_schedule fixed --loss_type mlm --sample_type mlm"),
        ("absorbing", "--loss_type elbo --attn_pdrop 0.1 --embd_pdrop 0.1"),
        ("autoregressive", ""),
    ],
)
def test_gumbel_codes_feed_every_sampler(here, shapes, sampler, more):
    train_stage_1(shapes, "ae", "--quantizer gumbel --gumbel_straight_through --train_steps 3")
    train_stage_2(
        shapes,
        "prior",
        "ae",
        3,
        f"--train_steps 6 --steps_per_save_output 6 --steps_per_eval 3 {more}",
        sampler=sampler,
    )
    assert all(value == value for value in curve(Path("logs/prior"), "loss"))
    assert Path(f"logs/prior/saved_models/{sampler}_6.th").is_file()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision(here, shapes, dtype):
    amp = f"--amp --amp_dtype {dtype}"
    train_stage_1(shapes, "ae", f"--train_steps 12 --disc_start_step 4 --diff_aug {amp}")
    train_stage_2(shapes, "prior", "ae", 12, f"--train_steps 12 {amp}")
    assert (dtype in Path("logs/ae/log.txt").read_text()) and curve(Path("logs/ae"), "d_loss")
    if dtype == "fp16":
        assert load_tensors("logs/ae/saved_stats/stats_12")["precision"]["scaler"]["scale"] > 0


def test_crops_of_both_stages(here, shapes, capsys):
    """Three views of each of 38 images, as they are and mirrored; validation has the two others, as they are."""
    events = "--steps_per_eval 2 --horizontal_flip"
    train_stage_1(shapes, "plain", f"--train_steps 2 {events}")
    train_stage_1(shapes, "ae", f"--train_steps 2 --random_crop 0.5 {events}")
    assert curve(Path("logs/ae"), "l1") != curve(Path("logs/plain"), "l1")
    train_stage_2(shapes, "one", "ae", 2, f"--train_steps 2 {events}")
    before = sorted(Path("latents").iterdir())
    train_stage_2(shapes, "three", "ae", 2, f"--train_steps 2 --crops 3 {events}")
    assert len(before) == 3 and len(list(Path("latents").iterdir())) == 7
    assert "230 code sequences of 'custom' (228 train, 2 validate)" in Path("logs/three/log.txt").read_text()
    assert json.loads(Path("logs/three/config.json").read_text())["hparams"]["random_crop"] == 0.5
    for name in ("one", "three"):
        assert len(curve(Path("logs", name), "val_bits")) == 1
    train_stage_2(shapes, "three", "ae", 2, f"--train_steps 4 {events} --resume")
    with pytest.raises(SystemExit):
        sampler_H(shapes, "other", "plain", 2, "--crops 3")
    assert "--crops 3 needs a VQGAN that was trained with --random_crop" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vqgan_H(shapes, "other", "--random_crop 0.5 --cache_images")
    assert "--random_crop 0.5 contradicts --cache_images" in capsys.readouterr().err


def test_discriminator_joins_when_it_should(here, shapes):
    train_stage_1(shapes, "ae", "--train_steps 6 --disc_start_step 3 --steps_per_log 1")
    by_step = {row["step"]: row for row in rows(Path("logs/ae")) if "loss" in row}
    assert [step for step in by_step if "g_loss" in by_step[step]] == [3, 4, 5, 6]
    assert [step for step in by_step if "d_loss" in by_step[step]] == [4, 5, 6]


def test_discriminator_learns_first_and_its_weight_grows(here, shapes):
    common = "--train_steps 9 --disc_start_step 3 --steps_per_log 1 --disc_weight_max 1e-9"
    train_stage_1(shapes, "ae", f"{common} --disc_warmup_steps 2 --disc_ramp_steps 2 --lecam_weight 0.1")
    by_step = {row["step"]: row for row in rows(Path("logs/ae")) if "loss" in row}
    assert [step for step in by_step if "d_loss" in by_step[step]] == [3, 4, 5, 6, 7, 8, 9]
    assert [step for step in by_step if "lecam" in by_step[step]] == [3, 4, 5, 6, 7, 8, 9]
    # From step 5 on it counts: 0, 1/2, 1, 1, 1 of the adaptive weight, which is at its maximum here.
    weights = {step: row["d_weight"] for step, row in by_step.items() if "d_weight" in row}
    assert weights == pytest.approx({6: 0.5e-9, 7: 1e-9, 8: 1e-9, 9: 1e-9})
    assert any(load_tensors("logs/ae/saved_stats/stats_9")["lecam"]["averages"] != 0)


def test_a_warm_up_leaves_the_autoencoder_alone(here, shapes):
    """Until its gradient counts, the discriminator changes nothing else: the autoencoder is bit for bit that of a run
    without it."""
    train_stage_1(shapes, "with", "--train_steps 5 --disc_start_step 2 --disc_warmup_steps 4 --lecam_weight 1")
    train_stage_1(shapes, "without", "--train_steps 5 --disc_start_step 6")
    one, other = (load_tensors(f"logs/{name}/saved_models/vqgan_5.th") for name in ("with", "without"))
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("ae."))
    assert not all(torch.equal(one[key], other[key]) for key in one if key.startswith("disc."))
    assert "lecam" not in load_tensors("logs/without/saved_stats/stats_5")
    train_stage_1(shapes, "without", "--train_steps 8 --lecam_weight 1 --resume")  # a checkpoint that has no averages
    assert "lecam" in load_tensors("logs/without/saved_stats/stats_8")


def test_grey_images(here, shapes):
    train_stage_1(shapes, "ae", "--n_channels 1 --train_steps 2 --steps_per_save_output 2 --visdom --visdom_port 1")
    with Image.open("logs/ae/images/reconstructions_2.png") as picture:
        assert picture.mode == "L"


@pytest.mark.parametrize("quantizer", [name for name, flags in QUANTIZERS.items() if "codebook_init" in flags])
def test_kmeans_codebook_uses_many_codes(here, shapes, quantizer):
    flags = "--codebook_init kmeans --codebook_init_step 10 --codebook_restart_steps 5 --train_steps 40 --ema"
    train_stage_1(shapes, "ae", f"--quantizer {quantizer} {flags} --codebook_size 8")
    assert curve(Path("logs/ae"), "codes_used")[-1] >= 6


# ---------------------------------------------------------------------- starting from weights


def test_load_step_goes_on_at_the_next_step_in_another_folder(here, shapes):
    train_stage_1(shapes, "a", "--train_steps 4 --ema --steps_per_update_ema 1")
    train_stage_1(shapes, "b", "--train_steps 6 --load_dir a --load_step 4 --load_optim --steps_per_log 1 --ema")
    assert [row["step"] for row in rows(Path("logs/b")) if "loss" in row] == [5, 6]
    assert not Path("logs/a/saved_models/vqgan_6.th").exists()
    assert load_tensors("logs/b/saved_models/ae_optim_6.th")["state"][0]["step"] == 6
    train_stage_1(shapes, "c", "--train_steps 5 --load_dir a --load_step 4")
    assert load_tensors("logs/c/saved_models/ae_optim_5.th")["state"][0]["step"] == 1


@pytest.mark.parametrize("quantizer", ["ema", "rotation"])
def test_weights_of_nearest_are_a_start_for_quantizers_with_the_same_codebook(here, shapes, quantizer):
    train_stage_1(shapes, "a", "--train_steps 2 --ema --steps_per_update_ema 1")
    before = load_tensors("logs/a/saved_models/vqgan_2.th")["ae.quantize.embedding.weight"]
    flags = "--train_steps 3 --load_dir a --load_step 2 --load_optim --ema --lr 1e-9 --quantizer"
    train_stage_1(shapes, "b", f"{flags} {quantizer}")
    after = load_tensors("logs/b/saved_models/vqgan_3.th")["ae.quantize.embedding.weight"]
    assert (after - before).abs().max() <= (0.5 if quantizer == "ema" else 1e-8), "it starts from these codes"
    assert json.loads(Path("logs/b/config.json").read_text())["hparams"]["quantizer"] == quantizer
    with pytest.raises(UserError, match="does not fit the configured model"):
        train_stage_1(shapes, "c", f"{flags} gumbel")


def test_a_published_checkpoint_with_weights_only_is_a_valid_start(here, shapes):
    """No config, no manifest, no optimiser, with `perceptual.*` tensors; the averages start at the weights."""
    H = vqgan_H(shapes, "x")
    state = build_vqgan(H).state_dict()
    state["perceptual.lin0.model.1.weight"] = torch.ones(1, 64, 1, 1)
    save_tensors("logs/published/saved_models/vqgan_2200000.th", state)
    train_stage_1(shapes, "mine", "--load_dir published --load_step 2200000 --train_steps 2200002 --ema")
    assert Path("logs/mine/saved_models/vqgan_ema_2200002.th").is_file()
    with pytest.raises(UserError, match="--load_dir published --load_step 2200000"):
        train_stage_1(shapes, "published", "--resume")
    train_stage_2(
        shapes,
        "prior",
        "published",
        2200000,
        "--train_steps 2 --img_size 16 --nf 32 --ch_mult 1 1 1 --res_blocks 1 --emb_dim 8 --codebook_size 16",
    )


def test_existing_checkpoints_are_never_written_over(here, shapes):
    train_stage_1(shapes, "ae", "--train_steps 3 --steps_per_checkpoint 2")
    before = {p: p.read_bytes() for p in Path("logs/ae/saved_models").iterdir()}
    for more in ("--train_steps 5", "--train_steps 5 --load_dir ae --load_step 2"):
        with pytest.raises(UserError, match="--resume continues it, another --log_dir"):
            train_stage_1(shapes, "ae", more)
    assert before == {p: p.read_bytes() for p in Path("logs/ae/saved_models").iterdir()}
    train_stage_1(shapes, "ae", "--train_steps 5 --load_dir ae --load_step 3")  # its newest: resumes
    assert Checkpoints("logs/ae").steps() == [2, 3, 5]


def test_averages_are_preferred_for_use(here, shapes):
    train_stage_1(shapes, "ae", "--train_steps 6 --ema --steps_per_update_ema 2 --ema_beta 0.5")
    H = sampler_H(shapes, "prior", "ae", 6)
    loaded = load_autoencoder(H, torch.device("cpu"))
    ema = load_tensors("logs/ae/saved_models/vqgan_ema_6.th")
    assert loaded.path.endswith("vqgan_ema_6.th")
    assert all(torch.equal(v, ema[f"ae.{k}"]) for k, v in loaded.model.state_dict().items())


def test_codes_are_not_reused_for_another_autoencoder(here, shapes):
    train_stage_1(shapes, "a", "--train_steps 2")
    train_stage_1(shapes, "b", "--train_steps 2 --seed 1")
    train_stage_2(shapes, "pa", "a", 2, "--train_steps 1")
    train_stage_2(shapes, "pb", "b", 2, "--train_steps 1 --horizontal_flip")
    names = sorted(p.name for p in Path("latents").iterdir())
    assert len(names) == 3
    assert sum(name.endswith("_flipped.pt") for name in names) == 1
    with pytest.raises(UserError, match="was trained with .* which is not"):
        train_stage_2(shapes, "pa", "b", 2, "--train_steps 3 --resume")


def test_perceptual_weights_come_from_a_file_or_a_checkpoint(here, shapes, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "nowhere"))
    with pytest.raises(UserError, match="vgg16.*--perceptual_weights.*--perceptual_weight 0"):
        train_stage_1(shapes, "ae", "--perceptual_weight 1 --train_steps 1")
    import torchvision

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None).features.state_dict()
    save_tensors("vgg.pth", {f"features.{k}": v for k, v in vgg.items()})
    train_stage_1(shapes, "ae", "--img_size 32 --perceptual_weight 1 --perceptual_weights vgg.pth --train_steps 1")
    state = load_tensors("logs/ae/saved_models/vqgan_1.th")
    assert torch.equal(state["perceptual.net.slice3.10.weight"], vgg["10.weight"])
    assert curve(Path("logs/ae"), "perceptual")[0] > 0
    Path("vgg.pth").unlink()  # from now on the checkpoint itself has what is needed
    train_stage_1(
        shapes,
        "ae",
        "--img_size 32 --perceptual_weight 1 --perceptual_weights logs/ae/saved_models/vqgan_1.th "
        "--resume --train_steps 2",
    )


def test_the_perceptual_network_that_needs_no_file(here, shapes, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "nowhere"))
    with pytest.raises(UserError, match="--perceptual_net efficientnet_lite0"):
        train_stage_1(shapes, "vgg", "--perceptual_weight 1 --train_steps 1")
    flags = "--perceptual_weight 1 --perceptual_net efficientnet_lite0 --ema --steps_per_eval 2"
    train_stage_1(shapes, "whole", f"{flags} --train_steps 4")
    assert all(value > 0 for name in ("perceptual", "val_perceptual") for value in curve(Path("logs/whole"), name))
    for name in ("vqgan", "vqgan_ema"):
        path = f"logs/whole/saved_models/{name}_4.th"
        assert {key.split(".")[0] for key in load_tensors(path)} == {"ae", "disc"} and not has_perceptual(path)
    train_stage_1(shapes, "parts", f"{flags} --train_steps 2")
    train_stage_1(shapes, "parts", "--resume --perceptual_weight 1 --train_steps 4")
    for name in ("vqgan", "vqgan_ema", "ae_optim"):
        one, two = (load_tensors(f"logs/{run}/saved_models/{name}_4.th") for run in ("whole", "parts"))
        assert_equal(one, two)
    train_stage_1(shapes, "without", "--steps_per_eval 2 --train_steps 4")
    other = load_tensors("logs/without/saved_models/vqgan_4.th")
    assert not torch.equal(other["ae.encoder.blocks.0.weight"], one_weight("whole")), "it changes the gradient"
    state = dict(other, **{"perceptual.net.slice1.0.weight": torch.zeros(3)})  # of a VQGAN that was trained with VGG16
    save_tensors("logs/published/saved_models/vqgan_4.th", state)
    train_stage_1(shapes, "later", f"{flags} --load_dir published --load_step 4 --train_steps 5")
    assert not has_perceptual("logs/later/saved_models/vqgan_5.th")


def one_weight(run):
    return load_tensors(f"logs/{run}/saved_models/vqgan_4.th")["ae.encoder.blocks.0.weight"]


def assert_equal(a, b):
    """Nested dictionaries and lists of tensors."""
    if isinstance(a, (dict, list)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---------------------------------------------------------------------- what must not change training


def test_validation_and_pictures_do_not_change_training(here, shapes):
    plain, busy = (
        "--train_steps 9 --ema --steps_per_eval 100",
        "--train_steps 9 --ema --steps_per_eval 2 "
        "--steps_per_save_output 3 --steps_per_display_output 2 --num_workers 1",
    )
    train_stage_1(shapes, "a", plain)
    train_stage_1(shapes, "b", busy)
    train_stage_2(shapes, "pa", "a", 9, plain)
    train_stage_2(shapes, "pb", "a", 9, busy)
    for one, other, name in (("a", "b", "vqgan"), ("pa", "pb", "absorbing"), ("pa", "pb", "absorbing_ema")):
        x, y = (load_tensors(f"logs/{d}/saved_models/{name}_9.th") for d in (one, other))
        assert all(torch.equal(x[k], y[k]) for k in x), name


def test_a_loss_that_is_not_finite_stops_the_run(here, shapes, monkeypatch):
    plain = train_vqgan.generator_step

    def broken(*args):
        scalars, x_hat, quantized = plain(*args)
        if args[5] == 7:
            scalars["loss"] = scalars["loss"] * float("nan")
        return scalars, x_hat, quantized

    monkeypatch.setattr(train_vqgan, "generator_step", broken)
    with pytest.raises(UserError, match="not finite at step 7 .*png.*checkpoint is step 6"):
        train_stage_1(shapes, "ae", "--train_steps 20 --steps_per_checkpoint 3")
    assert Checkpoints("logs/ae").steps() == [3, 6]


def test_the_averaged_sampler_is_loaded_for_use(here, shapes):
    train_stage_1(shapes, "ae", "--train_steps 2")
    train_stage_2(shapes, "prior", "ae", 2, "--train_steps 2 --ema")
    H = sampler_H(shapes, "out", "ae", 2, "--load_dir prior --load_step 2")
    assert load_sampler(H, torch.device("cpu")).path.endswith("absorbing_ema_2.th")


def test_samples_from_the_command_line(here, shapes):
    train_stage_1(shapes, "ae", "--train_steps 2")
    train_stage_2(shapes, "prior", "ae", 2, "--train_steps 2")
    flags = sampler_flags(shapes, "out", "ae", 2, "--load_dir prior --load_step 2")
    run("experiments/get_samples.py", [*flags, "--n_sheets", "1"], here)
    with Image.open("logs/out/images/samples_0-24.png") as picture:
        assert min(picture.size) >= 256
    run("experiments/get_samples.py", [*flags, "--n_samples", "3", "--batch_size", "2"], here)
    assert len(list(Path("logs/out/images").glob("sample_*.png"))) == 3


def test_the_dashboard_is_told_where_a_run_stands(here, shapes, monkeypatch):
    told, step = [], train_vqgan.generator_step
    monkeypatch.setattr(
        utils.training.run_display.Dashboard,
        "progress",
        lambda self, step, total, values, state: told.append((step, total, state.split(",")[0], values["images seen"])),
    )
    flags = "--train_steps 3 --steps_per_log 1"
    train_stage_1(shapes, "ae", flags)
    assert told == [(0, 3, "starting", "0"), (1, 3, "running", "4"), (2, 3, "running", "8"), (3, 3, "finished", "12")]
    told.clear()
    train_stage_1(shapes, "ae", f"{flags} --resume")
    assert [state for _, _, state, _ in told] == ["starting", "finished"]

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    def failing(*args):
        raise UserError("no")

    for how, error, state in ((signalled, SystemExit, "stopped"), (failing, UserError, "failed")):
        monkeypatch.setattr(train_vqgan, "generator_step", how)
        with pytest.raises(error):
            train_stage_1(shapes, state, flags)
        assert told[-1][2] == state


def test_compared_with_a_run_whose_curves_are_damaged(here, shapes, monkeypatch):
    rows = ['{"step": 1, "l1": 0.5, "val_l1": 0.25, "images": 4}', "{", "[1]", '{"step": "x", "l1": 1}', '{"l1": 2.0}']
    Path("logs/other").mkdir(parents=True)
    Path("logs/other/stats.jsonl").write_text("\n".join(rows))
    found = []
    monkeypatch.setattr(
        utils.training.run_display.Dashboard, "compare", lambda self, run, rows: found.append((run, list(rows)))
    )
    train_stage_1(shapes, "ae", f"--train_steps 1 --visdom_compare other --visdom --visdom_port {free_port()}")
    assert found == [("other", [{"step": 1, "l1/train": 0.5, "l1/validation": 0.25}])]


def test_squared_error_in_the_reconstruction_loss():
    """mse_weight adds its multiple of the mean squared error; l1 stays the mean absolute error."""
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)

    def distance(a, b):
        return torch.full((len(a), 1, 1, 1), 0.25)

    for perceptual, of_perceptual in ((None, 0.0), (distance, 0.25)):
        nll, l1, found = train_vqgan.reconstruction_nll(x, x_hat, perceptual, 2.0, mse_weight=8.0)
        assert (nll, l1, found) == (0.5 + 8 * 0.25 + 2 * of_perceptual, 0.5, of_perceptual)

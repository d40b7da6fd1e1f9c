"""Files from anywhere: nothing that is read runs code, hangs, writes outside logs/, eats the memory or gets at the
terminal; it is used, passed over, or refused in one line."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

from experiments import (
    calc_approximate_ELBO,
    calc_FID,
    calc_nearest_neighbours,
    calc_PRDC,
    calc_VQGAN_FID,
    get_samples,
)
from faults.forks import forked
from faults.hostile import (
    ARRAYS,
    MARKER,
    PICKLES,
    TEXTS,
    assert_harmless,
    assert_one_line,
    hostile_value,
    measuring,
    plant,
    tree,
)
from faults.stages import stage_1, stage_2
from utils.core.files import save_tensors

# ---------------------------------------------------------------------- pickles that run code


@pytest.fixture(scope="module")
def filled(trained_place):
    """A folder with every kind of file that is read: models of both stages and of the likelihood's fit, caches."""
    place = trained_place()
    for work in (
        stage_1("--log_dir", "vq", "--train_steps", "2"),
        stage_2("--log_dir", "new", "--train_steps", "1"),
        measuring(calc_approximate_ELBO, "--log_dir fit --train_steps 2"),
        measuring(calc_FID, "--n_samples 2"),
    ):
        outcome = forked(work, place)
        assert outcome.code == 0, outcome.text
    shutil.rmtree(place / "logs" / "new")
    (cache,) = (place / "latents").glob("*_flipped.pt")
    cache.rename(cache.with_suffix(".part8-16"))  # as of a run that was killed
    return place


@pytest.fixture
def own(filled, tmp_path):
    """own(): a new one of these; the one before is removed."""

    def make():
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        return shutil.copytree(filled, tmp_path / "place", symlinks=True)

    yield make
    shutil.rmtree(tmp_path / "place")


@pytest.mark.parametrize("writers", [PICKLES, ARRAYS, TEXTS], ids=["pickles", "arrays", "texts"])
def test_the_traps_work(tmp_path, writers):
    for write, trust in writers.values():
        write(hostile_value(tmp_path), tmp_path / "x.npy")
        trust(tmp_path / "x.npy")
        assert (tmp_path / MARKER).exists()
        (tmp_path / MARKER).unlink()


AE, RUN, VQ, FIT = (f"logs/{name}/saved_models" for name in ("ae", "run", "vq", "fit"))
SAMPLES = measuring(get_samples, "--n_samples 1")
ON_THE_SAMPLER, ON_THE_VQGAN = stage_2("--resume", "--train_steps", "5"), stage_1("--log_dir", "vq", "--resume")
ON_THE_FIT = measuring(calc_approximate_ELBO, "--log_dir fit --resume --train_steps 3")
FID = measuring(calc_FID, "--n_samples 2")
REFUSED, AGAIN = (1, "is refused: damaged, or holds more than tensors"), (0, "computed again")
CONFIG = (2, "config.json is damaged")

# file (a pattern) -> (how it comes, the command that reads it, (exit code, words))
READ = {
    f"{AE}/vqgan_ema_2.th": (PICKLES, stage_2("--log_dir", "new"), REFUSED),
    f"{AE}/vqgan_ema_2.th ": (PICKLES, SAMPLES, REFUSED),
    f"{RUN}/absorbing_ema_4.th": (PICKLES, SAMPLES, REFUSED),
    f"{RUN}/absorbing_4.th": (PICKLES, ON_THE_SAMPLER, REFUSED),
    f"{RUN}/absorbing_ema_4.th ": (PICKLES, ON_THE_SAMPLER, REFUSED),
    f"{RUN}/absorbing_optim_4.th": (PICKLES, ON_THE_SAMPLER, REFUSED),
    "logs/run/saved_stats/stats_4": (PICKLES, ON_THE_SAMPLER, REFUSED),
    f"{VQ}/vqgan_2.th": (PICKLES, ON_THE_VQGAN, REFUSED),
    f"{VQ}/vqgan_ema_2.th": (PICKLES, ON_THE_VQGAN, REFUSED),
    f"{VQ}/ae_optim_2.th": (PICKLES, ON_THE_VQGAN, REFUSED),
    f"{VQ}/disc_optim_2.th": (PICKLES, ON_THE_VQGAN, REFUSED),
    "logs/vq/saved_stats/stats_2": (PICKLES, ON_THE_VQGAN, REFUSED),
    f"{VQ}/ae_optim_2.th ": (
        PICKLES,
        stage_1("--log_dir", "new", "--load_dir", "vq", "--load_step", "2", "--load_optim"),
        REFUSED,
    ),
    f"{FIT}/logsigma_2.th": (PICKLES, ON_THE_FIT, REFUSED),
    f"{FIT}/logsigma_optim_2.th": (PICKLES, ON_THE_FIT, REFUSED),
    "logs/published/saved_models/vqgan_7.th": (
        PICKLES,
        stage_1("--log_dir", "new", "--load_dir", "published", "--load_step", "7"),
        REFUSED,
    ),
    "latents/pics_train_*.pt": (PICKLES, stage_2("--log_dir", "new", "--train_steps", "1"), AGAIN),
    "latents/pics_val_*.pt": (PICKLES, stage_2("--log_dir", "new", "--train_steps", "1"), AGAIN),
    "latents/pics_train_*_flipped.part8-16": (PICKLES, stage_2("--log_dir", "new", "--train_steps", "1"), AGAIN),
    "features/samples_*.pt": (PICKLES, FID, AGAIN),
    "features/real_*.pt": (PICKLES, FID, AGAIN),
    "x.pt": (PICKLES, measuring(calc_FID, "--n_samples 2 --latents_path x.pt"), REFUSED),
    "x.npy": (ARRAYS, measuring(calc_FID, "--n_samples 2 --latents_path x.npy"), (1, "x.npy is no readable .npy")),
    "f.pt": (PICKLES, measuring(calc_PRDC, "--n_samples 5 --real_feats f.pt"), REFUSED),
    "f.npy": (ARRAYS, measuring(calc_PRDC, "--n_samples 5 --fake_feats f.npy"), (1, "f.npy is no readable .npy")),
    "i.pth": (PICKLES, measuring(calc_FID, "--n_samples 2 --feature_weights i.pth", extractor=None), REFUSED),
    "a.pth": (PICKLES, measuring(calc_nearest_neighbours, "--alexnet_weights a.pth"), REFUSED),
    "v.pth": (
        PICKLES,
        stage_1("--log_dir", "new", "--perceptual_weight", "1", "--perceptual_weights", "v.pth"),
        REFUSED,
    ),
    "v.pth ": (
        PICKLES,
        measuring(calc_VQGAN_FID, "--perceptual_weight 1 --perceptual_weights v.pth", "vqgan"),
        REFUSED,
    ),
    # What a manifest holds is not read there.
    "logs/ae/config.json": (TEXTS, stage_2("--log_dir", "new", "--train_steps", "1"), (0, "written: checkpoint")),
    "logs/run/config.json": (TEXTS, SAMPLES, (0, "written")),
    "logs/vq/config.json": (TEXTS, ON_THE_VQGAN, (0, "config.json is damaged")),
    "logs/published/config.json": (
        TEXTS,
        stage_1("--log_dir", "new", "--load_dir", "published", "--load_step", "7"),
        CONFIG,
    ),
    f"{AE}/manifest_2.json": (TEXTS, stage_2("--log_dir", "new"), (1, "is damaged: not readable as JSON")),
    f"{VQ}/manifest_2.json": (TEXTS, ON_THE_VQGAN, (1, "no checkpoint in logs/vq is complete")),
    "datasets.yaml": (TEXTS, stage_2("--log_dir", "new"), (2, "datasets.yaml")),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_that_would_run_code(own, name, few_or_all, figures):
    writers, work, (code, said) = READ[name]
    at = sorted(READ).index(name) % len(writers)
    for writer in few_or_all(sorted(writers)[at : at + 1], sorted(writers)):
        place = own()
        for path in list(place.glob(name.strip())) or [place / name.strip()]:
            plant(path, writers[writer][0], place)
        outcome = forked(work, place)
        if code:
            assert_one_line(outcome, code, said)
        else:
            assert outcome.code == 0 and said in outcome.text, outcome.text
        assert not (place / MARKER).exists()
        figures("files that would run code")["refused" if code else "computed again"] += 1


@pytest.mark.parametrize(
    "tag",
    [
        "object/apply:builtins.open [executed, w]",
        "name:builtins.print ''",
        "object/new:pathlib.PosixPath [executed]",
        "module:antigravity ''",
    ],
)
def test_tags_of_yaml_that_would_run_code(place, tag):
    (place / "datasets.yaml").write_text(f"pics:\n  paths: !!python/{tag}\n")
    assert_one_line(forked(stage_1(), place), 2, "datasets.yaml is not valid YAML: could not determine a constructor")
    assert not (place / MARKER).exists()


@pytest.mark.parametrize("use", ["paths", "preset", "category", "hparams: {nf", "hparams: {ch_mult", "hparams"])
def test_ten_lines_of_yaml_that_say_a_thousand_million_values(place, use):
    lines = ["  - &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    bomb = "\n".join(["bomb:", *lines, "pics:", "  paths: data/shapes" * (use != "paths"), f"  {use}: *l8"])
    (place / "datasets.yaml").write_text(bomb + "}" * use.count("{") + "\n")
    outcome = forked(stage_1(), place, limit=20)
    assert_one_line(outcome, 2, "datasets.yaml")
    assert len(outcome.text) < 1000


# ---------------------------------------------------------------------- values that are no weights, codes, features


STRANGE = {
    "sparse": torch.eye(4).to_sparse(),
    "complex": torch.zeros(4, 16, dtype=torch.complex64),
    "without values": torch.zeros(4, 16, device="meta"),
    "no rows": torch.zeros(0, 16, dtype=torch.int64),
    "no columns": torch.zeros(4, 0),
    "a number": 3,
    "a list of lists": [[1, 2], [3, 4]],
    "tensors of different shapes": [torch.zeros(2, 16), torch.zeros(2, 15)],
    "names that are none": {1: torch.zeros(3), (2, "x"): torch.zeros(2)},
    "texts": dict(ids="x", w="y"),
    "a value said a thousand million times": torch.zeros(1, 1, dtype=torch.int64).expand(10**6, 10**3),
}
STRANGE_ARRAYS = {
    "text": np.array([["x"]]),
    "a record": np.zeros(3, dtype=[("a", "i4")]),
    "dates": np.zeros((2, 16), "M8[s]"),
    "bytes in the other order": np.zeros((4, 16), ">f4"),
    "a number": np.array(3.0),
}


def save_npy(folder, value):
    np.save(folder / "x.npy", value)
    return "x.npy"


def save_archive(folder, value):
    """Arrays in a zip file that is called .npy."""
    np.savez(folder / "x.npz", a=value)
    (folder / "x.npz").rename(folder / "x.npy")
    return "x.npy"


def save_pt(folder, value):
    save_tensors(folder / "x.pt", value)
    return "x.pt"


FILES = {name: partial(save_pt, value=value) for name, value in STRANGE.items()}
FILES |= {f"an array: {name}": partial(save_npy, value=value) for name, value in STRANGE_ARRAYS.items()}
FILES |= {"an array: archive": partial(save_archive, value=np.zeros((4, 16)))}


def readers_of(name):
    """The commands that read such a file by name, as (words in the error, work)."""
    yield "x.", measuring(calc_FID, f"--n_samples 2 --latents_path {name}")
    yield "", measuring(calc_PRDC, f"--n_samples 5 --real_feats {name}")
    yield "x.", measuring(calc_FID, f"--n_samples 2 --feature_weights {name}", extractor=None)
    yield "x.", measuring(calc_nearest_neighbours, f"--alexnet_weights {name}")
    yield "x.", stage_1(*f"--log_dir new --perceptual_weight 1 --perceptual_weights {name}".split())


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_something_strange(trained_place_here, kind, few_or_all, figures):
    place = trained_place_here
    name = FILES[kind](place)
    readers = list(readers_of(name))
    at = len(kind) % 2
    for said, work in few_or_all(readers[at : at + 1], readers):
        assert_one_line(forked(work, place), 1, said)
        figures("files of something strange")["refused"] += 1


@pytest.fixture(scope="module")
def trained_place_here(trained_place):
    """One place for all tests that leave nothing in it but x.pt or x.npy."""
    return trained_place()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_weights_that_are_something_strange(trained_place_here, kind, figures):
    place = trained_place_here
    save_tensors(place / "logs/strange/saved_models/vqgan_2.th", STRANGE[kind])
    flags = "--ae_load_dir strange --img_size 8 --nf 32 --ch_mult 1 1 --res_blocks 1 --emb_dim 8 --codebook_size 16"
    assert_one_line(forked(stage_2("--log_dir", "new", *flags.split()), place), 1, "vqgan_2.th")
    figures("files of something strange")["refused"] += 1


# ---------------------------------------------------------------------- names of runs, addresses of servers


NAMES = {
    "home": ("~", None),
    "a user's home": ("~root", None),
    "one level deeper": ("a/./b", None),
    "hidden": (".x", None),
    "spaces": (" a  b ", None),
    "like a flag": ("-x", None),
    "other letters": ("\u00e4\u6f22", None),
    "with a backslash": ("..\\..\\x", None),
    "like a pattern": ("*[a]?", None),
    "a NUL": ("a\0b", 2),
    "a line break": ("a\nb", 2),
    "for the terminal": ("\x1b[31mx\x07", 2),
    "backwards": ("\u202egnp.x", 2),
    "bytes that are no text": ("\udcff\udcfe", 2),
    "out of it again": ("x/../../../out", 2),
    "very long": ("x" * 300, 1),
    "very deep": ("x/" * 3000, 1),
    "a file": ("file", 1),
    "within a file": ("file/x", 1),
}


@pytest.mark.parametrize("kind", NAMES)
def test_what_a_run_is_called(place, kind, figures):
    """For any name, either the run's folder is within logs/, or there is none and one line says why."""
    name, code = NAMES[kind]
    (place / "logs" / "file").write_text("x")
    before = tree(place.parent)
    outcome = forked(stage_1(f"--log_dir={name}", "--train_steps", "1"), place)
    inside = f"{place.name}/logs/"
    changed = {k for k, v in tree(place.parent).items() if before.get(k) != v and k != f"{place.name}/out.txt"}
    assert all(k.startswith(inside) for k in changed)
    if code is None:
        assert outcome.code == 0 and (place / "logs" / name / "saved_models" / "vqgan_1.th").is_file(), outcome.text
        assert_harmless(outcome.text)
    else:
        assert_one_line(outcome, code)
        assert not [k for k in changed if "saved_models" in k]
    figures("names of runs")["used" if code is None else "refused"] += 1


@pytest.mark.parametrize("option", ["--load_dir=%s --load_step=2", "--ae_load_dir=%s"])
@pytest.mark.parametrize("kind", [kind for kind, (_, code) in NAMES.items() if code])
def test_where_a_model_is_loaded_from(place, kind, option):
    (place / "logs" / "file").write_text("x")
    outcome = forked(stage_2(*(word.replace("%s", NAMES[kind][0]) for word in option.split())), place)
    assert outcome.code in (1, 2)
    assert_one_line(outcome, outcome.code)


@pytest.mark.parametrize("kind", ["elsewhere", "nowhere", "itself", "a file"])
def test_logs_is_a_link(place, tmp_path, kind):
    (place / "logs").rename(place / "models")
    (tmp_path / "file").touch()
    targets = {"elsewhere": place / "models", "nowhere": tmp_path / "x", "itself": "logs", "a file": tmp_path / "file"}
    (place / "logs").symlink_to(targets[kind])
    outcome = forked(stage_1("--train_steps", "1"), place)
    if kind == "elsewhere":
        assert outcome.code == 0 and (place / "models/run/saved_models/vqgan_1.th").is_file(), outcome.text
    else:
        assert_one_line(outcome, 1, "logs")


@pytest.mark.parametrize(
    "server",
    [
        "u:secret@box",
        "https://u:secret@box/x",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "a b",
        "box\nx",
        "\x1b]0;x\x07",
        "\udcff",
        "http://box\\@evil",
        "http://[::1",
        "http://",
        "box:99999",
        "\u202ebox",
    ],
)
@pytest.mark.parametrize("work", [stage_1, stage_2], ids=["vqgan", "sampler"])
def test_addresses_that_are_none(place, work, server):
    outcome = forked(work(f"--visdom_server={server}", "--visdom", "--train_steps", "1"), place)
    assert_one_line(outcome, 2, "the visdom server")
    assert "secret" not in outcome.text and not (place / "logs" / "run").exists()


@pytest.mark.parametrize("server", ["[::1]:1", "http://127.0.0.1:1/a/../b?c#d", "-x:1", "x" * 300, "."])
def test_addresses_where_nobody_answers(place, server):
    outcome = forked(stage_1(f"--visdom_server={server}", "--visdom", "--train_steps", "1"), place)
    assert outcome.code == 0 and outcome.text.count("--no_visdom") <= 1, outcome.text
    assert_harmless(outcome.text)

"""What is derived from the roles of flags: keys of caches, what --resume restores, what printed commands repeat."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, draw_shapes
from scripts import sampler_flags, vqgan_flags

from experiments.common.measure import Samples
from hparams import config
from hparams.config import names_of, opt
from utils.evaluation import features

NEVER_RESUMED = "log_dir custom_dataset_path ae_load_dir ae_load_step resume dry_run "
NEVER_RESUMED += "visdom_compare visdom_server visdom_port no_visdom"
AUTOENCODER = "img_size n_channels nf ch_mult res_blocks attn_resolutions latent_shape emb_dim codebook_size quantizer"


def test_every_flag_has_a_role():
    assert [flag.name for flag in config.ALL_FLAGS if not flag.roles - {"common", "keyed"}] == []


@pytest.mark.parametrize(
    ("roles", "names"),
    [
        ("autoencoder", f"{AUTOENCODER} fsq_least_levels"),
        ("discriminator", "ndf disc_layers"),
        ("sampler", "sampler bert_n_emb bert_n_head bert_n_layers block_size codebook_size latent_shape total_steps"),
        (
            "sampling",
            "temp sample_steps sample_type mask_schedule sample_order sample_schedule temp_end top_k top_p remask_eta",
        ),
        ("place request dashboard", NEVER_RESUMED),
        ("origin", "load_dir load_step load_optim"),
        ("machine", "device num_workers amp amp_dtype"),
        ("images", "steps_per_eval unique_images split_rule"),
    ],
)
def test_flags_of_a_role(roles, names):
    """Changing these changes what old runs and commands do."""
    assert set(names_of(*roles.split())) == set(names.split())


def test_unknown_roles_and_facts_are_refused():
    for mistake in (dict(role="trainnig"), dict(architecture=True)):
        with pytest.raises(AssertionError, match="unknown facts or roles"):
            opt(1, "a flag", **mistake)


def test_flags_that_the_files_of_quantizers_declare():
    facts = dict(default=[1, 2], help="what it does", min=1)
    owners = dict(one=dict(width=dict(facts, role="autoencoder"), size=facts), two=dict(size={}), three={})
    width, size = config.flags_of([config.declared("quantizer", owners, group="VQGAN", role="vqgan")])
    assert (width.roles, size.roles) == ({"autoencoder"}, {"vqgan"})
    assert (size.name, size.type, size.is_list, size.default, size.group) == ("size", int, True, [1, 2], "VQGAN")
    assert [name for name in owners if size.works(dict(quantizer=name))] == ["one", "two"]
    assert [name for name in owners if width.works(dict(quantizer=name))] == ["one"]


# ---------------------------------------------------------------------- keys of cached features

HOW = dict(seed=1, temp=0.9, sample_steps=16, sample_type="diffusion", mask_schedule="random", bert_n_head=4)


@dataclass
class NewConfig:
    """flags that are newer than the caches"""

    confidence: float = opt(
        0.5, "its default changes samples, so that old runs keep another value", "sampling", older=0.0
    )
    order: str = opt("random", "its default is what older versions did", "sampling")


def header(**given):
    """The part of the key that describes samples, for a command line that gives these flags."""
    values = {flag.name: flag.default for flag in config.ALL_FLAGS} | HOW | given
    loaded = SimpleNamespace(hash="a" * 64, path="a"), SimpleNamespace(hash="b" * 64, path="b")
    precision = SimpleNamespace(describe=lambda: "float32")
    models = SimpleNamespace(autoencoder=loaded[0], sampler=loaded[1], precision=precision, device=torch.device("cpu"))
    return Samples(SimpleNamespace(**values), models, 100).header()


def name(**given):
    return features.cache_path(dict(extractor="x", **header(**given))).name


def test_the_key_of_cached_samples():
    """A key that changes would orphan the caches that users have."""
    common = dict(kind="samples", autoencoder="a" * 64, sampler="b" * 64, precision="float32", device="cpu", n=100)
    assert header() == common | HOW
    assert name() == "samples_8862673b0c92eb1c.pt"


def test_each_flag_of_sampling_changes_the_key(monkeypatch):
    monkeypatch.setattr(config, "ALL_FLAGS", config.ALL_FLAGS + config.flags_of([NewConfig]))
    other = dict(temp=0.7, sample_steps=17, sample_type="mlm", mask_schedule="fixed", confidence=0.7, order="halton")
    other |= dict(sample_order="halton", sample_schedule="cosine", temp_end=0.7, top_k=5, top_p=0.5, remask_eta=0.1)
    assert other.keys() == set(names_of("sampling"))
    assert len({name(**{flag: value}) for flag, value in other.items()} | {name(confidence=0.0)}) == 1 + len(other)
    assert name(seed=2) != name() != name(bert_n_head=2)


def test_a_new_flag_leaves_old_keys_valid(monkeypatch):
    before = header(), name()
    monkeypatch.setattr(config, "ALL_FLAGS", config.ALL_FLAGS + config.flags_of([NewConfig]))
    assert (header(confidence=0.0), name(confidence=0.0)) == before
    assert header() == before[0] | dict(confidence=0.5)  # the default of new runs is not what old samples had
    assert header(confidence=0.0, order="halton") == before[0] | dict(order="halton")


# ---------------------------------------------------------------------- one line

LINE = '    patience: int = opt(3, "what it does", "{role}", min=1)\n'
COMMANDS = """
from hparams import get_hparams
from utils.display import commands
import sys
H = get_hparams("sampler", "", sys.argv[1:])
print(*commands.after_sampler(H, 5, 1000), sep="\\n")
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, in which a function runs Python and returns what it prints."""
    for folder in ("hparams", "models", "utils", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("train_vqgan.py", "train_sampler.py", "datasets.yaml"):
        shutil.copy(ROOT / file, tmp_path)
    env = dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="100")

    def run(*command):
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def add_flag(folder, config_class, role):
    """Add LINE to a dataclass of hparams/config.py."""
    path = folder / "hparams" / "config.py"
    start, doc, rest = path.read_text().partition(f"class {config_class}:\n")
    head, blank, fields = rest.partition("\n\n")
    path.write_text(start + doc + head + blank + LINE.format(role=role) + fields)


def test_a_new_flag_of_training_is_one_line(tmp_path, copy):
    """It is in the help and in config.json, --resume restores it, and the command after stage 1 repeats it."""
    add_flag(tmp_path, "TrainConfig", "training machine")
    assert "--patience INT" in copy("train_vqgan.py", "--help_all")
    flags = vqgan_flags(draw_shapes(tmp_path / "images", 8), "ae")
    out = copy("train_vqgan.py", *flags, "--patience", "5", "--train_steps", "1")
    (following,) = [line for line in out.splitlines() if "train_sampler.py" in line]
    assert "--patience 5" in following
    saved = json.loads((tmp_path / "logs/ae/config.json").read_text())["hparams"]
    assert saved["patience"] == 5
    assert "patience: 5  (--resume)\n" in copy("train_vqgan.py", *flags, "--resume", "--dry_run")


def test_a_new_flag_of_sampling_is_one_line(tmp_path, copy):
    """The commands after stage 2 repeat it, scripts that sample read it, and others do not."""
    add_flag(tmp_path, "SamplerConfig", "sampling")
    flags = [*sampler_flags(tmp_path, "prior", "ae", 1), "--dry_run", "--patience", "4"]
    lines = copy("-c", COMMANDS, *flags).splitlines()
    assert len(lines) == 2 and all("--patience 4" in line for line in lines)
    assert "\n  --patience INT " in copy("experiments/get_samples.py", "--help")
    assert "\n  --patience INT " not in copy("experiments/calc_approximate_ELBO.py", "--help")

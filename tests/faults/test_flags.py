"""Every number on every command line, with --dry_run, which builds the models without their memory: it works, or is
refused in one line with exit code 2."""

import ast
import contextlib
import io
import runpy
import shutil
import sys
import time

import pytest
from conftest import ROOT, TINY_SAMPLER, TINY_VQGAN, words
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import EXPERIMENTS, REQUIRED
from test_hparams import flag_and_words

from faults.conftest import FULL
from hparams import config

AE = words("--ae_load_dir ae --ae_load_step 1")
SAMPLER = [*TINY_SAMPLER, *AE, *words("--sampler absorbing")]
MODEL = TINY_VQGAN[: TINY_VQGAN.index("--batch_size")]
SCRIPTS = {"train_vqgan.py": TINY_VQGAN, "train_sampler.py": [*SAMPLER, *MODEL]}
SCRIPTS |= {f"experiments/{path.name}": [*SAMPLER, *MODEL] for path in EXPERIMENTS}
SCRIPTS["experiments/calc_VQGAN_FID.py"] = [*TINY_VQGAN, *AE]
SLOW = 60.0  # seconds that a dry run may take on a busy machine


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("flags")
    shutil.copy(ROOT / "datasets.yaml", place)
    (place / "logs" / "ae").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield


def call(script, flags):
    """The script with --dry_run, in this process as a user would call it: (exit code, stderr)."""
    required = words(f"--dataset churches {REQUIRED.get(script, '')}")
    argv = [script, *SCRIPTS[script], *required, *flags, "--dry_run"]
    err, before = io.StringIO(), sys.argv
    sys.argv = argv
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code, err.getvalue()
    finally:
        sys.argv = before
    return 0, err.getvalue()


def works_or_is_refused(script, flags):
    start = time.monotonic()
    code, err = call(script, flags)
    assert time.monotonic() - start < SLOW, flags
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    if code:
        assert code == 2 and len(lines) == 1 and "error: " in lines[0], (flags, err)
    else:
        assert not lines, (flags, err)
    return "refused" if code else "worked"


def own_flags(script):
    """Numeric flags of an experiment's own: (name, metadata)."""
    tree = ast.parse((ROOT / script).read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config")]
    module = runpy.run_path(str(ROOT / script), run_name="no main")
    return config.flags_of([module[name] for name in names])


def values_of(flag):
    """The edges of a number's range, what is beyond, and some that many models do not fit."""
    least, most = flag.meta.get("min", flag.meta.get("above", 0)), flag.meta.get("max", 10**12)
    if flag.type is float:
        return [least - 1e-9, least, 1e-300, 1e-6, 1.0, 1e30, 1e308, most, "nan", "-inf"]
    return [least - 1, least, least + 1, 3, 64, 100, 1000, most, most + 1, 10**40, -(10**12), "1e3"]


def numeric(flags):
    return [flag for flag in flags if flag.type in (int, float)]


def cases():
    for script in SCRIPTS:
        family = config.vqgan_family() if "vqgan" in script.lower() else config.sampler_family()
        shared = config.flags_of(family) if FULL or script.startswith("train") else []
        for flag in numeric([*shared, *(own_flags(script) if script.startswith("exp") else [])]):
            yield pytest.param(script, flag, id=f"{script.rsplit('/', 1)[-1]} {flag.name}")


@pytest.mark.slow
@pytest.mark.parametrize("script,flag", list(cases()))
def test_every_number(script, flag, few_or_all, figures):
    values = values_of(flag)
    for value in few_or_all([v for i, v in enumerate(values) if i in (1, 3, 7)], values):
        figures("numbers of flags, dry runs")[works_or_is_refused(script, [f"--{flag.name}={value}"])] += 1


COUNTS = []


@settings(max_examples=500 if FULL else 40, deadline=None, derandomize=True)
@given(script=st.sampled_from(["train_vqgan.py", "train_sampler.py"]), flags=st.lists(flag_and_words(), max_size=3))
def any_flags(script, flags):
    known = {f.name for f in config.flags_of(config.vqgan_family())}
    given = [w for word in flags for w in word if "sampler" in script or word[0][2:].removeprefix("no_") in known]
    COUNTS.append(works_or_is_refused(script, given))


def test_any_flags_build_a_model_or_are_refused(figures):
    any_flags()
    for outcome in COUNTS:
        figures("any flags, dry runs")[outcome] += 1
    assert {"worked", "refused"} <= set(COUNTS)

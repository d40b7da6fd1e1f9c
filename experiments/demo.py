"""Runs `make demo`, which trains both stages on emoji on two CPU cores, and then draws a sheet of samples.

The demo calls the scripts that a user calls. Finished work is skipped, and interrupted work is resumed.
"""

import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "logs"
sys.path.insert(0, str(ROOT))

from experiments.common.calls import curve, environment, finished, run_script
from hparams.config import OF_SAMPLING
from hparams.environment import COMMON, require_packages
from hparams.presets import PRESETS
from utils.core.errors import UserError, run_main
from utils.core.job import ROOT_VARIABLE
from utils.core.manifests import Manifests

RECIPE = PRESETS["demo"]
VQGAN_STEPS, SAMPLER_STEPS = RECIPE["vqgan"]["train_steps"], RECIPE["sampler"]["train_steps"]
ACTIVATE = "source .venv/bin/activate"
STAGE_1, STAGE_2, SAMPLES = "demo_vqgan", "demo_absorbing", "demo_samples"
PRIOR = f"--sampler absorbing --dataset demo --ae_load_dir {STAGE_1} --ae_load_step {VQGAN_STEPS}"
TRAIN_PRIOR = f"train_sampler.py {PRIOR} --log_dir {STAGE_2}"
MODELS = f"{PRIOR} --load_dir {STAGE_2} --load_step {SAMPLER_STEPS}"
DRAW = f"experiments/get_samples.py {MODELS}"
NO_DOWNLOAD = "efficientnet_lite0"  # the weights of this network come with the packages
SAMPLES_METRIC = f"experiments/calc_FID.py {MODELS} --log_dir demo_distance --n_samples 500 --extractor {NO_DOWNLOAD}"
CODES_METRIC = (
    f"experiments/calc_VQGAN_FID.py --dataset demo --ae_load_dir {STAGE_1} --ae_load_step {VQGAN_STEPS} "
    f"--log_dir demo_reconstructions --split val --extractor {NO_DOWNLOAD}"
)
NEIGHBOURS = f"experiments/calc_nearest_neighbours.py {MODELS} --log_dir demo_neighbours --net {NO_DOWNLOAD}"
SHEET = "samples_0-24.png"  # the first sheet that get_samples.py writes


def call(command):
    """Run one of the scripts as a user does, and show its output."""
    print(f"\n$ python {command}", flush=True)
    # The root is the repository, because `make clean-demo` removes the runs there.
    if run_script(command.split(), dict(environment(), **{ROOT_VARIABLE: "."}), ROOT):
        script = command.split()[0]
        raise UserError(f"{script} failed (see above); finished work is kept: `make demo` continues from there")


def no_dashboard():
    """Return the flag --no_visdom, unless a dashboard is running. The demo needs no dashboard."""
    with socket.socket() as s:
        s.settimeout(0.5)
        return "" if s.connect_ex(("127.0.0.1", 8097)) == 0 else " --no_visdom"


def final(log_dir, name):
    """Return the last value of a curve in a run's stats.jsonl."""
    return [float("nan"), *curve(LOGS / log_dir, name)][-1]


def check_recipe(log_dir, family):
    """Raise UserError if a run began with another recipe than the preset's, because --resume would keep that recipe."""
    recorded = Manifests(LOGS / log_dir).config().get("hparams", {})
    wanted = {name: value for name, value in RECIPE[family].items() if name not in ("train_steps", *OF_SAMPLING)}
    changed = [name for name, value in wanted.items() if recorded and recorded.get(name) != value]
    if changed:
        raise UserError(
            f"logs/{log_dir} was trained with another recipe than that of this version (see --{changed[0]}): `make "
            "clean-demo demo` removes the demo's runs and trains afresh"
        )


def summary(seconds):
    print(f"""
The demo is complete{f" ({seconds / 60:.1f} minutes)" if seconds > 60 else ""}. Look at:
  originals, reconstructions, errors logs/{STAGE_1}/images/reconstructions_{VQGAN_STEPS}.png
  samples                            logs/{SAMPLES}/images/{SHEET}
  samples while they are drawn       logs/{SAMPLES}/images/denoising_0.gif
  curves and all else, as a page     logs/{STAGE_1}/report.html and logs/{STAGE_2}/report.html

                                              training  validation
Stage 1: mean absolute error (l1, val_l1)     {final(STAGE_1, "l1"):<8.4f}  {final(STAGE_1, "val_l1"):.4f}
Stage 2: bits per code (bits, val_bits)       {final(STAGE_2, "bits"):<8.3f}  {final(STAGE_2, "val_bits"):.3f}
Codes in use: {final(STAGE_1, "codes_used")}, perplexity {final(STAGE_1, "perplexity"):.1f}

Next:
  in each terminal   {ACTIVATE}
  more samples       python {DRAW} --log_dir more --n_sheets 4 --first_sample 1000
  how good they are  python {SAMPLES_METRIC}
  nearest emoji      python {NEIGHBOURS}
  how good codes are python {CODES_METRIC}
  train for longer   python {TRAIN_PRIOR} --resume --train_steps {4 * SAMPLER_STEPS}
  your own images    python train_vqgan.py --dataset custom --custom_dataset_path DIR --preset small \
--log_dir my_vqgan --train_steps {PRESETS["small"]["vqgan"]["train_steps"]}
  start afresh       make clean-demo demo

The emoji are OpenMoji's (openmoji.org), CC BY-SA 4.0; so are pictures made of them.""")


def main():
    require_packages(*COMMON)
    start = time.monotonic()
    print(f"The commands below are those of a terminal in which `{ACTIVATE}` was run.", flush=True)
    check_recipe(STAGE_1, "vqgan")
    check_recipe(STAGE_2, "sampler")
    call("experiments/draw_openmoji.py")
    if not finished(LOGS / STAGE_1, VQGAN_STEPS):
        call(f"train_vqgan.py --dataset demo --log_dir {STAGE_1} --train_steps {VQGAN_STEPS} --resume{no_dashboard()}")
    if not finished(LOGS / STAGE_2, SAMPLER_STEPS):
        call(f"{TRAIN_PRIOR} --train_steps {SAMPLER_STEPS} --resume{no_dashboard()}")
    if not (LOGS / SAMPLES / "images" / SHEET).is_file():
        call(f"{DRAW} --log_dir {SAMPLES} --n_sheets 1 --show_steps{no_dashboard()}")
    summary(time.monotonic() - start)


if __name__ == "__main__":
    run_main(main)

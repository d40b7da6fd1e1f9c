"""Fetch the published weights that LPIPS, FID, PRDC and nearest neighbours need, and check them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams.environment import require_packages
from hparams.parser import OneLineParser
from utils.core.errors import quit_quietly_at_interrupt, run_main

NAMES = ("vgg", "alexnet", "inception")
EXAMPLE = "example: python experiments/get_weights.py all"


def parse(argv=None):
    """Parse the command line -> names of weights."""
    parser = OneLineParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "name",
        choices=[*NAMES, "all"],
        help="vgg: LPIPS of stage 1 and of reconstructions (553 MB). alexnet: nearest neighbours (244 MB). inception: "
        "FID and PRDC (96 MB)",
    )
    chosen = parser.parse_args(argv).name
    return NAMES if chosen == "all" else (chosen,)


def main(names):
    from utils.core.progress import say
    from utils.evaluation.weight_files import WEIGHT_FILES, fetch

    for name in names:
        weights = WEIGHT_FILES[name]
        done = "fetched to" if fetch(name) else "already at"
        say(f"{weights.what}: {done} {weights.place}")


if __name__ == "__main__":
    NAMED = parse()
    quit_quietly_at_interrupt()
    require_packages("torch", "torch_fidelity", "tqdm")
    run_main(main, NAMED)

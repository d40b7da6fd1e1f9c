"""Writes a trained sampler and its autoencoder as one folder of safetensors and JSON, for load_pretrained."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams.config import opt
from hparams.environment import COMMON, require_packages
from hparams.own import parse_own
from utils.core.errors import UsageError, UserError, quit_quietly_at_interrupt, run_main


@dataclass
class ExportConfig:
    """what to export, and where"""

    load_dir: str = opt(None, "the sampler's or VQGAN's run, a folder under logs/", required=True, metavar="NAME")
    load_step: int = opt(0, "step of --load_dir; 0: the newest complete one", min=0)
    ae_load_dir: str = opt(None, "the VQGAN's run (default: the one that the sampler's run records)", metavar="NAME")
    target: str = opt(None, "the folder to write, a new or empty one", required=True, metavar="DIR")
    description: str = opt(None, "for the card in model.json: what the model draws", metavar="TEXT")
    data: str = opt(None, "for the card in model.json: the images of training, with their authors", metavar="TEXT")
    license: str = opt(None, "for the card in model.json: the licence of the weights", metavar="TEXT")


EXAMPLES = """examples:
  python experiments/export.py --load_dir absorbing_photos --target exports/photos --license "CC BY 4.0"
  python experiments/export.py --load_dir absorbing_churches --ae_load_dir vqgan_churches --target exports/churches

The second command exports published files, which do not record their VQGAN. Files that could run code are refused.
"""


def parse(argv=None):
    """Parse the command line -> ExportConfig."""
    return parse_own(ExportConfig, "Export a sampler with its autoencoder, or a VQGAN alone.", EXAMPLES, argv)


if __name__ == "__main__":
    CONFIG = parse()
    require_packages(*COMMON, "safetensors")
    quit_quietly_at_interrupt()

from models.pretrained import load_pretrained
from utils.core.progress import say


def main(config):
    card = {name: getattr(config, name) for name in ("description", "data", "license")}
    try:
        model = load_pretrained(config.load_dir, config.ae_load_dir, config.load_step or None, "cpu")
    except UserError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None
    model.save(config.target, {name: text for name, text in card.items() if text} or None)
    size = sum(path.stat().st_size for path in Path(config.target).iterdir())
    say(f"{' and '.join(model.paths)} -> {config.target} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_main(main, CONFIG)

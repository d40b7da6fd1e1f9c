"""Loads the images that a command line names."""

from typing import Any

from utils.core.errors import UserError
from utils.core.progress import say
from utils.data.images import ImageSet, open_images


def load_images(H: Any, split: str, hold_out: bool | None = None) -> ImageSet:
    """Load the images of --dataset in a split, 'train' or 'val'. hold_out: see open_images; default: True if
    --steps_per_eval is given."""
    hold_out = H.steps_per_eval > 0 if hold_out is None else hold_out
    return open_images(H.data_entry, split, H.img_size, H.n_channels, hold_out, H.unique_images, H.split_rule)


def note_images(H: Any) -> None:
    """For --dry_run: print one line with the number of images of --dataset, or with the error."""
    try:
        counts = [f"{len(load_images(H, 'train'))} train"]
        if H.steps_per_eval:
            counts.append(f"{len(load_images(H, 'val'))} validate")
        say(f"images of {H.data_entry['origin']}: {', '.join(counts)}")
    except UserError as error:
        say(f"note: {error}")

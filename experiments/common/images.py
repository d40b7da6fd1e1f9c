"""The images that a command line names."""

from typing import Any

from utils.data.images import ImageSet, open_images


def load_images(H: Any, split: str, hold_out: bool | None = None) -> ImageSet:
    """The images of --dataset in a split, 'train' or 'val'. hold_out: see open_images; by default validation images are
    held out if --steps_per_eval is given."""
    hold_out = H.steps_per_eval > 0 if hold_out is None else hold_out
    return open_images(H.data_entry, split, H.img_size, H.n_channels, hold_out, H.unique_images, H.split_rule)

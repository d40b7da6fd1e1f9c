"""Redraws a part of pictures with the prior, given the rest: inpainting, outpainting, and variations of a picture."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import CanvasConfig, ModelsConfig, check_show_steps
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt
from utils.core.errors import UsageError, UserError, run_main

KEPT = ["left", "right", "top", "bottom", "centre"]


@dataclass
class EditConfig:
    """editing"""

    images: list[str] = opt(None, "pictures, or folders of pictures, to edit", metavar="PATH")
    numbers: list[int] = opt(None, "numbers of pictures of the data set, from 0 on", metavar="N", min=0)
    split: str = opt(
        "val", "with --numbers: the validation or the training images", "advanced", choices=["val", "train"]
    )
    mask: str = opt(
        None,
        "picture whose white or transparent pixels are redrawn",
        metavar="FILE",
    )
    region: list[int] = opt(
        None,
        "rectangle to redraw: top left height width in pixels of the file (repeatable)",
        metavar="N",
        min=0,
        repeatable=True,
    )
    keep: str = opt(None, f"the half to keep: {', '.join(KEPT)} (a square)", choices=KEPT, metavar="HALF")
    redraw: list[float] = opt(
        None,
        "share of the codes to redraw at random",
        metavar="SHARE",
        above=0.0,
        max=1.0,
    )
    shape: list[int] = opt(
        None,
        "rows and columns of codes of a larger canvas, on which the picture is continued",
        metavar="N",
        min=1,
        max=65_536,
    )
    at: list[int] = opt(
        None,
        "with --shape: row and column of the picture's first code (default: in the middle)",
        metavar="N",
        min=0,
    )
    variants: int = opt(4, "results for each picture", min=1, max=1000)
    dilate: int = opt(0, "also redraw this many cells around the mask", "advanced", min=0, max=1000)
    blend: int = opt(
        None,
        "paste kept pixels back, with a soft edge of this width (default: no)",
        min=0,
        max=8192,
        metavar="PIXELS",
    )
    show_steps: bool = opt(False, "show how the first results are drawn, in 8 frames: a strip and a GIF")


EXAMPLES = """examples:
  python experiments/edit_images.py --sampler absorbing --dataset churches --log_dir edits_churches \\
      --ae_load_dir vqgan_churches --load_dir absorbing_churches --images ~/church.jpg --region 0 0 300 200
  python experiments/edit_images.py ... --images ~/church.jpg --shape 16 32 --at 0 8
"""


def settle(H):
    """Check which pictures and masks are given."""
    check_show_steps(H)
    if (H.images is None) == (H.numbers is None):
        raise UsageError("give the pictures to edit: --images PATH ..., or --numbers N ... of the data set")
    if H.numbers is not None and not H.data_entry["paths"]:
        raise UsageError("--numbers with --dataset custom needs --custom_dataset_path DIR")
    given = [f"--{name}" for name in ("mask", "region", "keep") if getattr(H, name) is not None]
    if H.redraw and given:
        raise UsageError(f"--redraw chooses its codes at random and contradicts {given[0]}: leave one of them out")
    if H.mask and not Path(H.mask).is_file():
        raise UsageError(f"--mask {H.mask!r} does not exist")
    if H.region and len(H.region) % 4:
        raise UsageError(f"--region {' '.join(map(str, H.region))}: give four numbers, top left height width")
    if H.at and not H.shape:
        raise UsageError(f"--at {' '.join(map(str, H.at))} needs --shape: the size of the canvas")
    if H.shape:
        settle_shape(H)


def settle_shape(H):
    """Check --shape and --at. By default the picture is in the middle of the canvas."""
    given = [f"--{name}" for name in ("mask", "region", "keep", "redraw", "dilate", "show_steps") if getattr(H, name)]
    if given:
        raise UsageError(f"--shape draws what is around the picture and contradicts {given[0]}: leave one of them out")
    if H.sampler != "absorbing" or H.sample_type != "diffusion":
        raise UsageError("--shape needs --sampler absorbing and --sample_type diffusion")
    h, w = H.latent_shape[1:]
    for name in ("shape", "at"):
        value = getattr(H, name)
        if value is not None and len(value) != 2:
            raise UsageError(f"--{name} {' '.join(map(str, value))} must be two numbers of codes, row and then column")
    rows, columns = H.shape
    if rows < h or columns < w:
        raise UsageError(f"--shape {rows} {columns} is smaller than the picture, {h} rows and {w} columns of codes")
    if (rows, columns) == (h, w):
        raise UsageError(f"--shape {rows} {columns} is the size of the picture: there is nothing to draw around it")
    H.at = H.at or [(rows - h) // 2, (columns - w) // 2]
    if H.at[0] + h > rows or H.at[1] + w > columns:
        raise UsageError(
            f"--at {H.at[0]} {H.at[1]}: the picture, {h} rows and {w} columns of codes, is not inside --shape {rows} "
            f"{columns}; --at is at most {rows - h} {columns - w}"
        )


COMMAND_LINE = dict(
    family="sampler",
    description="Redraw a part of pictures, given the rest.",
    epilog=EXAMPLES,
    extra=(EditConfig, CanvasConfig, ModelsConfig),
    reads=OF_SAMPLING,
    settle=settle,
    reads_images=False,
)
if __name__ == "__main__":  # before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import torch

from experiments.common.editing import Edits, Outpaintings, to_pixels
from experiments.common.images import find_pictures, load_images, read_picture, read_pictures
from experiments.common.models import dry_run_of_sampler, load_models
from experiments.common.pictures import GREY, show_denoising
from experiments.common.results import Report
from utils.core import distributed
from utils.core.files import write_json
from utils.data.decoding import open_image
from utils.data.masks import file_mask, fitted_mask, mask_outside, region_mask, scaled_mask, transparent_mask
from utils.data.sources import read_file
from utils.display.images import enlarge, sheet

MOST_ROWS = 16  # the largest number of rows of the sheet
MOST_STEPS = 25  # results that --show_steps shows
MIN_SHOWN = 96  # pixels: the sheet enlarges smaller pictures to this size


def read_all(H):
    """Read the pictures -> (names, pictures uint8 (N, C, H, W), masks (N, H, W) bool).

    The masks are None with --redraw or --shape."""
    if H.numbers is None:
        names, read = find_pictures("images", H.images), read_file
        pictures = read_pictures(H, "images", names)
    else:
        images = load_images(H, H.split, hold_out=True)
        if max(H.numbers) >= len(images):
            raise UsageError(f"--numbers {max(H.numbers)}: there are {len(images)} images, from 0 to {len(images) - 1}")
        sources = {images.name(i): images.indices[i] for i in H.numbers}
        names, read = list(sources), lambda name: images.source.read(sources[name])
        pictures = read_pictures(H, "numbers", names, read)
    if H.redraw or H.shape:
        return names, pictures, None
    masks = []
    for name in names:
        try:
            masks.append(mask_of(H, read(name)))
        except UserError:
            raise
        except ValueError as error:
            raise UsageError(f"{name!r}: {error}") from None
    return names, pictures, torch.stack(masks)


def mask_of(H, data):
    """The mask of one picture, (H, W) bool: all that --mask, --region and --keep mark. data: the bytes of its file.
    Raises ValueError if a mask does not fit the picture."""
    image, found = open_image(data), []
    if H.region:
        found.append(region_mask(image.size, zip(*[iter(H.region)] * 4, strict=True)))
    if H.mask:
        found.append(scaled_mask(read_picture("mask", H.mask, file_mask), image.size))
    if not H.region and not H.mask and not H.keep:
        found.append(transparent_mask(image))
        if found == [None]:
            raise ValueError(
                "nothing is marked for redrawing: give --mask, --region, --keep or --redraw, or transparent pixels"
            )
    masks = [fitted_mask(mask, H.img_size) for mask in found]
    mask = torch.stack(masks + ([mask_outside(H.keep, H.img_size)] if H.keep else [])).any(0)
    if not mask.any():
        raise ValueError("the mask marks no pixel that the model sees: white or transparent pixels are redrawn")
    return mask


def draw_sheet(edits, results):
    """Draw one picture, uint8 (C, h, w). Each row shows a picture, the picture with the redrawn cells in grey, and the
    results. With --shape, the picture is left out. results uint8 (n, C, H, W): those of the first pictures."""
    rows, size = [], results.shape[-2:]
    for i, row in enumerate(results.split(edits.columns)):
        hidden = to_pixels(edits.cells([(i + 1) * edits.columns - 1]), size)
        picture = edits.originals([i])
        rows += [] if edits.H.shape else [picture]
        rows += [picture.masked_fill(hidden[:, None], round(255 * GREY)), row]
    columns = edits.columns + (1 if edits.H.shape else 2)
    return sheet(torch.stack([enlarge(x, MIN_SHOWN) for x in torch.cat(rows)]), columns)


def main(H):
    names, pictures, masks = read_all(H)
    models = load_models(H)
    start = time.monotonic()
    with Report(H, models.device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        kind = Outpaintings if H.shape else Edits
        edits = kind(H, models, pictures, masks, H.variants, H.dilate, H.blend, H.redraw)
        rows, shown, first_ids, number, changed = [], [], [], 0, 0
        for ids, drawn in edits.all():
            for one, image in zip(ids, drawn, strict=True):
                picture, share, variant = edits.numbers_of(number)
                path = report.picture(f"edit_{picture}_{number % edits.columns}", image, min_side=1, shown="edit")
                cells = int(edits.cells([number]).sum())
                if not H.shape:
                    changed += int((one != edits.ids[picture]).sum())
                about = dict(redrawn=cells, share=share if H.redraw else None, variant=variant)
                rows.append(dict(picture=names[picture], result=path.name, **about))
                if number < MOST_ROWS * edits.columns:
                    shown.append(image)
                if number < MOST_STEPS:
                    first_ids.append(one)
                number += 1
        if not distributed.is_main():
            return
        write_json(report.folder / "edits.json", rows)
        path = report.picture("edits", draw_sheet(edits, torch.stack(shown)), min_side=1)
        if H.show_steps:
            first = range(len(first_ids))
            unknown = edits.cells(first).flatten(1).to(models.device)
            show_denoising(
                report, H, models, torch.stack(first_ids), edits.sampler_uniforms(first), "edit_steps", unknown
            )
        redrawn = sum(row["redrawn"] for row in rows)
        report.values(
            f"edited pictures ({path})",
            dict(
                pictures=len(names),
                results=len(rows),
                codes=one.numel(),
                redrawn=redrawn / len(rows),
                **({} if H.shape else dict(changed=changed / len(rows))),
                seconds=time.monotonic() - start,
            ),
        )


if __name__ == "__main__":
    run_main(dry_run_of_sampler if H.dry_run else main, H)

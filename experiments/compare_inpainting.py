"""Compares inpainting with two simple methods: the mean colour of the kept pixels, and the masked half of the training
image that is nearest in the kept half."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt


@dataclass
class CompareConfig:
    """comparison"""

    compared_images: int = opt(None, "validation images, evenly spaced (default: all)", min=1)
    dilate: int = opt(0, "also redraw this many cells around the mask", min=0, max=1000)
    blend: int = opt(4, "width in pixels of the soft edge of pasted pixels", min=0, max=8192)


EXAMPLES = """example:
  python experiments/compare_inpainting.py --sampler absorbing --dataset churches --log_dir inpainting_churches \\
      --ae_load_dir vqgan_churches --load_dir absorbing_churches --blend 8

The right and the lower half of each validation image are masked. For each method the script reports the PSNR of the
masked pixels, the perceptual distance to the image (by EfficientNet-Lite0), and the mean step of the pixels across the
border of the mask. The table "kept codes that change" shows how far hidden pixels change the codes of other cells.
"""
COMMAND_LINE = dict(
    family="sampler",
    description="Compare inpainting with simple methods.",
    epilog=EXAMPLES,
    extra=(CompareConfig, ModelsConfig),
    reads=OF_SAMPLING,
)
if __name__ == "__main__":  # before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import torch

from experiments.common.codes import decode_batch
from experiments.common.editing import ENCODED, Edits, encode_parts
from experiments.common.efficientnet import load_distance
from experiments.common.images import load_images
from experiments.common.models import dry_run_on_images, load_models, note_if_seen
from experiments.common.results import Report
from models.editing import blend, touched_cells
from utils.core import distributed
from utils.core.errors import run_main
from utils.core.progress import Progress
from utils.data.batches import one_pass
from utils.data.masks import mask_outside
from utils.data.pixels import to_float, to_uint8
from utils.display.images import enlarge, sheet

KEPT = ("left", "top")
SHOWN = 8  # pictures of the sheet
MIN_SHOWN = 96  # pixels: the sheet enlarges smaller pictures to this size


def nearest_halves(images, pictures, masks, batch_size, num_workers):
    """For each picture, uint8 (N, C, H, W), find the training image with the least squared error of the kept pixels.
    Returns these images, uint8 (N, C, H, W)."""
    kept = (~masks[:, None]).expand_as(pictures)
    best, found = torch.full((len(pictures),), torch.inf), pictures.clone()
    with Progress(len(images), "comparing training images", "img") as progress:
        for x, _ in one_pass(images, batch_size, num_workers):
            for i, picture in enumerate(pictures):
                errors = (to_float(x) - to_float(picture)).square().mul(kept[i]).flatten(1).sum(1)
                least, at = errors.min(0)
                if least < best[i]:
                    best[i], found[i] = least, x[at]
            progress.update(len(x))
    return found


def mean_colours(pictures, masks):
    """Pictures with the mean colour of their kept pixels everywhere, uint8 (N, C, H, W)."""
    kept = (~masks[:, None]).float()
    mean = (to_float(pictures) * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    return to_uint8(mean.expand(pictures.shape))


def step_at_border(pictures, masks):
    """The mean absolute difference of neighbouring pixels of which one is masked, (N,), for pixels in [0, 1]."""
    total, count = torch.zeros(len(pictures)), torch.zeros(len(pictures))
    for axis in (1, 2):
        border = masks.int().diff(dim=axis) != 0
        steps = to_float(pictures).diff(dim=axis + 1).abs().mean(1)
        total, count = total + (steps * border).sum((1, 2)), count + border.sum((1, 2))
    return total / count


@torch.no_grad()
def measure(result, pictures, masks, distance, device):
    """Return {name: value} of a method's results, uint8 (N, C, H, W)."""
    x, y, masked = to_float(pictures), to_float(result), masks[:, None].expand_as(pictures).flatten(1)
    error = ((x - y).square().flatten(1) * masked).sum(1) / masked.sum(1)
    perceptual = [distance(a.to(device), b.to(device)).flatten().cpu() for a, b in zip(x.split(64), y.split(64))]
    per_picture = dict(
        psnr=-10 * error.clamp(min=1e-10).log10(),
        perceptual=torch.cat(perceptual),
        step_at_border=step_at_border(result, masks),
    )
    figures = {}
    for name, values in per_picture.items():
        figures[name], figures[f"{name}_se"] = float(values.mean()), float(values.std() / len(values) ** 0.5)
    return dict(figures, psnr_median=float(per_picture["psnr"].median()))


def changed_by_distance(H, ids, hidden_ids, masks):
    """The share of kept codes that hiding the masked pixels changes, by the distance in cells from the mask: {distance:
    share}."""
    shape, shares = tuple(H.latent_shape[1:]), {}
    before, changed = touched_cells(masks, shape).flatten(1), ids != hidden_ids
    for cells in range(1, max(shape)):
        within = touched_cells(masks, shape, cells).flatten(1)
        if (ring := within & ~before).any():
            shares[f"{cells} cells away"] = float(changed[ring].float().mean())
        before = within
    return shares


def main(H):
    models, distance = load_models(H), load_distance()
    device, images = models.device, load_images(H, "train", hold_out=True)
    distance = distance.to(device)
    val = load_images(H, "val", hold_out=True)
    note_if_seen(H)
    val = val if H.compared_images is None else val.evenly(min(H.compared_images, len(val)))
    one = torch.cat([x for x, _ in one_pass(val, H.batch_size, H.num_workers)])
    pictures = one.repeat(len(KEPT), 1, 1, 1)
    masks = torch.cat([mask_outside(kept, H.img_size).expand(len(one), -1, -1) for kept in KEPT])
    with Report(H, device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        edits = Edits(H, models, pictures, masks, dilate=H.dilate)
        drawn = [result for _, result in edits.all()]
        if not distributed.is_main():
            return
        drawn = torch.cat(drawn)
        near = nearest_halves(images, pictures, masks, H.batch_size, H.num_workers)
        ae, x = models.autoencoder.model, to_float(pictures)
        ids = encode_parts(models, x.split(ENCODED))
        decoded = torch.cat([decode_batch(ae, part, H, models.precision).cpu() for part in ids.split(ENCODED)])
        pasted = {"model": drawn, "mean colour": mean_colours(pictures, masks), "nearest training image": near}
        results = {"image": pictures, "reconstruction": decoded, "model, not pasted": drawn}
        for width in sorted({0, H.blend}):
            for name, result in pasted.items():
                results[f"{name}, edge {width}"] = to_uint8(blend(x, to_float(result), masks, width))
        for name, result in results.items():
            about = dict(method=name, images=len(pictures))
            report.values(
                f"{name}: {len(pictures)} halves", measure(result, pictures, masks, distance, device), **about
            )
        report.values("kept codes that change", changed_by_distance(H, ids.cpu(), edits.ids, masks))
        shown = torch.stack([results[name] for name in results if "edge 0" not in name], 1)
        of = torch.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).long()
        rows = torch.stack([enlarge(image, MIN_SHOWN) for image in shown[of].flatten(0, 1)])
        report.picture("inpainting", sheet(rows, shown.shape[1]), min_side=1)


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)

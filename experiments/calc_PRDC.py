"""Precision, recall, density and coverage of samples (Kynkaanniemi et al. 2019; Naeem et al. 2020)."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.flags import FeaturesConfig, ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt


@dataclass
class PRDCConfig:
    """precision, recall, density, coverage"""

    n_samples: int = opt(None, "samples, and training images (spread evenly over the set), to compare", required=True,
                         min=2)  # fmt: skip
    nearest_k: int = opt(3, "neighbours that make an image's neighbourhood", min=1)
    real_feats: str = opt(None, "file of the training images' features (N, 2048), .npy or .pt: read where it is, "
                          "written where it is not", metavar="PATH")  # fmt: skip
    fake_feats: str = opt(None, "the same of the samples", metavar="PATH")
    fake_images_path: str = opt(None, "folder of images to measure instead of samples", metavar="DIR",
                                replaces=(*OF_SAMPLING, "seed"))  # fmt: skip


EXAMPLES = """examples:
  python experiments/calc_PRDC.py --sampler absorbing --dataset churches --log_dir PRDC_log \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 \\
      --ema --n_samples 50000
  python experiments/calc_PRDC.py ... --n_samples 50000 --fake_images_path ~/other_model/samples

Features are cached under features/: samples that calc_FID.py measured (the same models, --n_samples, --temp, --seed)
are not drawn again.
"""
COMMAND_LINE = dict(
    family="sampler", description="Precision, recall, density and coverage of samples.", epilog=EXAMPLES,
    extra=(PRDCConfig, FeaturesConfig, ModelsConfig), reads=OF_SAMPLING,
)  # fmt: skip
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

import os
from functools import partial

from experiments.common import dry_run_of_sampler, load_models, require_size
from experiments.measure import Samples, image_features
from experiments.report import Report
from utils import distributed
from utils.data import MAX_BROKEN_SHARE, ImageSet, open_images
from utils.errors import UsageError, UserError, run_main
from utils.features import Inception, read_features, write_features
from utils.prdc import prdc
from utils.progress import say, track
from utils.run import pick_device
from utils.sources import FolderImages


def real_images(H):
    """n_samples training images, spread evenly over the set, or all where there are fewer."""
    images = open_images(H, "train")
    if len(images) < H.nearest_k + 2:
        raise UserError(f"{H.data_entry['origin']}: {len(images)} images are too few for --nearest_k {H.nearest_k}")
    if len(images) <= H.n_samples:
        return images
    return images.evenly(H.n_samples)


def count_real(H):
    require_size(H)
    return len(real_images(H))


def fake_images(H):
    """The first n_samples images of --fake_images_path, in the order of their paths."""
    if not os.path.isdir(H.fake_images_path):
        raise UserError(f"--fake_images_path {H.fake_images_path} is not a folder")
    source = FolderImages([H.fake_images_path])
    distributed.must_agree(source.enumeration, f"the list of images (--fake_images_path {H.fake_images_path})")
    if len(source) < H.n_samples:
        raise UserError(f"{H.fake_images_path} holds {len(source)} images; --n_samples {H.n_samples} asks for more")
    return ImageSet(source, range(H.n_samples), H.img_size, H.n_channels)


def least(n):
    """How many features n images have when as many are broken as may be."""
    return n - int(MAX_BROKEN_SHARE * n)


def from_file(path, n, count=None):
    """The first n features of the file, or None where there is no file. UserError where they are fewer than least(n),
    and not all that there can be: count() says of how many images."""
    if not (path and os.path.exists(path)):
        return None
    features = read_features(path)
    if len(features) < least(n) and (count is None or len(features) < least(count())):
        raise UserError(f"{path} holds features of {len(features)} images; {n} are asked for (--n_samples)")
    say(f"features read from {path}")
    return features[:n]


def computed(path, compute):
    """The features of the FeatureSet that compute() gives, in every process; with a path they are written there."""
    found = compute()
    features = distributed.tensor_from_main(found and found.features)
    if path and distributed.is_main():
        write_features(path, features)
        say(f"features written to {path}")
    return features


def main(H):
    if H.fake_feats and H.fake_images_path and os.path.exists(H.fake_feats):
        raise UsageError(f"--fake_feats {H.fake_feats} exists and contradicts --fake_images_path: give one of them")
    if H.n_samples < H.nearest_k + 2:
        raise UsageError(f"--n_samples {H.n_samples} is too small for --nearest_k {H.nearest_k}: {H.nearest_k + 2} do")
    device = pick_device(H.device)
    fake = from_file(H.fake_feats, H.n_samples)
    real = from_file(H.real_feats, H.n_samples, count=lambda: count_real(H))
    sampling = fake is None and not H.fake_images_path
    extracting = real is None or fake is None
    if extracting and not sampling:
        require_size(H)
    extractor = Inception(H.feature_weights, device) if extracting else None
    models = load_models(H) if sampling else None
    about = dict(autoencoder=models.autoencoder, sampler=models.sampler) if sampling else {}
    with Report(H, device, **about) as report:

        def fake_features():
            if sampling:
                return Samples(H, models, H.n_samples).features(extractor)
            return image_features(H, extractor, fake_images(H), kind="fake", keep=True)

        if real is None:  # first: damaged images are found here, and samples may take hours
            real = computed(H.real_feats, lambda: image_features(H, extractor, real_images(H), keep=True))
        if fake is None:
            fake = computed(H.fake_feats, fake_features)
        if len(real) != len(fake):
            say(f"note: {len(real)} training images stand against {len(fake)} samples")
        progress = partial(track, description="distances", each=distributed.world_size())
        values = prdc(real.to(device), fake.to(device), H.nearest_k, progress=progress)
        report.values(
            f"{len(fake)} samples against {len(real)} training images of '{H.dataset}', k = {H.nearest_k}",
            dict(values, samples=len(fake), training_images=len(real)),
            features=extractor.identity if extractor else None,
        )  # fmt: skip


if __name__ == "__main__":
    run_main(dry_run_of_sampler if H.dry_run else main, H)

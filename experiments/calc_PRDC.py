"""Precision, recall, density and coverage of samples (Kynkaanniemi et al. 2019; Naeem et al. 2020)."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import AGAINST, AgainstConfig, FeaturesConfig, ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt


@dataclass
class PRDCConfig:
    """precision, recall, density, coverage"""

    n_samples: int = opt(
        None, "samples, and training images (spread evenly over the set), to compare", required=True, min=2
    )
    nearest_k: int = opt(3, "neighbours that make an image's neighbourhood", min=1)
    real_feats: str = opt(
        None,
        "file of the training images' features (N, 2048), .npy or .pt: read if it exists, otherwise written",
        metavar="PATH",
    )
    fake_feats: str = opt(None, "the same of the samples", metavar="PATH")
    fake_images_path: str = opt(
        None, "folder of images to measure instead of samples", metavar="DIR", replaces=(*OF_SAMPLING, "seed")
    )


EXAMPLES = """examples:
  python experiments/calc_PRDC.py --sampler absorbing --dataset churches --log_dir PRDC_log \\
      --ae_load_dir vqgan_churches --load_dir absorbing_churches --n_samples 50000
  python experiments/calc_PRDC.py ... --n_samples 50000 --fake_images_path ~/other_model/samples

Features are cached: samples that calc_FID.py measured with the same flags are not drawn again.
"""
COMMAND_LINE = dict(
    family="sampler",
    description="Precision, recall, density and coverage of samples.",
    epilog=EXAMPLES,
    extra=(PRDCConfig, FeaturesConfig, AgainstConfig, ModelsConfig),
    reads=OF_SAMPLING,
)
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

import os

from experiments.common.images import load_images
from experiments.common.measure import Images, Samples, compare, identity_of, load_extractors, reference
from experiments.common.models import dry_run_on_images, load_models, require_size
from experiments.common.results import Report
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.errors import UsageError, UserError, run_main
from utils.core.progress import say
from utils.data.images import MAX_BROKEN_SHARE, ImageSet
from utils.data.sources import FolderImages
from utils.evaluation import feature_files
from utils.evaluation.features import FeatureSet


def real_images(H, models=None):
    """n_samples training images, or what --against names if there are models, evenly spaced in the set; all if there
    are fewer."""
    images = load_images(H, "train")
    if len(images) < H.nearest_k + 2:
        raise UserError(f"{H.data_entry['origin']}: {len(images)} images are too few for --nearest_k {H.nearest_k}")
    side = reference(H, images, models) if models else Images(H, images)
    return side.at_most(H.n_samples)


def fake_images(H):
    """The first n_samples images of --fake_images_path, in the order of their paths."""
    if not os.path.isdir(H.fake_images_path):
        raise UserError(f"--fake_images_path {H.fake_images_path} is not a folder")
    source = FolderImages([H.fake_images_path])
    distributed.must_agree(source.enumeration, f"the list of images (--fake_images_path {H.fake_images_path})")
    if len(source) < H.n_samples:
        raise UserError(f"{H.fake_images_path} holds {len(source)} images; --n_samples {H.n_samples} asks for more")
    images = ImageSet(source, range(H.n_samples), H.img_size, H.n_channels)
    return Images(H, images, "fake", f"{H.n_samples} images of {H.fake_images_path}")


class FiledSide:
    """One side of the comparison, with the file that --real_feats or --fake_feats names. If the file exists, it is
    read (its first n_samples features); otherwise it is written.

    count: the features that were read. made_by: the file's header, None if it has none. source: what the flags
    describe, Images or Samples; None if they describe nothing.
    """

    def __init__(self, H, option):
        self.H, self.option, self.path, self.source, self.file = H, option, getattr(H, option), None, None
        about = distributed.from_main(self._read)
        self.exists = about is not None
        self.count, self.sha256, self.made_by = about or (H.n_samples, None, None)

    def _read(self):
        if self.path and os.path.exists(self.path):
            self.file = feature_files.read(self.path)
            return len(self.file.features[: self.H.n_samples]), self.file.sha256, self.file.made_by

    def check(self, extractors):
        """UsageError if the file states that it was made of anything else than `source`, or by another network (if one
        is loaded)."""
        identity = identity_of(extractors) or {}
        # More samples begin with these, and another device rounds differently.
        wanted = {k: v for k, v in dict(self.source.header(), **identity).items() if k not in ("n", "device")}
        if found := feature_files.differences(self.made_by, wanted):
            raise UsageError(
                f"--{self.option} {self.path} holds features of {self.made_by.get('what')}; this command would take "
                f"others ({found}): give another file, or remove this one to compute it again"
            )

    def at_most(self, n):
        return self

    def features(self, extractor, keep=True):
        """Its FeatureSet, read or computed now; None on other than the main process."""
        if self.exists:
            return self.file and FeatureSet(self.count, features=self.file.features[: self.count])
        header = self.source.header()
        found = self.source.features(extractor, keep)
        self.made_by = dict(what=self.source.what, **header, **extractor.identity)
        if self.path and found:
            self.sha256 = feature_files.write(self.path, found.features, self.made_by)
            say(f"features written to {self.path}")
        return found


def least(n):
    """The least number of features of n images, with as many broken images as allowed."""
    return n - int(MAX_BROKEN_SHARE * n)


def check_files(H, real, fake):
    """UserError for files that contradict the flags or each other, or hold too little: fewer than least(n_samples)
    features, and not all that there can be."""
    if fake.exists and not fake.made_by and H.fake_images_path:
        raise UsageError(f"--fake_feats {H.fake_feats} exists and contradicts --fake_images_path: give one of them")
    if real.exists and not real.made_by and H.against == AGAINST[1]:
        raise UsageError(
            f"--real_feats {H.real_feats} exists and contradicts --against {H.against}: the file does not state what "
            "it was made of; leave one of them out"
        )
    for side in (fake, real):
        if side.count >= least(H.n_samples):
            continue
        if side is real:
            require_size(H)
        if side is fake or side.count < least(len(real_images(H).images)):
            raise UserError(
                f"{side.path} holds features of {side.count} images; {H.n_samples} are asked for (--n_samples)"
            )
    if real.made_by and fake.made_by:
        network = {name: real.made_by.get(name) for name in ("extractor", "weights")}
        if found := feature_files.differences(fake.made_by, network):
            raise UsageError(f"--fake_feats and --real_feats hold features of different networks: {found}")


def describe(H, real, fake):
    """Set the sources of both sides that must be computed or compared with a file, as far as the flags describe them.
    Returns the models, or None if none are needed."""
    models = None
    if not H.fake_images_path and (not fake.exists or (fake.made_by and H.load_step)):
        models = load_models(H)
        fake.source = Samples(H, models, H.n_samples)
    elif H.fake_images_path or not real.exists or real.made_by:
        require_size(H)
    if not real.exists or real.made_by:
        rebuilt = H.against == AGAINST[1]
        if rebuilt and models is None:
            models = load_models(H, with_sampler=False)
        real.source = real_images(H, models)
        what = f"{len(real.source.images)} training images of '{H.dataset}'"
        real.source.what = f"reconstructions of {what}" if rebuilt else what
    if H.fake_images_path:
        fake.source = fake_images(H)
    return models


def introduce(H, real, fake, extractors):
    """Print which features were read from files, their origin, and which flags have no effect then."""
    for side in (real, fake):
        if side.exists:
            what = side.made_by.get("what") if side.made_by else "the file does not state their origin"
            say(f"features read from {side.path}: {what}")
    idle = () if fake.source else ("load_dir", "load_step", "seed", *OF_SAMPLING)
    idle += () if extractors else ("extractor", "feature_weights", "feature_batch")
    if given := [f"--{name}" for name in idle if name in H.explicit]:
        say(f"note: no effect next to files of features: {' '.join(given)}")


def main(H):
    if H.n_samples < H.nearest_k + 2:
        raise UsageError(f"--n_samples {H.n_samples} is too small for --nearest_k {H.nearest_k}: {H.nearest_k + 2} do")
    device = pick_device(H.device)
    sides = real, fake = FiledSide(H, "real_feats"), FiledSide(H, "fake_feats")
    check_files(H, real, fake)
    extractors = {} if real.exists and fake.exists else load_extractors(H, ["prdc"], device)
    models = describe(H, real, fake)
    for side in sides:
        if side.exists and side.source:
            side.check(extractors)
    introduce(H, real, fake, extractors)
    about = dict(autoencoder=models.autoencoder, sampler=models.sampler) if models else {}
    with Report(H, device, **about) as report:
        values = compare(H, ["prdc"], extractors, real, fake)
        files = {
            side.option: dict(path=side.path, sha256=side.sha256, made_by=side.made_by) for side in sides if side.path
        }
        report.compared(values, f", k = {H.nearest_k}", features=identity_of(extractors), feature_files=files)


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)

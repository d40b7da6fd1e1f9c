"""Precision, recall, density and coverage of samples (Kynkaanniemi et al. 2019; Naeem et al. 2020)."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import FeaturesConfig, ModelsConfig
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
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 \\
      --ema --n_samples 50000
  python experiments/calc_PRDC.py ... --n_samples 50000 --fake_images_path ~/other_model/samples

Features are cached under features/: samples that calc_FID.py measured (the same models, --n_samples, --temp, --seed)
are not drawn again.
"""
COMMAND_LINE = dict(
    family="sampler",
    description="Precision, recall, density and coverage of samples.",
    epilog=EXAMPLES,
    extra=(PRDCConfig, FeaturesConfig, ModelsConfig),
    reads=OF_SAMPLING,
)
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

import os
from functools import partial

from experiments.common.images import load_images
from experiments.common.measure import Samples, image_features
from experiments.common.models import dry_run_on_images, load_models, require_size
from experiments.common.results import Report
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.errors import UsageError, UserError, run_main
from utils.core.progress import say, track
from utils.data.images import MAX_BROKEN_SHARE, ImageSet
from utils.data.sources import FolderImages
from utils.evaluation import feature_files
from utils.evaluation.feature_files import FeatureFile
from utils.evaluation.features import Inception
from utils.evaluation.prdc import prdc


def real_images(H):
    """n_samples training images, evenly spaced in the set, or all if there are fewer."""
    images = load_images(H, "train")
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
    """The least number of features of n images, with as many broken images as allowed."""
    return n - int(MAX_BROKEN_SHARE * n)


def from_file(H, option):
    """The FeatureFile that --real_feats or --fake_feats names, with its first n_samples features, in every process;
    None if the file does not exist."""
    path = getattr(H, option)
    found = feature_files.read(path) if path and distributed.is_main() and os.path.exists(path) else None
    about = distributed.from_main(lambda: found and (found.sha256, found.made_by))
    if about is None:
        return None
    return FeatureFile(distributed.tensor_from_main(found and found.features)[: H.n_samples], *about)


class Side:
    """One side of the comparison, as the flags describe it: what its features are of (`what`, text), all that they
    depend on (`header`, JSON values), and how to compute them."""

    def __init__(self, kind, what, compute, **depends):
        self.what, self.compute, self.header = what, compute, dict(kind=kind, **depends)

    @classmethod
    def of_images(cls, H, images, kind, what):
        def compute(extractor):
            return image_features(H, extractor, images, kind=kind, keep=True)

        def depends():
            return dict(images.identity(), contents=images.origin()["contents"])

        return cls(kind, f"{len(images)} {what}", compute, images=distributed.from_main(depends))

    @classmethod
    def of_samples(cls, H, models):
        samples = Samples(H, models, H.n_samples)
        return cls("samples", f"{H.n_samples} samples of {models.sampler.path}", samples.features, **samples.header())

    def check(self, H, option, file, identity):
        """UsageError if a file states that it was made of anything else. identity: the extractor's, if it is known."""
        # More samples begin with these, and another device rounds differently.
        wanted = {k: v for k, v in dict(self.header, **identity).items() if k not in ("n", "device")}
        if found := feature_files.differences(file.made_by, wanted):
            raise UsageError(
                f"--{option} {getattr(H, option)} holds features of {file.made_by.get('what')}; this command would "
                f"take others ({found}): give another file, or remove this one to compute it again"
            )

    def computed(self, H, option, extractor):
        """The FeatureFile of what is computed now, in every process; if a path is given, it is written there."""
        found, path, digest = self.compute(extractor), getattr(H, option), None
        features = distributed.tensor_from_main(found and found.features)
        made_by = dict(what=self.what, **self.header, **extractor.identity)
        if path and distributed.is_main():
            digest = feature_files.write(path, features, made_by)
            say(f"features written to {path}")
        return FeatureFile(features, digest, made_by)


def check_files(H, real, fake):
    """UserError for files (FeatureFile or None) that contradict the flags or each other, or hold too little: fewer
    than least(n_samples) features, and not all that there can be."""
    if fake and not fake.made_by and H.fake_images_path:
        raise UsageError(f"--fake_feats {H.fake_feats} exists and contradicts --fake_images_path: give one of them")
    for path, file, count in ((H.fake_feats, fake, None), (H.real_feats, real, count_real)):
        n = H.n_samples if file is None else len(file.features)
        if n < least(H.n_samples) and (count is None or n < least(count(H))):
            raise UserError(f"{path} holds features of {n} images; {H.n_samples} are asked for (--n_samples)")
    if real and fake and real.made_by and fake.made_by:
        network = {name: real.made_by.get(name) for name in ("extractor", "weights")}
        if found := feature_files.differences(fake.made_by, network):
            raise UsageError(f"--fake_feats and --real_feats hold features of different networks: {found}")


def introduce(H, files, described, extractor):
    """Print which features were read from files, their origin, and which flags have no effect then."""
    for option, file in files.items():
        if file is not None:
            what = file.made_by.get("what") if file.made_by else "the file does not state their origin"
            say(f"features read from {getattr(H, option)}: {what}")
    idle = () if "fake_feats" in described else ("load_dir", "load_step", "seed", *OF_SAMPLING)
    idle += () if extractor else ("feature_weights", "feature_batch")
    if given := [f"--{name}" for name in idle if name in H.explicit]:
        say(f"note: no effect next to files of features: {' '.join(given)}")


def sides(H, real, fake):
    """The Sides {option: Side} that must be computed or compared with a file, as far as the flags describe them; and
    the models that were loaded for that, or None. real, fake: FeatureFile or None."""
    found, models = {}, None
    if not H.fake_images_path and (fake is None or (fake.made_by and H.load_step)):
        models = load_models(H)
    elif H.fake_images_path or real is None or real.made_by:
        require_size(H)
    if real is None or real.made_by:
        found["real_feats"] = Side.of_images(H, real_images(H), "real", f"training images of '{H.dataset}'")
    if H.fake_images_path:
        found["fake_feats"] = Side.of_images(H, fake_images(H), "fake", f"images of {H.fake_images_path}")
    elif models:
        found["fake_feats"] = Side.of_samples(H, models)
    return found, models


def main(H):
    if H.n_samples < H.nearest_k + 2:
        raise UsageError(f"--n_samples {H.n_samples} is too small for --nearest_k {H.nearest_k}: {H.nearest_k + 2} do")
    device = pick_device(H.device)
    files = {option: from_file(H, option) for option in ("real_feats", "fake_feats")}
    check_files(H, *files.values())
    extractor = Inception(H.feature_weights, device) if None in files.values() else None
    described, models = sides(H, *files.values())
    for option, side in described.items():
        if files[option] is not None:
            side.check(H, option, files[option], extractor.identity if extractor else {})
    introduce(H, files, described, extractor)
    about = dict(autoencoder=models.autoencoder, sampler=models.sampler) if models else {}
    with Report(H, device, **about) as report:
        for option in files:  # the real images first: damaged images are found there, and samples may take hours
            files[option] = files[option] or described[option].computed(H, option, extractor)
        real, fake = (file.features for file in files.values())
        if len(real) != len(fake):
            say(f"note: {len(real)} training images stand against {len(fake)} samples")
        progress = partial(track, description="distances", each=distributed.world_size())
        values = prdc(real.to(device), fake.to(device), H.nearest_k, progress=progress)
        report.values(
            f"{len(fake)} samples against {len(real)} training images of '{H.dataset}', k = {H.nearest_k}",
            dict(values, samples=len(fake), training_images=len(real)),
            features=extractor.identity if extractor else None,
            feature_files={
                option: dict(path=getattr(H, option), sha256=file.sha256, made_by=file.made_by)
                for option, file in files.items()
                if getattr(H, option)
            },
        )


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)

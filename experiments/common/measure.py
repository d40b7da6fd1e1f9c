"""Computes features of the two sides of a comparison, which are real images and generated images."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.common.codes import decoded_batches, reconstruct_batch
from experiments.common.efficientnet import EfficientNetExtractor
from experiments.common.flags import AGAINST
from experiments.common.models import Models
from experiments.common.sampling import sample_batches
from experiments.common.weights import Loaded
from hparams.config import key_of_samples
from hparams.resolve import Hparams
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import hash_tensors, load_tensors, save_tensors
from utils.core.progress import Progress, say
from utils.data.batches import one_pass
from utils.data.images import ImageSet
from utils.display.images import save_png
from utils.evaluation import features
from utils.evaluation.features import FeatureSet, collect, is_plain, tensor_of_npy
from utils.evaluation.metrics import EXTRACTORS, METRICS, inception

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def each_image(images: ImageSet, H: Hparams, work: Callable, what: str) -> Iterator[tuple]:
    """Yield work(x) for every decodable image of an ImageSet once, uint8 x (B, C, H, W).

    The processes share the work, and the main process gets the results in order (utils.core.distributed.in_order).
    work returns a tuple of CPU tensors of B rows. Broken images are reported. what: the text of the progress bar.
    """

    def share() -> Iterator[tuple | None]:
        for x, _ in one_pass(images, H.feature_batch, H.num_workers, shared=True):
            yield work(x) if len(x) else None

    with Progress(len(images), what, "img") as progress:
        for result in distributed.in_order(share()):
            yield result
            progress.update(len(result[0]))


class Images:
    """One side of a comparison, made of the images of an ImageSet, or of their reconstructions if there are models.

    kind: 'real' or 'fake'. what: a name for messages."""

    def __init__(self, H: Hparams, images: ImageSet, kind: str = "real", what: str = "", models: Models | None = None):
        self.H, self.images, self.what, self.models = H, images, what, models
        self.kind = "reconstructions" if models else kind

    def at_most(self, n: int) -> "Images":
        """Return these images, or n evenly spaced images if there are more than n."""
        if len(self.images) <= n:
            return self
        return Images(self.H, self.images.evenly(n), self.kind, self.what, self.models)

    def header(self) -> dict:
        """Return all values that determine the features, except the extractor, for files of features."""
        images = distributed.from_main(lambda: dict(self.images.identity(), contents=self.images.origin()["contents"]))
        return dict(kind=self.kind, images=images, **self._made_by())

    def _made_by(self) -> dict:
        """Return what reconstructions depend on, except the images."""
        if (models := self.models) is None:
            return {}
        return dict(
            autoencoder=models.autoencoder.hash, precision=models.precision.describe(), device=models.device.type
        )

    def features(self, extractor: Any, keep: bool = True) -> FeatureSet | None:
        """Return the FeatureSet of these images, from the cache or computed. Only the main process gets a
        FeatureSet."""
        identity = distributed.from_main(self.images.identity)
        header = dict(kind=self.kind, **extractor.identity, images=identity, **self._made_by())
        if distributed.from_main(features.cache_path(dict(header, keep=True)).is_file):
            keep = True  # use the larger cache that exists
        what = "features of reconstructions" if self.models else f"features of {self.kind} images"

        def work(x: torch.Tensor) -> tuple:
            return extractor(reconstruct_batch(x, self.H, self.models) if self.models else x)

        def compute() -> FeatureSet | None:
            found = collect(each_image(self.images, self.H, work, what), what, keep)
            if found is not None:
                found.left_out = self.images.left_out(range(len(self.images)))
            return found

        return features.cached(dict(header, keep=keep), compute, say, self.images)


def reference(H: Hparams, images: ImageSet, models: Models) -> Images:
    """Return what --against names: these images, or their reconstructions."""
    return Images(H, images, models=models if H.against == AGAINST[1] else None)


class Samples:
    """One side of a comparison, made of the first n samples of a model, or of the first n codes of a file.

    on_images: a function that gets each batch once, uint8 (b, C, H, W). The samples are then decoded even if a cache
    exists.
    """

    def __init__(self, H: Hparams, models: Models, n: int, latents_path: str | None = None):
        self.H, self.models, self.n = H, models, n
        self.what = f"{n} samples of {models.sampler.path}" if models.sampler else f"{n} samples of {latents_path}"
        self.ids: Any = None
        self.drawn: Any = None
        self.on_images: Callable | None = None
        if latents_path is not None:
            self.ids = read_latents(latents_path, n, H, models.autoencoder)
            self.drawn = [self.ids[rows.start : rows.stop] for rows, _ in self._turns()]

    def _turns(self) -> Iterator[tuple[range, int]]:
        return distributed.turns(0, self.n, self.H.batch_size)

    def id_batches(self) -> Iterator[torch.Tensor]:
        """Yield ids (b, L) of this process's share of the n rows. The ids are drawn only once."""
        H, models = self.H, self.models
        if self.drawn is None:
            drawn = []
            for ids in sample_batches(models.sampler.model, self.n, H, models.precision, models.device):
                drawn.append(ids.cpu())
                yield ids
            self.drawn = drawn
            return
        with Progress(self.n, "decoding", "img") as progress:
            for ids, (_, of_all) in zip(self.drawn, self._turns(), strict=True):
                yield ids
                progress.update(of_all)

    def all_ids(self) -> torch.Tensor | None:
        """Return the codes of all samples, (n, L) on the CPU, drawn if necessary. Processes other than the main process
        get None."""
        if self.drawn is None:
            list(self.id_batches())
        parts = list(distributed.in_order(self.drawn))
        return torch.cat(parts) if parts else None

    def header(self) -> dict:
        """Return all values that determine the samples, for the keys of caches."""
        H, models = self.H, self.models
        common = dict(
            kind="samples",
            autoencoder=models.autoencoder.hash,
            precision=models.precision.describe(),
            device=models.device.type,
            n=self.n,
        )
        if self.ids is not None:
            return dict(common, latents=hash_tensors(dict(ids=self.ids)))
        return dict(common, sampler=models.sampler.hash, **key_of_samples(vars(H)))

    def features(self, extractor: Any, keep: bool = True) -> FeatureSet | None:
        """Return the FeatureSet of the samples with features and logits, from the cache or computed. Processes other
        than the main process get None."""
        header = dict(extractor.identity, **self.header())
        if self.on_images is None:
            return features.cached(header, lambda: self.compute(extractor), say)
        found = self.compute(extractor)
        self.on_images = None
        if found is not None:
            features.store(header, found, say)
        return found

    def compute(self, extractor: Any) -> FeatureSet | None:
        """Compute the FeatureSet without the cache. Processes other than the main process get None."""

        def share() -> Iterator[tuple]:
            for images in decoded_batches(self.id_batches(), self.H, self.models):
                pieces = zip(*map(extractor, images.split(self.H.feature_batch)), strict=True)
                yield *map(torch.cat, pieces), images.cpu() if self.on_images else None

        def pairs() -> Iterator[tuple]:
            for found, logits, images in distributed.in_order(share()):
                if self.on_images:
                    self.on_images(images)
                yield found, logits

        return collect(pairs(), "features of samples", keep=True, logits=True)


def load_extractor(H: Hparams, device: torch.device, load: Callable = inception) -> Any:
    """Load the extractor of a metric. load: the metric's function for loading. --extractor can replace Inception."""
    return EfficientNetExtractor(device) if load is inception and H.extractor != EXTRACTORS[0] else load(H, device)


def load_extractors(H: Hparams, names: list[str], device: torch.device) -> dict:
    """Load the extractors of some metrics -> {function that loads an extractor: extractor}."""
    return {load: load_extractor(H, device, load) for load in dict.fromkeys(METRICS[name].extractor for name in names)}


def compare(H: Hparams, names: list[str], extractors: dict, real: Any, fake: Any) -> dict:
    """Compute the metrics of these names for two sides -> {name: number}, including the numbers of images. Processes
    other than the main process get {}. real: Images, or an object with the same methods; fake: Samples, or such an
    object."""
    metrics = [METRICS[name] for name in names]
    sides = [(metric.extractor, real.at_most(metric.most_real)) for metric in metrics]
    reals, values = {}, {}
    # The real images come first, because they may be damaged, and samples may take hours. Metrics that keep features
    # come first, because the other metrics can use the same features.
    for metric, (load, side) in sorted(zip(metrics, sides, strict=True), key=lambda pair: not pair[0].keep):
        if (load, side) not in reals:
            reals[load, side] = side.features(extractors.get(load), metric.keep)
    fakes = {load: fake.features(extractors.get(load)) for load in dict.fromkeys(load for load, _ in sides)}
    for metric, side in zip(metrics, sides, strict=True):
        if metric.in_all_processes or distributed.is_main():
            values.update(metric.compute(reals[side], fakes[side[0]], H))
    if not distributed.is_main():
        return {}
    return dict(values, samples=fakes[sides[0][0]].count, training_images=reals[sides[0]].count)


def identity_of(extractors: dict) -> Any:
    """Return the identity of the network for metrics.jsonl. Several networks give a list of identities."""
    found = [extractor.identity for extractor in extractors.values()]
    return found if len(found) > 1 else next(iter(found), None)


def write_latents(path: Path | str, ids: torch.Tensor, autoencoder: Loaded) -> None:
    """Write codes (N, L) of an autoencoder (models.pretrained.Loaded) to a file that read_latents reads."""
    save_tensors(path, dict(ids=ids, header=dict(autoencoder=autoencoder.hash)))


def read_latents(path: Path | str, n: int, H: Any, autoencoder: Loaded) -> torch.Tensor:
    """Read the first n rows of codes in a file: ids (n, L) int64.

    path: a torch file (a tensor, a list of tensors, {'ids': tensor}, or a cache under latents/) or a .npy file. The
    file holds integers (N, L) or (N, h, w). Raises UserError for other contents, for fewer than n rows, and if the file
    records another autoencoder.
    """
    if str(path).endswith(".npy"):
        ids: Any = tensor_of_npy(path)
    else:
        value = load_tensors(path)
        header = value.get("header") if isinstance(value, dict) else None
        made_by = header.get("autoencoder") if isinstance(header, dict) else None
        if made_by is not None and made_by != autoencoder.hash and not H.allow_other_ae:
            raise UserError(
                f"{path} holds the codes of another autoencoder than {autoencoder.path}: "
                "give that one (or --allow_other_ae)"
            )
        value = value.get("tensors", value) if isinstance(value, dict) else value
        ids = value.get("ids") if isinstance(value, dict) else value
        if isinstance(ids, list):
            with contextlib.suppress(TypeError, RuntimeError):  # the next check reports bad lists
                ids = torch.cat(ids)
    if not is_plain(ids) or ids.dtype not in INTEGERS or ids.ndim < 2 or ids.shape[1:].numel() != H.block_size:
        found = type(ids).__name__
        if torch.is_tensor(ids):
            found = f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        raise UserError(f"{path} holds no codes (integers of shape (N, {H.block_size})), but {found}")
    if len(ids) < n:
        raise UserError(f"{path} holds {len(ids)} rows of codes; --n_samples {n} asks for more")
    ids = ids[:n].flatten(1).long()
    if ids.min() < 0 or ids.max() >= H.codebook_size:
        raise UserError(f"{path} holds codes outside 0 ... {H.codebook_size - 1}: not of this autoencoder")
    return ids


def saving_images(folder: Path) -> Callable:
    """Return a function that writes each image of a batch as a PNG file into a new folder.

    Raises UserError if the folder already holds images, because images of two runs must not be mixed. (Only the main
    process checks and creates the folder.)
    """
    number = itertools.count()
    if distributed.is_main():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds images of an earlier run: remove it, or give another --log_dir")
        folder.mkdir(parents=True, exist_ok=True)

    def save(batch: torch.Tensor) -> None:
        for image in batch.cpu():
            save_png(folder / f"{next(number):06d}.png", image)

    return save

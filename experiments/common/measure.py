"""Features of both sides of a comparison: real images, and images that the models make."""

import contextlib
import itertools

import torch

from experiments.common.codes import decode_batch
from experiments.common.sampling import sample_batches
from hparams.config import key_of_samples
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import hash_tensors, load_tensors, save_tensors
from utils.core.progress import Progress, say
from utils.data.batches import one_pass
from utils.display.images import save_png
from utils.evaluation import features
from utils.evaluation.features import collect, is_plain, tensor_of_npy

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def each_image(images, H, work, what):
    """Yield work(x) for every decodable image of an ImageSet once, uint8 x (B, C, H, W).

    The processes share the work, and the main process gets the results in order (utils.core.distributed.in_order).
    work returns a tuple of CPU tensors of B rows. Broken images are reported. what: the text of the progress bar.
    """

    def share():
        for x, _ in one_pass(images, H.feature_batch, H.num_workers, shared=True):
            yield work(x) if len(x) else None

    with Progress(len(images), what, "img") as progress:
        for result in distributed.in_order(share()):
            yield result
            progress.update(len(result[0]))


def image_features(H, extractor, images, kind="real", keep=False):
    """The FeatureSet of an ImageSet, from the cache or computed now. kind: 'real' or 'fake'."""
    header = dict(kind=kind, **extractor.identity, images=distributed.from_main(images.identity))
    if distributed.from_main(features.cache_path(dict(header, keep=True)).is_file):
        keep = True  # a cache with more than requested exists
    what = f"features of {kind} images"

    def compute():
        found = collect(each_image(images, H, extractor, what), what, keep)
        if found is not None:
            found.left_out = images.left_out(range(len(images)))
        return found

    return features.cached(dict(header, keep=keep), compute, say, images)


class Samples:
    """The first n samples of a model, or the first n codes of a file: batches of ids, and what they depend on."""

    def __init__(self, H, models, n, latents_path=None):
        self.H, self.models, self.n = H, models, n
        self.ids = None if latents_path is None else read_latents(latents_path, n, H, models.autoencoder)

    def id_batches(self):
        """Yield ids (b, L): this process's share of the n rows, as in sample_batches."""
        H, models = self.H, self.models
        if self.ids is None:
            yield from sample_batches(models.sampler.model, self.n, H, models.precision, models.device)
            return
        with Progress(self.n, "decoding", "img") as progress:
            for rows, of_all in distributed.turns(0, self.n, H.batch_size):
                yield self.ids[rows.start : rows.stop]
                progress.update(of_all)

    def header(self):
        """Everything that the samples depend on, for the keys of caches."""
        H, models = self.H, self.models
        common = dict(
            autoencoder=models.autoencoder.hash,
            precision=models.precision.describe(),
            device=models.device.type,
            n=self.n,
        )
        if self.ids is not None:
            return dict(common, latents=hash_tensors(dict(ids=self.ids)))
        return dict(common, sampler=models.sampler.hash, **key_of_samples(vars(H)))

    def features(self, extractor, on_ids=None, on_images=None):
        """Their FeatureSet with features and logits, from the cache or computed now.

        on_ids, on_images: called with each batch; if one is given, the samples are drawn even if a cache exists.
        """

        model, device = self.models.autoencoder.model, self.models.device

        def share():
            for ids in self.id_batches():
                images = decode_batch(model, ids.to(device), self.H, self.models.precision)
                pieces = zip(*map(extractor, images.split(self.H.feature_batch)), strict=True)
                yield *map(torch.cat, pieces), ids.cpu() if on_ids else None, images.cpu() if on_images else None

        def watched():
            for *pair, ids, images in distributed.in_order(share()):
                if on_ids:
                    on_ids(ids)
                if on_images:
                    on_images(images)
                yield pair

        def compute():
            return collect(watched(), "features of samples", keep=True, logits=True)

        header = dict(kind="samples", **extractor.identity, **self.header())
        if not (on_ids or on_images):
            return features.cached(header, compute, say)
        found = compute()
        if distributed.is_main():
            features.store(header, found, say)
        return found


def write_latents(path, ids, autoencoder):
    """Codes (N, L) of an autoencoder (experiments.common.weights.Loaded) -> a file that read_latents reads."""
    save_tensors(path, dict(ids=ids, header=dict(autoencoder=autoencoder.hash)))


def read_latents(path, n, H, autoencoder):
    """The first n rows of codes in a file: ids (n, L) int64.

    A torch file (a tensor, a list of tensors, {'ids': tensor}, or a cache under latents/) or a .npy file, of
    integers (N, L) or (N, h, w). Raises UserError for anything else, for fewer than n rows, and if the file
    records another autoencoder.
    """
    if str(path).endswith(".npy"):
        ids = tensor_of_npy(path)
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
            with contextlib.suppress(TypeError, RuntimeError):  # not tensors, or of different shapes: reported below
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


def compute_fid(real, fake):
    """FID of two FeatureSets, by torch-fidelity."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(real.statistics(), fake.statistics(), verbose=False)[KEY_METRIC_FID]


def new_folder(path):
    """Make a folder for the images of this run only: images of an earlier run must not be mixed with them. (Only the
    main process checks and creates it.)"""
    if not distributed.is_main():
        return path
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} holds images of an earlier run: remove it, or give another --log_dir")
    path.mkdir(parents=True, exist_ok=True)
    return path


def saving_images(folder):
    """Return a function that writes each image of a batch as a PNG file."""
    number = itertools.count()

    def save(batch):
        for image in batch.cpu():
            save_png(folder / f"{next(number):06d}.png", image)

    return save

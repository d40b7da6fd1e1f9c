"""Codes of images: encoded once, in small batches, kept with what made them, and read without trust."""

from types import SimpleNamespace

import pytest
import torch
from test_data import folder_set

from experiments import common
from experiments.common import cached_codes
from models.load import Loaded
from utils.amp import Precision

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Encoder:
    """The codes of an image are its grey value; the sizes of the batches are noted."""

    def __init__(self):
        self.batches = []

    def encode(self, x):
        self.batches.append(len(x))
        return (x[:, 0, :2, :2].flatten(1) * 255).round().long()


class Codes:
    """cached_codes of an ImageSet, as stage 2 calls it; `said`: what it printed."""

    def __init__(self, **given):
        values = dict(dataset="custom", latent_shape=[1, 2, 2], block_size=4, img_size=8, num_workers=0, batch_size=4,
                      codebook_size=256)  # fmt: skip
        self.H, self.said, self.encoder = SimpleNamespace(**{**values, **given}), [], Encoder()

    def of(self, images, split="train", flip=False, amp=False):
        autoencoder = Loaded(self.encoder, "ae", "a" * 64)
        precision = Precision(amp, "bf16", CPU)
        return cached_codes(self.H, images, split, autoencoder, precision, CPU, self.said.append, flip)


# ---------------------------------------------------------------------- encoding


@pytest.mark.parametrize("batch_size", [1, 640])
def test_the_encoding_batch_does_not_depend_on_the_training_batch(place, monkeypatch, batch_size):
    images = folder_set(place / "images", 70)
    codes = Codes(batch_size=batch_size)
    assert torch.equal(codes.of(images), torch.arange(70)[:, None].expand(70, 4))
    assert codes.encoder.batches == [64, 6]
    for pixels, expected in ((8 * 8 * 30, 30), (8 * 8 - 1, 1)):  # as for larger images
        monkeypatch.setattr(common, "ENCODED_PIXELS", pixels)
        codes = Codes(batch_size=batch_size)
        codes.of(images, split=f"{pixels}")
        assert max(codes.encoder.batches) == expected

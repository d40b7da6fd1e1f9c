"""What samples are compared with: training images, or their reconstructions."""

import json
from pathlib import Path

import pytest
import torch
from scripts import experiment, prior_flags
from test_metrics import SmallExtractor, call, place  # noqa: F401 (a fixture)

from experiments import calc_FID, calc_PRDC
from experiments.common.images import load_images
from experiments.common.measure import Images, reference
from experiments.common.models import load_models
from models.pretrained import encode_batch
from utils.core.errors import UsageError
from utils.core.files import save_tensors
from utils.data.batches import one_pass
from utils.data.pixels import to_float
from utils.evaluation import features


@pytest.fixture
def codes(place, shapes):  # noqa: F811
    """latents.pt with the codes of the training images."""
    H = experiment(calc_FID, prior_flags(shapes, "x", "--n_samples 40"))
    models = load_models(H)
    x = torch.cat([x for x, _ in one_pass(load_images(H, "train"), 8, 0)])
    save_tensors("latents.pt", dict(ids=encode_batch(models.autoencoder.model, to_float(x))))
    return x


@pytest.mark.parametrize("script", [calc_FID, calc_PRDC])
def test_reconstructions_are_those_of_the_autoencoder(codes, shapes, script, capsys):
    """The codes of the training images as "samples" have distance 0 from the reconstructions, not from the images."""
    given = "--n_samples 40"
    if script is calc_FID:
        flags = f"{given} --latents_path latents.pt --kid"
        near = call(script, prior_flags(shapes, "near", f"{flags} --against reconstructions"))
        far = call(script, prior_flags(shapes, "far", flags))
        assert abs(near["values"]["fid"]) < 1e-3 < 1 < far["values"]["fid"]
        assert near["args"]["against"] == "reconstructions" and far["args"]["against"] == "images"
    else:
        call(calc_FID, prior_flags(shapes, "pictures", f"{given} --latents_path latents.pt --save_images"))
        near = call(
            script,
            prior_flags(shapes, "near", f"{given} --fake_images_path logs/pictures/samples --against reconstructions"),
        )
        assert near["values"]["precision"] == near["values"]["recall"] == near["values"]["coverage"] == 1
    out = capsys.readouterr().out
    assert "40 samples against 40 reconstructions of training images of 'custom'" in out
    assert out.count("40 samples against 40 training images of 'custom'") == 1


def test_features_of_reconstructions_are_cached_for_their_autoencoder(place, shapes):  # noqa: F811
    flags = "--n_samples 9 --against reconstructions"
    call(calc_FID, prior_flags(shapes, "a", flags))
    (cached,) = features.FEATURES.glob("reconstructions_*.pt")
    header = torch.load(cached, weights_only=True)["header"]
    H = experiment(calc_FID, prior_flags(shapes, "a", flags))
    models = load_models(H)
    assert header["autoencoder"] == models.autoencoder.hash and header["kind"] == "reconstructions"
    seen = SmallExtractor.seen
    call(calc_FID, prior_flags(shapes, "b", flags))
    assert SmallExtractor.seen == seen
    # The key of the images is what it was; another autoencoder has other reconstructions.
    call(calc_FID, prior_flags(shapes, "c", "--n_samples 9"))
    (real,) = features.FEATURES.glob("real_*.pt")
    assert torch.load(real, weights_only=True)["header"].keys() == {
        "kind",
        "extractor",
        "weights",
        "images",
        "keep",
        "format",
    }
    images = load_images(H, "train")
    assert Images(H, images).header().keys() == {"kind", "images"}
    H.against, models.autoencoder.hash = "reconstructions", "another"
    reference(H, images, models).features(SmallExtractor(), False)
    assert len(list(features.FEATURES.glob("reconstructions_*.pt"))) == 2


def test_files_of_features_of_the_other_reference_are_refused(place, shapes):  # noqa: F811
    call(calc_PRDC, prior_flags(shapes, "a", "--n_samples 9 --real_feats real.npy"))
    with pytest.raises(UsageError, match="--real_feats real.npy holds features of .*kind"):
        call(calc_PRDC, prior_flags(shapes, "a", "--n_samples 9 --real_feats real.npy --against reconstructions"))
    call(calc_PRDC, prior_flags(shapes, "b", "--n_samples 9 --real_feats other.npy --against reconstructions"))
    row = json.loads(Path("logs/b/metrics.jsonl").read_text())
    assert row["feature_files"]["real_feats"]["made_by"]["what"] == "reconstructions of 9 training images of 'custom'"

"""Codes of images, and caches of all that is computed from images: computed once, kept with what made them, and read
without trust."""

import importlib.metadata
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_shapes
from faults.forks import forked
from PIL import Image
from ranks import together
from scripts import experiment, sampler_flags, train_stage_1, train_stage_2
from test_data import folder_set, grey, write_folder, write_lmdb
from test_files import RunsCode, mutations

from experiments import calc_approximate_ELBO
from experiments.common import codes as images_to_codes
from experiments.common.codes import cached_codes
from experiments.common.measure import Images
from experiments.common.weights import Loaded
from models.autoencoder import VQAutoEncoder
from utils.core import cache
from utils.core.errors import UserError
from utils.core.files import hash_json, hash_tensors, load_tensors, save_tensors
from utils.data import codes, packed
from utils.data import sources as files
from utils.data.images import ImageSet
from utils.data.sources import FolderImages, LmdbImages
from utils.evaluation import features

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------- the cache alone


IDS = torch.arange(12, dtype=torch.int16).view(4, 3)
NONE = torch.empty(0, dtype=torch.int64)


def header(**given):
    values = dict(
        dataset="faces", split="train", flip=False, autoencoder="a" * 64, images=dict(count=4), latent_shape=[1, 1, 3]
    )
    return dict(values, **given)


@pytest.fixture
def four(place):
    """An ImageSet of four images."""
    return folder_set(place / "images", 4)


@pytest.fixture
def latents(place):
    return place / "latents"


class Compute:
    """Hands out IDS, and counts how often it was asked to."""

    def __init__(self, images):
        self.images, self.calls, self.said = images, 0, []

    def __call__(self, positions):
        self.calls += 1
        return iter([IDS[positions.start : positions.stop]])

    def cached(self, **given):
        found = codes.cached(header(**given), self.images, 12, 1, self, self.said.append)
        assert torch.equal(found, IDS)
        return self.calls


def test_codes_are_computed_once(four, latents):
    compute = Compute(four)
    assert [compute.cached() for _ in range(3)] == [1, 1, 1]
    assert compute.said[0].startswith("codes cached in latents/faces_train_")
    assert compute.said[1].startswith("codes read from latents/faces_train_")
    assert load_tensors(next(latents.iterdir()))["tensors"]["ids"].dtype == torch.int16


def test_codes_belong_to_all_that_made_them(four, latents):
    compute = Compute(four)
    others = [{}, dict(autoencoder="b" * 64), dict(split="val"), dict(flip=True), dict(images=dict(count=5))]
    for calls, given in enumerate(others, 1):
        assert compute.cached(**given) == calls
        assert compute.cached(**given) == calls
    assert len(list(latents.iterdir())) == len(others)
    assert [p.stem.endswith("_flipped") for p in latents.iterdir()].count(True) == 1


def write_codes():
    """As an earlier version did it."""
    path = codes.cache_path(header())
    cache.write(path, header(), dict(ids=IDS))
    return path


def test_codes_under_another_name_are_not_taken(four):
    write_codes().rename(codes.cache_path(header(autoencoder="b" * 64)))
    compute = Compute(four)
    assert compute.cached(autoencoder="b" * 64) == 1
    assert "does not hold what its name says; the codes are computed again" in compute.said[0]
    assert compute.cached(autoencoder="b" * 64) == 1


@pytest.mark.parametrize("write", [write_codes, None], ids=["of an earlier version", "of this version"])
def test_damaged_codes_are_computed_again(four, write):
    if write is None:
        Compute(four).cached()
    path = write() if write else codes.cache_path(header())
    content = path.read_bytes()
    for damaged in [b"", b"text", *mutations(content, 60)]:
        path.write_bytes(damaged)
        compute = Compute(four)
        if compute.cached():
            assert compute.said[0].startswith("warning: ") and str(path) in compute.said[0]
            assert compute.cached() == 1
        path.write_bytes(content)


GOOD = dict(format=cache.FORMAT, header=header(), tensors=dict(ids=IDS), sha256=hash_tensors(dict(ids=IDS)))


@pytest.mark.parametrize(
    "value",
    [
        [1],
        {},
        dict(ids=IDS),
        dict(GOOD, tensors=dict(ids="x")),
        dict(GOOD, tensors=[IDS]),
        dict(GOOD, sha256="y"),
        dict(GOOD, tensors=dict(ids=IDS + 1)),
        dict(GOOD, tensors=dict(ids=IDS[0])),
        dict(GOOD, tensors=dict(i=IDS)),
        dict(GOOD, header=torch.zeros(2)),
        dict(GOOD, format=cache.FORMAT + 1),
        dict(GOOD, header=header(flip=True)),
        dict(GOOD, tensors=[], sha256=hash_tensors({})),
        *(dict(GOOD, origin=x) for x in (1, {}, [], dict(versions=1))),
    ],
)
def test_files_that_are_no_codes(four, value):
    save_tensors(codes.cache_path(header()), value)
    assert Compute(four).cached() == 1


def numbers(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        dict(codes=IDS),
        dict(ids=IDS.float()),
        dict(ids=IDS > 3),
        dict(ids=IDS[:1]),
        dict(ids=IDS[:0]),
        dict(ids=IDS.repeat(2, 1)),
        dict(ids=IDS.view(4, 3, 1)),
        dict(ids=IDS.view(3, 4)),
        dict(ids=IDS - 1),
        dict(ids=IDS + 1),
        dict(ids=IDS[:3], left_out=NONE),
        dict(ids=IDS, left_out=numbers(1)),
        dict(ids=IDS[:3], left_out=numbers(4)),
        dict(ids=IDS[:3], left_out=numbers(-1)),
        dict(ids=IDS[:3], left_out=numbers(1).int()),
        dict(ids=IDS[:2], left_out=numbers(1, 1)),
        dict(ids=IDS[:3], left_out=numbers(1).view(1, 1)),
        dict(ids=IDS[:1], left_out=numbers(1, 2, 3)),
    ],
)
def test_contents_that_cannot_be_the_codes_of_these_images(four, monkeypatch, tensors):
    """Though header and hash fit. Of four images two may be missing here."""
    monkeypatch.setattr(ImageSet, "most_broken", lambda _: 2)
    compute = Compute(four)
    path = codes.cache_path(header())
    cache.write(path, header(), tensors)
    assert compute.cached() == 1 and compute.said[0].startswith(f"warning: {path} holds ")
    assert compute.cached() == 1


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_codes_in_another_integer_type(four, kind):
    cache.write(codes.cache_path(header()), header(), dict(ids=IDS.to(kind)))
    assert Compute(four).cached() == 0


def test_codes_that_were_encoded_before_a_kill_are_not_lost(four, latents, monkeypatch):
    monkeypatch.setattr(codes, "PART", 2)

    def killed(positions):
        if positions.start == 2:
            raise KeyboardInterrupt
        return iter([IDS[positions.start : positions.stop]])

    with pytest.raises(KeyboardInterrupt):
        codes.cached(header(), four, 12, 1, killed, print)
    assert len(list(latents.iterdir())) == 1
    (latents / "faces_train_x.part").touch()  # of another program
    compute = Compute(four)
    assert compute.cached() == 1, "the first part was there"
    assert sorted(p.name for p in latents.iterdir()) == sorted([codes.cache_path(header()).name, "faces_train_x.part"])
    assert compute.cached() == 1


@pytest.mark.parametrize(
    ("tensors", "calls"),
    [
        (dict(ids=IDS[:2]), 1),
        (dict(ids=IDS[:1]), 2),
        (dict(ids=IDS[:1], left_out=numbers(2)), 2),
        (dict(ids=IDS), 2),
    ],
)
def test_parts_of_an_earlier_version_and_parts_that_do_not_fit(four, monkeypatch, tensors, calls):
    monkeypatch.setattr(codes, "PART", 2)
    path = codes.cache_path(header())
    cache.write(path.with_suffix(".part0-2"), dict(header(), part=[0, 2]), tensors)
    assert Compute(four).cached() == calls


def test_parts_are_kept_where_the_whole_cannot_be_written(four, latents, monkeypatch):
    monkeypatch.setattr(codes, "PART", 2)
    write, full = cache.write, OSError(28, "No space left on device")

    def refuse_the_whole(path, header, *rest):
        if "part" not in header:
            raise full
        write(path, header, *rest)

    compute = Compute(four)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write", refuse_the_whole)
        assert compute.cached() == 2 and "cannot be cached" in compute.said[-1]
    assert compute.cached() == 2, "it was there in parts"
    assert [p.name for p in latents.iterdir()] == [codes.cache_path(header()).name]


def test_parts_hold_complete_batches(four, monkeypatch):
    monkeypatch.setattr(codes, "PART", 3)
    asked = []

    def encode(positions):
        asked.append((positions.start, positions.stop))
        return iter([IDS[positions.start : positions.stop]])

    codes.cached(header(), four, 12, 2, encode, print)
    codes.cached(header(flip=True), four, 12, 5, encode, print)
    assert asked == [(0, 2), (2, 4), (0, 3), (3, 4)]


def test_codes_cannot_run_code(four, latents, tmp_path):
    latents.mkdir()
    value = dict(GOOD, tensors=dict(ids=RunsCode(tmp_path / "executed")))
    torch.save(value, codes.cache_path(header()))
    compute = Compute(four)
    assert compute.cached() == 1 and "refused" in compute.said[0]
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- encoding


class Encoder:
    """The codes of an image are its grey value; it records the sizes of the batches."""

    def __init__(self):
        self.batches = []

    def encode(self, x):
        self.batches.append(len(x))
        return (x[:, 0, :2, :2].flatten(1) * 255).round().long()


class Extractor:
    """The features of an image are its grey value."""

    identity = dict(extractor="inception-v3-compat", weights="b" * 64)

    def __init__(self):
        self.seen = 0

    def __call__(self, x):
        self.seen += len(x)
        return x[:, 0, :2, :2].flatten(1).float(), x[:, 0, 0, :5].float()


class Caches:
    """Caches of an ImageSet's codes, features and pixels, computed or read as the scripts do; `said`: the messages."""

    def __init__(self, capsys=None, **given):
        values = dict(
            dataset="custom",
            latent_shape=[1, 2, 2],
            block_size=4,
            img_size=8,
            num_workers=0,
            batch_size=4,
            codebook_size=256,
            feature_batch=3,
            codes_precision="float32",
            amp_dtype="bf16",
        )
        self.H, self.said, self.capsys = SimpleNamespace(**{**values, **given}), [], capsys

    def codes(self, images, split="train", flip=False, precision="float32"):
        """(ids, how many images were encoded)"""
        self.encoder, self.H.codes_precision = Encoder(), precision
        autoencoder = Loaded(self.encoder, "ae", "a" * 64)
        ids = cached_codes(self.H, images, split, autoencoder, CPU, self.said.append, flip)
        return ids, sum(self.encoder.batches)

    def features(self, images, keep=False):
        """(mean of the features (4,), number of images that were read)"""
        extractor = Extractor()
        self.capsys.readouterr()
        found = Images(self.H, images).features(extractor, keep)
        self.said += self.capsys.readouterr().out.splitlines()
        return found.mu, extractor.seen

    def packed(self, images):
        """(pixels of an image each (n,), 0 if they were packed before)"""
        packed.pack(images, "custom_train", 0, self.said.append)
        pixels = torch.stack([images.load(i)[0, 0, 0] for i in range(len(images))])
        return pixels, int(any("images packed into" in line for line in self.said))

    def pop_said(self):
        said, self.said = "\n".join(self.said), []
        return said


@pytest.mark.parametrize("batch_size", [1, 640])
def test_the_encoding_batch_does_not_depend_on_the_training_batch(place, monkeypatch, batch_size):
    images = folder_set(place / "images", 70)
    caches = Caches(batch_size=batch_size)
    assert torch.equal(caches.codes(images)[0], torch.arange(70)[:, None].expand(70, 4))
    assert caches.encoder.batches == [64, 6]
    for pixels, expected in ((8 * 8 * 30, 30), (8 * 8 - 1, 1)):  # as for larger images
        monkeypatch.setattr(images_to_codes, "ENCODED_PIXELS", pixels)
        caches.codes(images, split=f"{pixels}")
        assert max(caches.encoder.batches) == expected


def test_crops_have_caches_of_their_own(place):
    """The key of the images themselves stays; each crop has another, and is the same when it is computed again."""
    folder = place / "images"
    folder.mkdir()
    for i in range(6):
        Image.effect_noise((40, 30), 60).save(folder / f"{i}.png")
    source = FolderImages([folder])
    images, caches = ImageSet(source, range(6), 8), Caches()
    whole = caches.codes(images)[0]
    (path,) = Path("latents").iterdir()
    crops = [caches.codes(images.cropped(0.3, number))[0] for number in (1, 2)]
    assert len(list(Path("latents").iterdir())) == 3
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(whole, crops[0])
    assert caches.codes(images.cropped(0.3, 1))[1] == 0, "read"
    assert caches.codes(images.cropped(0.4, 1))[1] == 6, "encoded"
    path.unlink()
    assert torch.equal(caches.codes(images)[0], whole) and path.exists()
    shutil.rmtree("latents")
    assert torch.equal(caches.codes(images.cropped(0.3, 1))[0], crops[0])
    assert "crop" not in json.dumps(images.identity()).replace("centre crop", "")


def test_broken_images_of_crops_are_reported_once(place):
    images, caches = folder_set(place / "images", 40, broken=[3]), Caches()
    assert [len(caches.codes(some)[0]) for some in (images, images.cropped(0.3, 1), images)] == [39, 39, 39]
    assert caches.pop_said().count("cannot be decoded") == 1


def test_codes_are_encoded_in_float32_also_with_amp(place, shapes, monkeypatch):
    seen = []
    encode = VQAutoEncoder.encode

    def watched(self, x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return encode(self, x)

    train_stage_1(shapes, "ae", "--train_steps 1")
    monkeypatch.setattr(VQAutoEncoder, "encode", watched)
    train_stage_2(shapes, "new", "ae", 1, "--train_steps 1 --amp --amp_dtype bf16")
    assert seen == [False]
    train_stage_2(shapes, "plain", "ae", 1, "--train_steps 1")
    assert seen == [False] and len(list(Path("latents").iterdir())) == 1, "one cache for both"
    flags = sampler_flags(shapes, "fit", "ae", 1, "--load_dir new --load_step 1 --train_steps 1 --amp --amp_dtype bf16")
    calc_approximate_ELBO.main(experiment(calc_approximate_ELBO, flags))
    assert len(seen) > 2 and not any(seen)
    path = Path("logs/plain/config.json")
    config = json.loads(path.read_text())
    del config["hparams"]["codes_precision"], config["checkpoint"]
    Path("logs/older").mkdir()
    hparams = dict(config["hparams"], amp=True, amp_dtype="bf16", log_dir="older")
    Path("logs/older/config.json").write_text(json.dumps(dict(config, hparams=hparams, digest=hash_json(hparams))))
    train_stage_2(shapes, "older", "ae", 1, "--train_steps 1 --resume")
    assert seen[-1] and len(list(Path("latents").iterdir())) == 2, "as it began"


def test_keys_of_caches(place):
    """A key that changes would orphan the caches that users have."""
    Path("images").mkdir()
    for i in range(4):
        path = Path("images", f"{i}.png")
        path.write_bytes(grey(i).ljust(300, b"\0"))
        os.utime(path, ns=(10**18 + i,) * 2)
    images, caches = ImageSet(FolderImages(["images"]), range(4), 8), Caches()
    for given in ({}, dict(flip=True), dict(split="val"), dict(precision="amp")):
        caches.codes(images, **given)
    for kind, keep in (("real", False), ("fake", True)):
        Images(caches.H, images, kind).features(Extractor(), keep)
    caches.packed(images)
    names = [f"{p.parent.name}/{p.name}" for p in sorted(place.glob("*/*")) if p.parent.name != "images"]
    assert names == [
        "features/fake_d0d62b66e877c083.pt",
        "features/real_061d81ece90d8dbd.pt",
        "latents/custom_train_0e1f0999f16f1620.pt",
        "latents/custom_train_c0f664fbab6d0f73.pt",
        "latents/custom_train_ce4d6178edd4635e_flipped.pt",
        "latents/custom_val_894a820e9b13a248.pt",
        "packed/custom_train_fe3d27668c1660fa",
    ]
    Path("x_lmdb").mkdir()
    Path("x_lmdb/data.mdb").write_bytes(bytes(8192))
    os.utime("x_lmdb/data.mdb", ns=(10**18,) * 2)
    source = LmdbImages([])
    source.paths = ["x_lmdb"]
    assert source.identity() == "f5f65b5f34f16d9b"


# ---------------------------------------------------------------------- images that were left out


KINDS = ["codes", "features"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_were_left_out_are_named_whenever_a_cache_is_read(place, capsys, monkeypatch, kind):
    monkeypatch.setattr(codes, "PART", 16)
    write_folder(place / "images", 60, broken=(10, 59))
    caches = Caches(capsys)
    values = []
    for expected in (58, 0, 0):
        images = ImageSet(FolderImages([place / "images"]), range(60), 8)
        found, computed = getattr(caches, kind)(images)
        said = caches.pop_said()
        assert computed == expected and all(said.count(f"{i:03d}.png' cannot be decoded") == 1 for i in (10, 59))
        values.append(found)
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_version_did_not_store_which_images_were_left_out(place, capsys, kind):
    images = folder_set(place / "images", 60, broken=(10, 59))
    caches = Caches(capsys)
    first, _ = getattr(caches, kind)(images)
    (path,) = [*Path().glob("latents/*"), *Path().glob("features/*")]
    value = load_tensors(path)
    del value["tensors"]["left_out"], value["origin"]
    save_tensors(path, dict(value, sha256=hash_tensors(value["tensors"])))
    caches.pop_said()
    images = ImageSet(images.source, range(60), 8)
    found, computed = getattr(caches, kind)(images)
    assert computed == 0 and torch.equal(found, first)
    said = caches.pop_said()
    assert f"{path} was made without 2 of 60 images" in said and said.count("is of an earlier version") == 1


def test_a_disk_that_fails_while_codes_are_made(place, monkeypatch):
    """The images are not left out: the run stops, and the next one has all."""
    monkeypatch.setattr(codes, "PART", 16)
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    images, caches = folder_set(place / "images", 40), Caches()
    read = files._read_file

    def failing(path, **kw):
        if path.endswith(b"21.png") and not kw:
            raise OSError(5, "Input/output error", path)
        return read(path, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_read_file", failing)
        for workers in (0, 1):
            caches.H.num_workers = workers
            with pytest.raises(UserError, match="021.png' cannot be read .Input/output error; tried 3 times"):
                caches.codes(images)
    ids, computed = caches.codes(images)
    assert ids[:, 0].tolist() == list(range(40)) and computed == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fails_ends_the_command_in_one_line(place, shapes, workers):
    train_stage_1(shapes, "ae", "--train_steps 1")
    read = files._read_file

    def failing(path, **kw):
        if path.endswith(b"0021.png"):
            raise OSError(116, "Stale file handle", path)
        return read(path, **kw)

    def work():
        files._read_file, files.PAUSES = failing, (0, 0)
        train_stage_2(shapes, "prior", "ae", 1, f"--train_steps 1 --num_workers {workers}")

    outcome = forked(work, place)
    assert outcome.code == 1 and "Traceback" not in outcome.text
    (line,) = [line for line in outcome.text.splitlines() if line.startswith("error")]
    assert "0021.png' cannot be read (Stale file handle; tried 3 times)" in line and not Path("latents").exists()


def test_several_processes_name_what_was_left_out(place):
    draw_shapes(place / "images", 40)
    (place / "images" / "0007.png").write_bytes(b"")
    train_stage_1(place / "images", "ae", "--train_steps 1")
    for _ in range(2):
        shutil.rmtree("logs/prior", ignore_errors=True)
        texts = together(2, partial(train_stage_2, place / "images", "prior", "ae", 1, "--train_steps 1"), place)
        assert texts[0].count("0007.png' cannot be decoded") == 1 and "39 code sequences" in texts[0]
        assert "cannot be decoded" not in texts[1]


# ---------------------------------------------------------------------- other contents, other libraries


def stamped_folder(folder, values):
    """One image a value, of the same names, sizes and times whatever the values."""
    folder.mkdir(exist_ok=True)
    for i, value in enumerate(values):
        path = folder / f"{i:03d}.png"
        path.write_bytes(grey(value).ljust(300, b"\0"))
        os.utime(path, ns=(10**18,) * 2)
    return ImageSet(FolderImages([folder]), range(len(values)), 8)


def stamped_lmdb(folder, values):
    shutil.rmtree(folder, ignore_errors=True)
    write_lmdb(folder, {b"%03d" % i: grey(value).ljust(300, b"\0") for i, value in enumerate(values)})
    os.utime(folder / "data.mdb", ns=(10**18,) * 2)
    files._OPEN_LMDBS.clear()
    return ImageSet(LmdbImages([folder]), range(len(values)), 8)


@pytest.mark.parametrize("kind", ["codes", "features", "packed"])
@pytest.mark.parametrize("write", [stamped_folder, stamped_lmdb])
def test_other_contents_under_the_same_names_sizes_and_times(place, capsys, kind, write):
    caches, keys = Caches(capsys), set()
    for values, computed in (((1, 2, 3), True), ((1, 2, 3), False), ((1, 2, 4), True), ((1, 2, 4), False)):
        images = write(place / "images", values)
        keys.add(str(images.identity()))
        found, count = getattr(caches, kind)(images)
        said = caches.pop_said()
        assert bool(count) == computed, said
        values_found = [sum(values) / 3] if kind == "features" else values
        assert found.double().numpy().reshape(len(values_found), -1)[:, 0].tolist() == pytest.approx(values_found)
        assert said.count("have other contents under the same names, sizes and times") == (
            computed and values == (1, 2, 4)
        )
    assert len(keys) == 1


def test_the_contents_of_64_images_are_compared_at_both_ends(place):
    folder = place / "images"
    folder.mkdir()
    for i in range(128):
        (folder / f"{i:03d}.png").write_bytes(bytes(200_000))
    images = ImageSet(FolderImages([folder]), range(128), 8)

    def contents(name=None, at=0):
        if name:
            with open(folder / name, "r+b") as f:
                f.seek(at)
                f.write(b"x")
        return images.origin()["contents"]

    first = contents()
    assert contents("001.png") == first == contents("000.png", 100_000), "not among them; in the middle"
    seen = [first, contents("000.png"), contents("126.png", 199_999), contents("002.png", 65_535)]
    assert len(set(seen)) == 4
    (folder / "004.png").unlink()
    assert contents() not in seen


@pytest.mark.parametrize("kind", ["codes", "features", "packed"])
def test_other_versions_of_libraries(place, capsys, monkeypatch, kind):
    """What a run learns from stays as it is, with a warning; features, which are compared, are computed again."""
    caches, images = Caches(capsys), stamped_folder(place / "images", (1, 2, 3))
    first, _ = getattr(caches, kind)(images)
    caches.pop_said()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    found, computed = getattr(caches, kind)(stamped_folder(place / "images", (1, 2, 3)))
    said = caches.pop_said()
    assert torch.equal(found, first) and bool(computed) == (kind == "features")
    assert said.count("was made with Pillow") == 1 and "not Pillow 1.2.3" in said
    found, computed = getattr(caches, kind)(stamped_folder(place / "images", (1, 2, 3)))
    assert not computed and caches.pop_said().count("was made with Pillow") == (kind != "features")


def test_another_version_of_torch_fidelity(place, capsys, monkeypatch):
    caches, images = Caches(capsys), stamped_folder(place / "images", (1, 2, 3))
    caches.features(images)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if "fid" in name else real(name))
    assert caches.features(images)[1] == 3 and "torch-fidelity 0.0.1; the real features are" in caches.pop_said()
    assert caches.features(images)[1] == 0 and features.origin()["versions"] == {"torch-fidelity": "0.0.1"}


def test_parts_of_codes_are_compared_too(place, monkeypatch):
    monkeypatch.setattr(codes, "PART", 2)
    caches, images = Caches(), stamped_folder(place / "images", (1, 2, 3))
    encode = Encoder.encode
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Encoder, "encode", lambda self, x: encode(self, x) if len(x) == 2 else 1 / 0)
        caches.codes(images)
    assert len(list(Path("latents").glob("*.part*"))) == 1
    ids, computed = caches.codes(stamped_folder(place / "images", (5, 2, 3)))
    assert ids[:, 0].tolist() == [5, 2, 3] and computed == 3


def test_packed_images_of_an_earlier_version(place):
    caches, images = Caches(), stamped_folder(place / "images", (1, 2, 3))
    caches.packed(images)
    (origin,) = place.glob("packed/*/origin.json")
    for content, expected, words in (
        (None, 0, "is of an earlier version"),
        (b"{", 1, "is damaged; the packed images are computed again"),
        (b"[]", 1, "is damaged"),
        (b'{"contents": 1}', 1, "other contents"),
    ):
        origin.unlink() if content is None else origin.write_bytes(content)
        caches.pop_said()
        _, made = caches.packed(stamped_folder(place / "images", (1, 2, 3)))
        assert made == expected and caches.pop_said().count(words) == 1
    assert caches.packed(images)[1] == 0


def test_packed_images_of_other_contents_are_not_used_if_they_cannot_be_removed(place, monkeypatch):
    caches = Caches()
    caches.packed(stamped_folder(place / "images", (1, 2, 3)))

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    images = stamped_folder(place / "images", (4, 5, 6))
    pixels, _ = caches.packed(images)
    assert pixels.tolist() == [4, 5, 6] and images.packed is None and "cannot be packed" in caches.pop_said()

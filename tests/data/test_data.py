"""Images from anywhere, and batches in an order that depends on (seed, step) alone."""

import errno
import hashlib
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace
from unittest import mock

import lmdb
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from ranks import together
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from experiments.common.images import load_images
from hparams import sources
from utils.core import distributed
from utils.core.errors import UserError
from utils.data import batches
from utils.data import images as images_module
from utils.data import sources as files
from utils.data.batches import batch_positions, one_pass, training_batches
from utils.data.decoding import Crop, decode, random_box
from utils.data.images import ImageSet, fixed_images, split_sizes
from utils.data.sources import ByteStrings, FolderImages, LmdbImages, find_images, other_files
from utils.training.run import Run

SIZE = 8


# ---------------------------------------------------------------------- helpers


def noise(width, height, mode="RGB", seed=0):
    """A Pillow image of random pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode="CMYK" if mode == "CMYK" else None)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(value):
    """Bytes of a small image whose pixels are all `value`, which identifies the image in a set."""
    return encoded(Image.new("RGB", (SIZE, SIZE), (value,) * 3))


def write_folder(folder, count, broken=()):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(b"no image" if i in broken else grey(i))
    return folder


def write_lmdb(folder, images):
    """images: {key: encoded bytes}, as LSUN ships them."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 26) as env, env.begin(write=True) as txn:
        for key, value in images.items():
            txn.put(key, value)
    return folder


def entry(*paths, **more):
    return dict(dict(name="mine", paths=[str(p) for p in paths], origin="the entry 'mine' of datasets.yaml"), **more)


def configuration(folder=None, **given):
    values = dict(
        data_entry=entry(folder),
        img_size=SIZE,
        n_channels=3,
        steps_per_eval=0,
        batch_size=4,
        seed=0,
        num_workers=0,
        horizontal_flip=False,
        random_crop=1.0,
        unique_images=True,
        split_rule="hash",
        steps_per_log=1000,
        train_steps=1000,
    )
    return SimpleNamespace(**{**values, **given})


def folder_set(folder, count, broken=()):
    source = FolderImages([write_folder(folder, count, broken)])
    return ImageSet(source, range(len(source)), SIZE)


def colour(x):
    """The grey value of each of the images x (B, C, H, W)."""
    return x[:, 0, 0, 0].tolist()


def take(batches, count):
    return [next(batches) for _ in range(count)]


# ---------------------------------------------------------------------- folders


def test_folder_is_recursive_sorted_and_any_case(tmp_path):
    names = ["b.png", "a/z.JPG", "a/b/c.WebP", "A.jpeg", "x.bmp", "-rf.png", " .png", "a b.png", "new\nline.png"]
    names += ["\u00e4\u6f22.Png"]
    for name in [*names, "notes.txt", "png", "._b.png", "x.png.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(grey(1))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    source = FolderImages([str(tmp_path)])
    found = [source.name(i) for i in range(len(source))]
    assert found == sorted((str(tmp_path / n) for n in names), key=os.fsencode)
    assert all(decode(source.read(i), SIZE).shape == (3, SIZE, SIZE) for i in range(len(source)))


def test_folder_follows_links_once(tmp_path):
    root = write_folder(tmp_path / "root", 2)
    write_folder(tmp_path / "elsewhere", 3)
    (root / "sub").mkdir()
    (root / "sub" / "loop").symlink_to(root)
    (root / "sub" / "out").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    found = sorted(find_images(str(root)))
    assert len(found) == 5
    assert sum("again" in f for f in found) == 3, "of two ways to a folder, the first in the order of names"


def test_name_that_is_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path)
    try:
        with open(os.path.join(folder, b"\xff\xfe.png"), "wb") as f:
            f.write(b"no image")
    except OSError:
        pytest.skip("the file system allows UTF-8 names only")
    images = ImageSet(FolderImages([str(tmp_path)]), [0], SIZE)
    said = []
    assert images.load(0) is None
    with pytest.raises(UserError):
        images.check_broken(said.append)
    assert len(said) == 2 and said[1].encode()
    assert images.identity() == images.identity()


def test_folder_identity_follows_the_files(tmp_path):
    write_folder(tmp_path, 3)
    before = FolderImages([str(tmp_path)]).identity()
    assert FolderImages([str(tmp_path)]).identity() == before
    os.utime(tmp_path / "001.png", ns=(1, 1))
    touched = FolderImages([str(tmp_path)]).identity()
    (tmp_path / "002.png").rename(tmp_path / "003.png")
    assert len({before, touched, FolderImages([str(tmp_path)]).identity()}) == 3


def test_a_sketch_has_all_names(tmp_path, monkeypatch):
    images = folder_set(tmp_path / "a", 12)
    assert images.sketch() == dict(count=12, names="77dcf1312f7e4ede"), "as earlier versions wrote it"
    monkeypatch.setattr(images_module, "SKETCHED", 4)
    before = images.sketch()
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert ImageSet(FolderImages([tmp_path / "b"]), range(12), SIZE).sketch() == before, "wherever it is"
    (tmp_path / "b" / "001.png").rename(tmp_path / "b" / "001a.png")
    images = ImageSet(FolderImages([tmp_path / "b"]), range(12), SIZE)
    now = images.sketch()
    assert now["names"] == before["names"] and now["all_names"] != before["all_names"]

    def warned(known):
        said = []
        run = SimpleNamespace(
            manifest=dict(images=known),
            say=said.append,
            folder="x",
            step=1,
            about={},
            H=SimpleNamespace(dataset="mine"),
        )
        Run.trains_on(run, images)
        assert run.about["images"] == now
        return said

    assert not warned(now) and not warned(None) and "continues with other images" in warned(before)[0]
    del before["all_names"]
    assert not warned(before), "a manifest of an earlier version, which knew some names only"
    assert warned(dict(before, count=11))


def test_byte_strings_are_a_list_of_bytes():
    items = [b"a", b"", b"\0\0", b"xyz" * 50]
    packed = pickle.loads(pickle.dumps(ByteStrings(items)))
    assert len(packed) == 4 and [packed[i] for i in range(4)] == items
    assert len(ByteStrings([])) == 0


# ---------------------------------------------------------------------- LMDB


@pytest.fixture
def lsun(tmp_path):
    """church_outdoor as LSUN ships it: 21 training images (WebP and JPEG), 5 for validation."""
    for split, count in (("train", 21), ("val", 5)):
        images = {}
        for i in range(count):
            picture = Image.new("RGB", (SIZE + i, SIZE), (10 * i,) * 3)
            images[b"%040x" % (977 * i % 101)] = encoded(picture, "WEBP" if i % 2 else "JPEG", quality=95)
        write_lmdb(tmp_path / f"church_outdoor_{split}_lmdb", images)
    return tmp_path


def lsun_configuration(folder, **given):
    return configuration(data_entry=entry(folder, category="church_outdoor"), **given)


def test_lsun_keeps_to_its_own_validation(lsun):
    for steps_per_eval in (0, 10):
        H = lsun_configuration(lsun, steps_per_eval=steps_per_eval)
        train, val = load_images(H, "train"), load_images(H, "val")
        assert (len(train), len(val)) == (21, 5)
    keys = [train.source.keys[i] for i in range(21)]
    assert keys == sorted(keys)
    assert train.source.name(0) == f"{lsun}/church_outdoor_train_lmdb:{keys[0].decode()}"
    value = {b"%040x" % (977 * i % 101): 10 * i for i in range(21)}
    x = torch.cat([x for x, _ in one_pass(train, 4, 0)])
    assert all(abs(a - value[k]) <= 3 for a, k in zip(colour(x), keys, strict=True))
    assert train.identity() != val.identity()


def test_lmdb_in_workers(lsun):
    images = load_images(lsun_configuration(lsun), "train")
    expected = torch.cat([x for x, _ in one_pass(images, 4, 0)])  # this process has it open now
    assert torch.equal(torch.cat([x for x, _ in one_pass(images, 4, 2)]), expected)
    assert torch.equal(torch.cat([x for x, _ in one_pass(images, 4, 0)]), expected)
    spawned = pickle.loads(pickle.dumps(images))  # how a worker that is not forked gets it
    assert torch.equal(torch.cat([x for x, _ in one_pass(spawned, 4, 0)]), expected)


def test_lmdbs_taken_together_and_pickled(lsun):
    paths = [lsun / "church_outdoor_val_lmdb", lsun / "church_outdoor_train_lmdb"]
    source = LmdbImages(paths)
    parts = [LmdbImages([p]) for p in paths]
    expected = [part.read(i) for part in parts for i in range(len(part))]
    assert len(source) == 26 and [source.read(i) for i in range(26)] == expected
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(26)] == expected
    assert again.identity() == source.identity() and again.name(5) == parts[1].name(0)


def test_lmdb_given_by_itself_is_split(lsun):
    H = configuration(lsun / "church_outdoor_train_lmdb", steps_per_eval=10)
    train, val = load_images(H, "train"), load_images(H, "val")
    assert (len(train), len(val)) == (20, 1)
    assert len({s.source.name(i) for s in (train, val) for i in s.indices}) == 21
    (held,) = sorted(train.source.keys, key=lambda key: hashlib.sha256(key).digest())[:1]
    assert val.source.keys[val.indices[0]] == held


def test_lmdb_that_is_no_lmdb(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(UserError, match="not a readable LMDB"):
        load_images(configuration(tmp_path), "train")


def test_truncated_lmdb_is_told(tmp_path):
    folder = write_lmdb(tmp_path / "x", {b"%d" % i: os.urandom(1 << 18) for i in range(16)})
    os.truncate(folder / "data.mdb", 1 << 20)
    with pytest.raises(UserError, match="truncated"):
        LmdbImages([folder])


# ---------------------------------------------------------------------- entries and splits


def test_named_entries_and_custom(tmp_path, lsun, monkeypatch):
    write_folder(tmp_path / "faces", 3)
    (tmp_path / "datasets.yaml").write_text(
        f"churches: {{paths: {lsun}, category: church_outdoor}}\n"
        f"faces: {{paths: [faces, {tmp_path / 'more'}]}}\n"
        "home: {paths: ~/faces}\n"
    )
    write_folder(tmp_path / "more", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, custom, count in (("churches", None, 21), ("faces", None, 7), ("home", None, 3), ("custom", "more", 4)):
        H = configuration(data_entry=sources.dataset_entry(name, custom))
        assert len(load_images(H, "train")) == count


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (entry("nowhere"), "'nowhere' does not exist: edit 'paths' of 'mine'"),
        (entry("empty"), "no images .png jpg jpeg webp bmp. under empty: edit 'paths'"),
        (entry("empty", name="custom"), "--custom_dataset_path"),
        (entry("others"), r"under others, but 1 file of other types \(1 .tif\): edit 'paths'"),
        (entry("others", file="datasets.local.yaml"), "edit 'paths' of 'mine' in datasets.local.yaml"),
        (entry(".", val_paths=["nowhere"]), "'nowhere' does not exist: edit 'val_paths' of 'mine'"),
        (entry("others", "empty", val_paths=["empty"]), "no images"),
        (entry("nowhere", name="demo"), "make demo"),
        (entry("empty", category="church_outdoor"), "no 'church_outdoor_train_lmdb' with a data.mdb in empty"),
        (entry("empty", "church_outdoor_val_lmdb"), "mixes LMDBs"),
        (entry("empty", category="/abs"), "'category' '/abs' must be what precedes '_val_lmdb' in the name"),
        (entry("empty", category="a**"), r"'a\*\*"),
        (entry("empty", category="x/" * 2000), "'x/x/x/"),
    ],
)
def test_nothing_to_read_is_an_error_with_a_remedy(given, words, lsun, monkeypatch):
    monkeypatch.chdir(lsun)
    (lsun / "empty").mkdir()
    (lsun / "others").mkdir()
    (lsun / "others" / "a.tif").write_bytes(b"")
    with pytest.raises(UserError, match=words):
        load_images(configuration(data_entry=given), "train")


def split(*paths, **given):
    """[names of the images that train, of those that validate]."""
    H = configuration(data_entry=entry(*paths), **{"steps_per_eval": 10, **given})
    return [[s.name(i) for i in range(len(s))] for s in (load_images(H, name) for name in ("train", "val"))]


@pytest.mark.parametrize("n", [2, 19, 20, 40, 100])
@pytest.mark.parametrize("rule", ["hash", "last"])
def test_split(tmp_path, n, rule):
    write_folder(tmp_path, n)
    train, val = split(tmp_path, split_rule=rule)
    assert (len(train), len(val)) == split_sizes(n) and len(val) == max(1, round(0.05 * n))
    assert len({*train, *val}) == n
    assert train == sorted(train) and val == sorted(val), "the order does not depend on the rule"
    if rule == "last":
        assert max(train) < min(val)
    assert len(load_images(configuration(tmp_path), "train")) == n


def relative(names, *folders):
    return {os.path.relpath(name, folder) for name in names for folder in folders if name.startswith(str(folder))}


def test_the_hash_of_the_relative_path_decides_who_validates(tmp_path):
    for kind in ("ants", "bees", "cats", "dogs"):
        write_folder(tmp_path / "a" / kind, 50)
    _, val = split(tmp_path / "a")
    names = [f"{kind}/{i:03d}.png" for kind in ("ants", "bees", "cats", "dogs") for i in range(50)]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:10]
    assert relative(val, tmp_path / "a") == set(expected) and len({os.path.dirname(v) for v in val}) > 2
    shutil.move(tmp_path / "a", tmp_path / "z")
    assert relative(split(f"{tmp_path}/z/")[1], tmp_path / "z") == set(expected), "a set that is moved"


def test_split_of_several_folders_does_not_depend_on_their_names(tmp_path):
    a, b, c = (write_folder(tmp_path / name, 60) for name in "abc")
    kept = [[f for f in split(a, b)[1] if f.startswith(str(folder))] for folder in (a, b)]
    assert all(kept) and relative(kept[0], a) != relative(kept[1], b), "the number of the folder counts"
    os.rename(a, tmp_path / "d")
    a = tmp_path / "d"  # now the last by path
    moved = [[f for f in split(a, b)[1] if f.startswith(str(folder))] for folder in (a, b)]
    assert [relative(k, f) for k, f in zip(moved, (a, b), strict=True)] == [
        relative(k, f) for k, f in zip(kept, (tmp_path / "a", b), strict=True)
    ]
    more = split(a, b, c)[1]
    assert len({*more} & {*moved[0], *moved[1]}) >= 4, "most of them stay when a set grows"


def test_own_validation_images(tmp_path, lsun):
    photos = write_folder(tmp_path / "photos", 30)
    own = write_folder(photos / "held", 7)
    for steps_per_eval in (0, 10):
        H = configuration(data_entry=entry(photos, val_paths=[str(own)]), steps_per_eval=steps_per_eval)
        train, val = load_images(H, "train"), load_images(H, "val")
        assert (len(train), len(val)) == (30, 7), "they lie in the folder of the others, and do not train"
        assert all(val.name(i).startswith(str(own)) for i in range(7))
    link = tmp_path / "link"
    link.symlink_to(own)
    assert len(load_images(configuration(data_entry=entry(photos, val_paths=[str(link)])), "train")) == 30
    lmdbs = [str(lsun / f"church_outdoor_{name}_lmdb") for name in ("train", "val")]
    H = configuration(data_entry=entry(*lmdbs, val_paths=lmdbs[1:]))
    assert [len(load_images(H, name)) for name in ("train", "val")] == [21, 5]
    H = configuration(data_entry=entry(photos, val_paths=lmdbs[1:]))
    assert [len(load_images(H, name)) for name in ("train", "val")] == [37, 5], "of another kind"


def test_files_of_other_types_are_counted(tmp_path):
    write_folder(tmp_path / "some", 3)
    for name in "a.tif b.tif c.TIF d.gif readme .hidden ._x.png".split():
        (tmp_path / "some" / name).write_bytes(b"")
    source = load_images(configuration(tmp_path / "some"), "train").source
    assert other_files(source) == "5 files of other types (3 .tif, 1 without extension, 1 .gif)"
    for i, kind in enumerate("abcdefgh"):
        for name in range(i + 1):
            (tmp_path / f"{name}.{kind}").write_bytes(b"")
    found = other_files(FolderImages([tmp_path]))
    assert found == "41 files of other types (8 .h, 7 .g, 6 .f, 5 .e, 4 .d, ...)"
    assert other_files(FolderImages([write_folder(tmp_path / "good", 1)])) == ""


def overlapping(tmp_path):
    """20 images in paths that overlap, are spelled in several ways, and hold links to files and folders."""
    images, other = write_folder(tmp_path / "a" / "images", 18), tmp_path / "b"
    other.mkdir()
    (other / "x.png").write_bytes(grey(18))
    shutil.copy(other / "x.png", other / "y.png")  # a copy is another file
    (other / "z.png").symlink_to(images / "003.png")
    (other / "more").symlink_to(images)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    return [tmp_path / "a", images, f"{images}/", f"{tmp_path}/a/../a/images", other, tmp_path / "link"]


def test_overlapping_paths_count_each_image_once(tmp_path, monkeypatch):
    paths = overlapping(tmp_path)
    for unique, count in ((True, 20), (False, 18 * 4 + 3)):
        H = configuration(data_entry=entry(*paths), unique_images=unique, steps_per_eval=10)
        train, val = load_images(H, "train"), load_images(H, "val")
        assert len(train) + len(val) == count
        seen = [{os.path.realpath(s.source.name(i)) for i in s.indices} for s in (train, val)]
        assert unique == (not seen[0] & seen[1]), "an image is for training or for validation"
    monkeypatch.chdir(tmp_path / "a")
    plain, unique = (FolderImages(["images"], unique) for unique in (False, True))
    assert plain.identity() == unique.identity(), "without duplicates nothing changes"


def test_overlapping_paths_count_each_lmdb_once(lsun, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(lsun)
    own = [lsun / "church_outdoor_train_lmdb", f"{lsun}/church_outdoor_train_lmdb/", link / "church_outdoor_train_lmdb"]
    for given in (entry(lsun, f"{lsun}/", link, category="church_outdoor"), entry(*own)):
        for unique, count in ((True, 21), (False, 63)):
            H = configuration(data_entry=given, unique_images=unique)
            assert len(load_images(H, "train")) == count


def test_one_image_cannot_be_split(tmp_path):
    write_folder(tmp_path, 1)
    with pytest.raises(UserError, match="leave none for .train. .*--steps_per_eval.: add images"):
        load_images(configuration(tmp_path, steps_per_eval=10), "train")


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("size", [(32, 32), (33, 48), (50, 31), (7, 9), (16, 128), (1, 1), (255, 41), (200, 61)])
@pytest.mark.parametrize("target", [16, 31])
def test_decode_is_resize_and_centre_crop(size, target):
    image = noise(*size)
    reference = transforms.Compose([transforms.Resize(target), transforms.CenterCrop(target), transforms.PILToTensor()])
    assert torch.equal(decode(encoded(image), target), reference(image))


@pytest.mark.parametrize("size", [(64, 48), (33, 200), (200, 31), (1, 1), (1, 5000)])
def test_a_crop_is_cropped_then_resized(size):
    image = noise(*size)
    for seed in range(5):
        left, top, right, bottom = random_box(*size, Crop(0.2, seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        reference = resized_crop(image, top, left, bottom - top, right - left, [16, 16])
        assert torch.equal(decode(encoded(image), 16, 3, Crop(0.2, seed)), pil_to_tensor(reference))


def test_crops_are_distributed_as_torchvisions():
    """Sizes and places, by their means and quantiles: 4,000 boxes of each."""
    torch.manual_seed(0)
    ours = np.array([random_box(120, 80, Crop(0.3, seed)) for seed in range(4000)])
    picture = torch.empty(1, 80, 120)
    found = [transforms.RandomResizedCrop.get_params(picture, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in found])
    for a, b in zip(ours.T, theirs.T, strict=True):
        for q in (10, 50, 90):
            assert abs(np.percentile(a, q) - np.percentile(b, q)) <= 3
    areas = (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1]) / (120 * 80)
    assert 0.29 < areas.min() < 0.31 and 0.88 < areas.max() < 0.9, "at most 4/3 x 80 x 80 of 120 x 80"


def test_a_crop_that_never_fits_is_the_largest_in_the_centre():
    assert random_box(10, 300, Crop(1.0, 0)) == (0, 143, 10, 156)  # 10 x 13: 3/4
    assert random_box(300, 9, Crop(1.0, 0)) == (144, 0, 156, 9)  # 12 x 9: 4/3


@pytest.mark.parametrize("size", [(5, 100), (300, 7), (3, 50)])
def test_long_strips_agree_to_within_rounding(size):
    image = noise(*size)
    reference = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16), transforms.PILToTensor()])
    assert (decode(encoded(image), 16).int() - reference(image).int()).abs().max() <= 1


def test_very_long_strip_is_cheap():
    image = Image.new("RGB", (1, 5000), (9, 9, 9))
    image.putpixel((0, 2499), (200, 0, 0))
    image.putpixel((0, 2500), (200, 0, 0))
    x = decode(encoded(image), 256)  # resized as a whole, it would have 330 million pixels
    assert x.shape == (3, 256, 256) and x[0].max() == 200 and x[0].float().mean() > 100


def test_transparency_is_put_on_white():
    image = Image.new("RGBA", (SIZE, SIZE), (100, 0, 200, 0))
    assert decode(encoded(image), SIZE).unique().tolist() == [255]
    image = Image.new("RGBA", (SIZE, SIZE), (100, 0, 200, 51))  # a fifth
    assert decode(encoded(image), SIZE)[:, 0, 0].tolist() == [224, 204, 244]
    image = Image.new("LA", (SIZE, SIZE), (100, 51))
    assert decode(encoded(image), SIZE)[:, 0, 0].tolist() == [224] * 3
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, SIZE, 4))
    x = decode(encoded(image, transparency=0), SIZE)
    assert x[:, 0, 0].tolist() == [255] * 3 and x[:, 7, 0].tolist() == [10, 20, 30]
    x = decode(encoded(image, "GIF", transparency=0), SIZE)
    assert x[:, 0, 0].tolist() == [255] * 3 and x[:, 7, 0].tolist() == [10, 20, 30]
    x = decode(encoded(Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), transparency=(1, 2, 3)), SIZE)
    assert x.unique().tolist() == [255]


@pytest.mark.parametrize("levels", [(0, 65535), (0, 200), (257, 60000)])
def test_16_bit_grey(levels):
    values = np.full((SIZE, SIZE), levels[0], dtype=np.uint16)
    values[4:] = levels[1]
    x = decode(encoded(Image.fromarray(values)), SIZE)
    assert x[:, 0, 0].tolist() == [round(levels[0] / 257)] * 3
    assert x[:, 7, 7].tolist() == [round(levels[1] / 257)] * 3, "dark images too: the file says 16 bits"


def test_other_modes():
    assert decode(encoded(Image.new("1", (SIZE, SIZE), 1)), SIZE).unique().tolist() == [255]
    assert decode(encoded(Image.new("L", (SIZE, SIZE), 77)), SIZE).unique().tolist() == [77]
    cmyk = Image.new("CMYK", (SIZE, SIZE), (255, 0, 0, 0))
    r, g, b = decode(encoded(cmyk, "JPEG", quality=100), SIZE)[:, 0, 0].tolist()
    assert r < 10 and g > 245 and b > 245
    assert decode(encoded(noise(20, 20, "L")), SIZE, n_channels=1).shape == (1, SIZE, SIZE)
    assert decode(encoded(noise(20, 20)), SIZE, n_channels=1).shape == (1, SIZE, SIZE)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (SIZE, SIZE), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, SIZE, 2))  # a white bar at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be shown turned by 90 degrees, clockwise
    x = decode(encoded(image, "PNG", exif=exif), SIZE)
    assert x[0, :, 7].tolist() == [255] * SIZE and x[0, :, 0].tolist() == [0] * SIZE
    damaged = exif.tobytes()[:9]
    assert decode(encoded(image, "PNG", exif=damaged), SIZE)[0, 0, 0] == 255, "bad EXIF data do not spoil the pixels"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_whatever_its_name(tmp_path, kind):
    frames = [Image.new("RGB", (SIZE, SIZE), (v, v, v)) for v in (40, 200, 120)]
    options = dict(lossless=True) if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "b.webp").write_bytes(content)
    images = load_images(configuration(tmp_path), "train")
    assert [images.load(i)[0, 0, 0].item() for i in range(2)] == [40, 40]


def png_header_only(width, height):
    """A PNG of a few bytes that claims any size."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def postscript():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


BROKEN = {
    "empty": b"",
    "text": b"this is not an image\n" * 50,
    "truncated JPEG": encoded(noise(64, 64), "JPEG")[:1000],
    "truncated PNG": encoded(noise(64, 64))[:1000],
    "bomb": png_header_only(60000, 60000),
    "wrong checksum": encoded(noise(8, 8)).replace(b"IDAT", b"IDXT"),
    "PostScript": postscript(),
    "a format that is not among FORMATS": encoded(noise(8, 8), "PPM"),
    "zero width": png_header_only(0, 10),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_undecodable_files_are_no_images(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    images = load_images(configuration(tmp_path), "train")
    assert images.load(0) is None and images.broken.tolist() == [True]


def test_any_bytes_are_an_image_or_none(tmp_path):
    """No damage to a file gets past ImageSet.load as an exception."""
    random = np.random.default_rng(0)
    originals = [encoded(noise(12, 9), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    source = SimpleNamespace(content=None, read=lambda i: source.content)
    images = ImageSet(source, [0], SIZE)
    decoded = 0
    for number in range(500):
        content = bytearray(originals[number % len(originals)])
        for _ in range(random.integers(1, 6)):
            content[random.integers(len(content))] = random.integers(256)
        source.content = bytes(content[: random.integers(len(content) // 2, len(content) + 1)])
        x = images.load(0)
        decoded += x is not None
        assert x is None or x.shape == (3, SIZE, SIZE)
    assert 0 < decoded < 500


# ---------------------------------------------------------------------- broken images


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_once_skipped_and_counted(tmp_path, workers):
    images = folder_set(tmp_path, 60, broken=(10, 11, 59))
    said = []
    for _ in range(2):
        batches = list(one_pass(images, 8, workers, say=said.append))
    good = [i for i in range(60) if i not in (10, 11, 59)]
    assert sum((colour(x) for x, _ in batches), []) == good
    assert torch.cat([i for _, i in batches]).tolist() == good
    assert sorted(said) == [f"skipped: {str(tmp_path / f'{i:03d}.png')!r} cannot be decoded" for i in (10, 11, 59)]
    H = configuration(tmp_path, batch_size=20, num_workers=workers)
    x = torch.cat([x for x, _ in take(training_batches(images, H, 1), 3)])
    assert sorted(colour(x)) == sorted([*good, 12, 12, 0]), "the next good image takes the place of a broken one"


def test_a_broken_image_stays_out_though_it_is_repaired(tmp_path):
    """So that the codes of images and of mirror images, which are made one after the other, are of the same images."""
    images = folder_set(tmp_path, 40, broken=[7])
    passes = []
    for _ in range(2):
        passes.append(torch.cat([i for _, i in one_pass(images, 8, 0)]).tolist())
        (tmp_path / "007.png").write_bytes(grey(7))
    assert passes[0] == passes[1] and 7 not in passes[0]


def test_a_file_that_vanishes_is_a_broken_image(tmp_path):
    images = folder_set(tmp_path, 40)
    (tmp_path / "007.png").unlink()
    assert images.load(7) is None and int(images.broken.sum()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_5_percent_broken_stop(tmp_path, workers):
    images = folder_set(tmp_path, 40, broken=(3, 4, 5, 39))
    said = []
    with pytest.raises(UserError, match="^4 of 40 images cannot be decoded, .*003.png' among them; at most 5%"):
        list(one_pass(images, 8, workers, say=said.append))
    assert said[0].startswith("too many images cannot be decoded: looking for all")
    assert said[1:] == [f"skipped: '{tmp_path}/{i:03d}.png' cannot be decoded" for i in (3, 4, 5, 39)], (
        "all, named once"
    )
    images = folder_set(tmp_path, 40, broken=(3, 4))
    assert sum(len(i) for _, i in one_pass(images, 8, workers)) == 38


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images(tmp_path, workers):
    folder_set(tmp_path, 100, broken=range(100))
    for use in (
        lambda images, say: next(training_batches(images, configuration(tmp_path, num_workers=workers), 1, say)),
        lambda images, say: next(one_pass(images, 8, workers, say=say)),
        lambda images, say: fixed_images(images, 3, say),
    ):
        images, said = ImageSet(FolderImages([tmp_path]), range(100), SIZE), []
        with pytest.raises(UserError, match=r"^100 of 100 images cannot be decoded") as caught:
            use(images, said.append)
        assert "\n" not in str(caught.value), "no traceback of a worker"
        assert len(said) == 101, "all are named"


def test_the_search_for_broken_images_ends(tmp_path, monkeypatch):
    """Of a large set, a stop names those that were found in a limited time, and not hundreds of thousands."""
    monkeypatch.setattr("utils.data.images.SEARCH", 0.0)
    monkeypatch.setattr("utils.data.images.MAX_LISTED", 4)
    images, said = folder_set(tmp_path, 100, broken=range(100)), []
    with pytest.raises(UserError, match=r"^8 of 100 images cannot be decoded"):
        next(one_pass(images, 8, 0, say=said.append))
    assert said[-2] == "skipped: 4 more that cannot be decoded" and len(said) == 7
    assert said[-1].startswith("more images may be broken")


def test_every_process_knows_all_broken_images_after_a_shared_pass(tmp_path):
    """Three batches for two processes: the second gets an empty one."""
    images = folder_set(tmp_path / "images", 60, broken=(3, 25, 59))

    def work():
        passed = [len(x) for x, _ in one_pass(images, 20, 0, shared=True)]
        found = distributed.from_all([passed, images.broken.nonzero().flatten().tolist()])
        print(found if distributed.is_main() else "")

    texts = together(2, work, tmp_path)
    assert texts[0].count("cannot be decoded") == 3
    assert "[[[19, 19], [3, 25, 59]], [[19, 0], [3, 25, 59]]]" in texts[0]


def test_many_broken_images_are_not_all_named(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_NAMED", 2)
    monkeypatch.setattr(images_module, "MAX_BROKEN_SHARE", 1)
    images = folder_set(tmp_path, 10, broken=range(5))
    said = []
    assert sum(len(i) for _, i in one_pass(images, 2, 0, say=said.append)) == 5
    assert len(said) == 2 and int(images.broken.sum()) == 5


def test_fixed_images_are_spread_over_the_set(tmp_path):
    images = folder_set(tmp_path, 40, broken=(0, 20))
    assert colour(fixed_images(images, 4)) == [1, 10, 21, 30]
    assert len(fixed_images(images, 50)) == 40


def test_a_worker_that_dies_is_told_in_words(tmp_path):
    images = folder_set(tmp_path, 20)

    def die(_):
        os.kill(os.getpid(), signal.SIGKILL)

    images.source.read = die
    with pytest.raises(UserError, match="--num_workers 0"):
        next(training_batches(images, configuration(tmp_path, num_workers=1), 1))


def test_a_full_shared_memory_is_named(tmp_path, monkeypatch):
    images, full = folder_set(tmp_path, 20), OSError(28, "No space left on device")

    def collate(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(batches, "_collate_good", collate)
    with pytest.raises(UserError, match=r"\(RuntimeError: unable to .* on device \(28\)\).*--num_workers 0"):
        list(one_pass(images, 2, 1))
    monkeypatch.setattr(torch.multiprocessing, "Queue", mock.Mock(side_effect=full))  # it cannot even start
    with pytest.raises(UserError, match=r"\(\[Errno 28\] No space left on device\).*--num_workers 0"):
        list(one_pass(images, 2, 1))


def test_the_program_ends_though_batches_are_left(tmp_path):
    """As after an error, whose traceback keeps them alive."""
    write_folder(tmp_path, 20)
    program = f"""
from utils.data.batches import one_pass
from utils.data.images import ImageSet
from utils.data.sources import FolderImages
images = ImageSet(FolderImages([{str(tmp_path)!r}]), range(20), {SIZE})
batches = one_pass(images, 2, 1)
print(len(next(batches)[0]))
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 3)


def test_the_program_ends_though_a_worker_is_stuck(tmp_path):
    write_folder(tmp_path, 20)
    program = f"""
import time
from utils.data.batches import one_pass
from utils.data.images import ImageSet
from utils.data.sources import FolderImages
images = ImageSet(FolderImages([{str(tmp_path)!r}]), range(20), {SIZE})
read = images.source.read
images.source.read = lambda i: read(i) if i < 2 else time.sleep(1000)
batches = one_pass(images, 2, 1)
print(len(next(batches)[0]))
del batches
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)


def test_workers_leave_signals_to_the_main_process(tmp_path):
    images = folder_set(tmp_path, 20)
    read = images.source.read

    def interrupted(i):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return read(i)

    images.source.read = interrupted
    assert sum(len(i) for _, i in one_pass(images, 8, 1)) == 20


# ---------------------------------------------------------------------- a disk that fails for a moment


class FailingReads:
    """In the place of a function that reads: of the files whose names contain `name` each fails `times` times."""

    def __init__(self, real, name, number, times=10**9):
        self.real, self.name, self.number, self.times, self.failed = real, name, number, times, {}

    def __call__(self, path, *args, **kw):
        text = os.fsdecode(path)
        if self.name in text and self.failed.setdefault(text, 0) < self.times:
            self.failed[text] += 1
            raise OSError(self.number, os.strerror(self.number), path)
        return self.real(path, *args, **kw)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, of which none takes time."""
    made = []
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=made.append))
    return made


PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN]


@pytest.mark.parametrize("number", PASSING)
def test_a_read_that_fails_for_a_moment_is_repeated(tmp_path, monkeypatch, pauses, number):
    images = folder_set(tmp_path, 40)
    monkeypatch.setattr(files, "_read_file", FailingReads(files._read_file, "07.png", number, times=3))
    assert torch.cat([i for _, i in one_pass(images, 8, 0)]).tolist() == list(range(40))
    assert tuple(pauses) == files.PAUSES and not images.broken.any()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "batches", [lambda images, H: one_pass(images, 8, H.num_workers), lambda images, H: training_batches(images, H, 1)]
)
def test_a_read_that_keeps_failing_stops_the_run(tmp_path, monkeypatch, pauses, workers, batches):
    images = folder_set(tmp_path, 40)
    monkeypatch.setattr(files, "_read_file", FailingReads(files._read_file, "07.png", errno.EIO))
    with pytest.raises(UserError) as caught:
        for _ in zip(range(12), batches(images, configuration(tmp_path, num_workers=workers))):
            pass
    assert str(caught.value).startswith(f"'{tmp_path}/007.png' cannot be read (Input/output error; tried 4 times)")
    assert "\n" not in str(caught.value) and not images.broken.any()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EINVAL, errno.EFBIG])
def test_an_error_of_the_file_itself_makes_a_broken_image(tmp_path, monkeypatch, pauses, number):
    images = folder_set(tmp_path, 40)
    monkeypatch.setattr(files, "_read_file", FailingReads(files._read_file, "07.png", number))
    assert sum(len(i) for _, i in one_pass(images, 8, 0)) == 39
    assert images.broken.nonzero().tolist() == [[7]] and not pauses


def test_an_error_of_the_decoder_makes_a_broken_image(tmp_path, monkeypatch, pauses):
    def decode(*_):
        raise OSError(errno.EIO, "as a file within the image")

    images = folder_set(tmp_path, 40)
    monkeypatch.setattr(images_module, "decode", decode)
    assert images.load(0) is None and images.broken[0] and not pauses


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_a_list_of_images_is_complete_or_an_error(tmp_path, monkeypatch, pauses, call):
    write_folder(tmp_path / "sub", 3)
    write_folder(tmp_path, 3)
    failing = FailingReads(getattr(os, call), "sub", errno.EIO, times=2 if call == "scandir" else 1)
    monkeypatch.setattr(os, call, failing)
    assert len(FolderImages([str(tmp_path)])) == 6 and len(pauses) >= 2
    failing.times = 10**9
    with pytest.raises(UserError, match="sub.* cannot be read .Input/output error"):
        FolderImages([str(tmp_path)])
    failing.number = errno.EACCES
    assert len(FolderImages([str(tmp_path)])) == 3


def test_an_lmdb_that_fails_for_a_moment(lsun, monkeypatch, pauses):
    images = load_images(lsun_configuration(lsun), "train")
    assert images.load(0) is not None
    broken, real = [2], lmdb.open

    def failing(path, **kw):
        if broken[0]:
            broken[0] -= 1
            raise lmdb.Error(f"{path}: {os.strerror(errno.EIO)}")
        return real(path, **kw)

    monkeypatch.setattr(lmdb, "open", failing)
    monkeypatch.setattr(files, "_OPEN_LMDBS", {})
    assert images.load(1) is not None and len(pauses) == 2
    broken[0] = 10**9
    files._OPEN_LMDBS.clear()
    for workers in (0, 1):
        with pytest.raises(UserError, match="church_outdoor_train_lmdb' cannot be read .*Input/output error; tried 4"):
            list(one_pass(images, 4, workers))
    assert not images.broken.any()


# ---------------------------------------------------------------------- order


def test_each_epoch_is_a_permutation_of_its_own():
    n, batch_size = 24, 4
    epochs = [
        np.concatenate([batch_positions(7, epoch * 6 + k, batch_size, n) for k in range(1, 7)]) for epoch in range(3)
    ]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert tuple(np.concatenate([batch_positions(8, k, batch_size, n) for k in range(1, 7)])) != tuple(epochs[0])


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (5, 16), (1, 3), (7, 7)])
def test_batches_run_on_over_the_end_of_an_epoch(n, batch_size):
    steps = 3 * n
    stream = np.concatenate([batch_positions(0, s, batch_size, n) for s in range(1, steps + 1)])
    assert (np.bincount(stream, minlength=n) == steps * batch_size / n).all()
    whole_epochs = stream.reshape(-1, n)
    assert (np.sort(whole_epochs, axis=1) == np.arange(n)).all()
    backwards = [batch_positions(0, s, batch_size, n) for s in range(steps, 0, -1)]
    assert (np.concatenate(backwards[::-1]) == stream).all(), "a step's batch does not depend on what was asked before"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [2, 9])
def test_any_start_gives_the_same_batches(tmp_path, workers, start):
    images = folder_set(tmp_path, 10)
    reference = take(training_batches(images, configuration(tmp_path, horizontal_flip=True), 1), 12)
    H = configuration(tmp_path, horizontal_flip=True, num_workers=workers)
    batches = take(training_batches(images, H, start), 13 - start)
    for (x, i), (x_expected, i_expected) in zip(batches, reference[start - 1 :], strict=True):
        assert torch.equal(x, x_expected) and torch.equal(i, i_expected)
    for step, (x, i) in enumerate(reference, 1):
        assert i.tolist() == colour(x) == batch_positions(0, step, 4, 10).tolist()


def test_the_flip_is_of_each_image_on_its_own(tmp_path):
    gradient = Image.fromarray(np.tile(np.arange(0, 256, 32, dtype=np.uint8), (SIZE, 1)))
    for i in range(4):
        gradient.save(tmp_path / f"{i}.png")
    images = load_images(configuration(tmp_path), "train")

    def flips(**given):
        batches = training_batches(images, configuration(tmp_path, **given), 1)
        return np.array([[bool(image[0, 0, 0]) for image in x] for x, _ in take(batches, 50)])

    flipped = flips(horizontal_flip=True)
    assert not flips().any()
    assert 70 < flipped.sum() < 130, "half of 200"
    assert sum(len(set(row)) == 2 for row in flipped.tolist()) > 25, "not a batch at a time"
    assert (flipped == flips(horizontal_flip=True)).all()
    assert (flipped != flips(horizontal_flip=True, seed=1)).any()


def test_crops_are_a_function_of_seed_step_and_sample(tmp_path, monkeypatch):
    """The same for any start, number of workers and number of processes; the centre view without them."""
    for i in range(10):
        noise(40, 30, seed=i).save(tmp_path / f"{i}.png")
    images = load_images(configuration(tmp_path), "train")

    def batches(start=1, count=6, **given):
        H = configuration(tmp_path, **dict(random_crop=0.3, horizontal_flip=True) | given)
        return take(training_batches(images, H, start), count)

    reference = batches()
    for other, expected in (
        (batches(num_workers=2), reference),
        (batches(start=4, count=3), reference[3:]),
    ):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(other, expected, strict=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(batches())
    for (one, _), (two, _), (x, _) in zip(*parts, reference, strict=True):
        assert torch.equal(torch.cat([one, two]), x)
    monkeypatch.undo()
    plain = batches(random_crop=1.0)
    for other in (batches(seed=1), plain):
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(other, reference, strict=True))
    seen = [x for batch, positions in batches(count=20) for x, i in zip(batch, positions, strict=True) if i == 0]
    assert len({x.numpy().tobytes() for x in seen}) == len(seen) >= 8, "another crop each time"
    assert plain[0][0].shape == reference[0][0].shape == (4, 3, SIZE, SIZE)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_single_process_batch(tmp_path, monkeypatch, world):
    images = folder_set(tmp_path, 10)
    H = configuration(tmp_path, horizontal_flip=True)
    alone = take(training_batches(images, H, 3), 4)
    parts = []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(take(training_batches(images, H, 3), 4))
    for step, (x, i) in enumerate(alone):
        assert torch.equal(torch.cat([p[step][0] for p in parts]), x)
        assert torch.equal(torch.cat([p[step][1] for p in parts]), i)
    with pytest.raises(UserError, match="--batch_size 5 .* not divisible by"):
        next(training_batches(images, configuration(tmp_path, batch_size=5), 1))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_one_pass_has_the_last_partial_batch(tmp_path, batch_size):
    images = folder_set(tmp_path, 11)
    batches = list(one_pass(images, batch_size, 0))
    assert torch.cat([i for _, i in batches]).tolist() == list(range(11))
    assert [len(x) for x, _ in batches] == [min(batch_size, 11 - k) for k in range(0, 11, batch_size)]
    mirrored = torch.cat([x for x, _ in one_pass(images, batch_size, 0, flip=True)])
    assert torch.equal(mirrored, torch.cat([x for x, _ in batches]).flip(-1))

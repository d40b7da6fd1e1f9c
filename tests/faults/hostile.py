"""Hostile files: pickles that run code for a trusting reader, images that claim much; and the program's commands
that read them."""

import hashlib
import json
import os
import pickle
import struct
import zlib

import numpy as np
import torch
from conftest import TINY_SAMPLER, TINY_VQGAN, words
from scripts import experiment
from test_files import RunsCode
from test_metrics import SmallExtractor

from faults.stages import AUTOENCODER, SMALL
from utils.core.checkpoint import Checkpoints
from utils.core.files import hash_json, sha256_file
from utils.evaluation import features

MARKER = "executed"  # the file that hostile code leaves in the current folder


def hostile_value(folder):
    return dict(w=torch.zeros(2), bad=RunsCode(folder / MARKER))


# How a hostile pickle comes: (write(value, path), trust(path), which runs its code).
PICKLES = {
    "archive": (torch.save, lambda path: torch.load(path, weights_only=False)),
    "old archive": (
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda path: torch.load(path, weights_only=False),
    ),
    "bare": (lambda value, path: path.write_bytes(pickle.dumps(value)), lambda path: pickle.loads(path.read_bytes())),
}
ARRAYS = {
    "array": (
        lambda value, path: np.save(path, np.array([value["bad"]], dtype=object), allow_pickle=True),
        lambda path: np.load(path, allow_pickle=True),
    ),
    "bare": PICKLES["bare"],
}
TEXTS = {
    "text": (
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)),
        lambda path: pickle.loads(path.read_bytes()),
    ),
    "bare": PICKLES["bare"],
}


def plant(path, write, folder):
    """Put a hostile file in the place of `path`; a manifest that names it is made to vouch for it."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(hostile_value(folder), path)
    for manifest in {*path.parent.parent.glob("saved_models/manifest_*.json")} - {path}:
        value = json.loads(manifest.read_text())
        key = path.relative_to(path.parent.parent).as_posix()
        if key in value["files"]:
            value["files"][key] = dict(bytes=os.path.getsize(path), sha256=sha256_file(path))
            del value["digest"]
            manifest.write_text(json.dumps(dict(value, digest=hash_json(value))))
            assert Checkpoints(path.parent.parent).verify(value["step"])


def assert_one_line(outcome, code, named=""):
    """Exit code, and one line that is an error, the last, and can be shown."""
    assert outcome.code == code and "Traceback" not in outcome.text, outcome.text
    lines = outcome.text.splitlines()
    assert [line for line in lines if "error: " in line] == lines[-1:] and named in lines[-1], outcome.text
    assert_harmless(outcome.text)


def assert_harmless(text):
    assert all(c.isprintable() or c == "\n" for c in text), repr(text)


# ---------------------------------------------------------------------- commands


def measuring(module, more="", family="sampler", extractor=SmallExtractor):
    """A function that runs experiments/<module> on logs/ae (step 2) and the prior logs/run (step 4)."""
    tiny = [*TINY_VQGAN, *AUTOENCODER] if family == "vqgan" else [*TINY_SAMPLER, *words("--sampler absorbing")]
    flags = [*tiny, *SMALL, *words("--ae_load_dir ae --ae_load_step 2 --log_dir out")]
    flags += words("--load_dir run --load_step 4") if family == "sampler" else []

    def work():
        if extractor is not None:
            features.Inception = extractor
        module.main(experiment(module, [*flags, *words(more)]))

    return work


# ---------------------------------------------------------------------- images


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth=8, colours=2, extra=b"", rows=None):
    """A PNG file of zeros, made row by row: at any size a file of some megabytes. colours: as the format counts
    them (0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA). rows: how many there really are."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    row = bytes(1 + (width * samples * depth + 7) // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animated_webp(width, height, frame):
    """A WebP file of a hundred bytes: an animation on a canvas of any size. frame: a small lossless WebP file."""

    def part(name, content):
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def number(n):
        return struct.pack("<I", n)[:3]

    canvas = bytes([2, 0, 0, 0]) + number(width - 1) + number(height - 1)
    shown = number(0) + number(0) + number(7) + number(7) + number(100) + b"\0" + frame[12:]
    body = b"WEBP" + part(b"VP8X", canvas) + part(b"ANIM", bytes(6)) + part(b"ANMF", shown)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tree(folder):
    """What is in a folder: {path: hash}, links not followed."""
    found = {}
    for root, dirs, names in os.walk(folder):
        for name in dirs + names:
            path = os.path.join(root, name)
            content = b""
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as f:  # other tests' folders hold sparse files of any size
                    content = f.read(1 << 20) + str(os.stat(path).st_size).encode()
            found[os.path.relpath(path, folder)] = hashlib.sha256(content).hexdigest()
    return found

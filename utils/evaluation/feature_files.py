"""Reads and writes features in files that a user names. A header in the file records how the features were computed.

A torch file holds {'features': (N, D) float32, 'header': JSON text}. A .npy file holds two arrays one after the other:
the features, which numpy.load reads, and the header's JSON text as bytes. A copy of the file therefore keeps the
header. The header contains the hash of the features: a file with changed features or a changed header is treated as
damaged. Files of other programs have no header.
"""

import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from utils.core.errors import DamagedFile, UserError
from utils.core.files import atomic_write, hash_json, hash_tensors, load_tensors, save_tensors, sha256_file
from utils.evaluation.features import is_plain, tensor_of_npy

LARGEST_HEADER = 1 << 16  # the most characters of a header


@dataclass
class FeatureFile:
    """The contents of a feature file. features: (N, D) float32. sha256: the hash of the file. made_by: {name: JSON
    value} from the header, or None if the file has no header."""

    features: torch.Tensor
    sha256: str
    made_by: dict | None


def read(path: str | Path) -> FeatureFile:
    """Read a .npy file, or a torch file of a tensor. Returns a FeatureFile. Raises UserError if the file holds no
    features, and DamagedFile if features and header do not match."""
    if str(path).endswith(".npy"):
        features, text = tensor_of_npy(path), _text_after_array(path)
    else:
        value = load_tensors(path)
        ours = isinstance(value, dict) and isinstance(value.get("header"), str)
        features, text = (value.get("features"), value["header"]) if ours else (value, None)
    if not is_plain(features) or features.ndim != 2 or not features.is_floating_point():
        raise UserError(f"{path} holds no features of shape (N, D)")
    made_by = None
    if text is not None:
        try:
            header = json.loads(text[:LARGEST_HEADER])
            if header.pop("digest") != hash_json(header) or header["features"] != hash_tensors(dict(x=features)):
                raise ValueError
            made_by = dict(header["made_by"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedFile(f"{path} is damaged: not the features that were written, or not their header") from None
    return FeatureFile(features.float(), sha256_file(path), made_by)


def write(path: str | Path, features: torch.Tensor, made_by: dict) -> str:
    """Write features (N, D) float32 and a header. The file is a .npy file if its name ends with .npy, and otherwise a
    torch file. The file is complete or absent. made_by: {name: JSON value} that states how the features were computed.
    Returns the file's hash, as in FeatureFile."""
    header = dict(made_by=made_by, features=hash_tensors(dict(x=features)))
    text = json.dumps(dict(header, digest=hash_json(header)))
    if str(path).endswith(".npy"):
        with atomic_write(path) as f:
            for array in (features.numpy(), np.frombuffer(text.encode(), np.uint8)):
                np.lib.format.write_array(f, array)
            return f.sha256.hexdigest()
    return save_tensors(path, dict(features=features, header=text))["sha256"]


def _text_after_array(path: str | Path) -> str | None:
    """Return the text in the second array of a .npy file. Return None if the file has no second array of bytes."""
    with open(path, "rb") as f:
        shape, _, dtype = _array_header(f)
        f.seek(int(np.prod(shape)) * dtype.itemsize, os.SEEK_CUR)
        rest = io.BytesIO(f.read(LARGEST_HEADER))
    try:
        is_bytes = _array_header(rest)[2] == np.uint8
    except Exception:  # numpy's parser can raise any exception for damaged bytes
        return None
    return rest.read().decode("utf-8", "replace") if is_bytes else None


def _array_header(file: IO[bytes]) -> Any:
    """Return (shape, True for Fortran order, dtype) of the array that begins at the file's position."""
    first = np.lib.format.read_magic(file) == (1, 0)
    return (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)


def differences(found: dict, wanted: dict) -> str:
    """Return the first three differences between a header (found) and the expected header (wanted), as text. Return ''
    if they are equal. Names that only `found` has are ignored."""
    found, wanted = json.loads(json.dumps([found, wanted]))
    return ", ".join(itertools.islice(_differences(found, wanted), 3))


def _differences(found: dict, wanted: dict) -> Iterator[str]:
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, dict):
            yield from (f"{name}: {more}" for more in _differences(other if isinstance(other, dict) else {}, value))
        elif other != value:
            yield f"{name} {str(other)[:12]} (here {str(value)[:12]})"

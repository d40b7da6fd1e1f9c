"""Writes and reads exported models. An exported model is one folder:

FOLDER/autoencoder.safetensors, FOLDER/sampler.safetensors   the tensors (an autoencoder alone has no second file)
FOLDER/model.json    the configuration, the hashes of the files, their origin and a card; written last: a folder without
                     this file is not an exported model

No file of the folder can run code when it is read.
"""

import os
from pathlib import Path
from typing import Any

from utils.core.errors import DamagedFile, UserError
from utils.core.files import (
    atomic_write,
    hash_json,
    hash_tensors,
    read_json,
    remove_temporaries,
    sha256_file,
    write_json,
)

FORMAT = 1
JSON = "model.json"
AUTOENCODER, SAMPLER = "autoencoder.safetensors", "sampler.safetensors"


def is_exported(folder: str | Path) -> bool:
    return (Path(folder) / JSON).is_file()


def save_exported(folder: str | Path, states: dict[str, dict], about: dict[str, Any]) -> None:
    """Write an exported model. states: {AUTOENCODER or SAMPLER: state dict}. about: JSON values for model.json.

    Raises UserError if the folder holds other files. The files of an earlier call that was killed are replaced.
    """
    from safetensors.torch import save

    folder = Path(folder).expanduser()
    remove_temporaries(folder)
    others = sorted({path.name for path in folder.iterdir()} - {AUTOENCODER, SAMPLER}) if folder.is_dir() else []
    if others:
        raise UserError(f"{folder} is not empty (it holds {others[0]}): give another folder, or remove this one")
    files = {}
    for name, state in states.items():
        # safetensors accepts only contiguous tensors on the CPU that share no memory
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        with atomic_write(folder / name) as f:
            f.write(save(state))
            sha256 = f.sha256.hexdigest()
        files[name] = dict(bytes=os.path.getsize(folder / name), sha256=sha256, hash=hash_tensors(state))
    record = dict(format=FORMAT, **about, files=files)
    write_json(folder / JSON, dict(record, digest=hash_json(record)))


def load_exported(folder: str | Path) -> tuple[dict[str, Any], dict[str, dict]]:
    """Read an exported model -> (contents of model.json, {AUTOENCODER or SAMPLER: state dict}). Raises DamagedFile if a
    file is missing or is not what was written."""
    folder = Path(folder)
    path = folder / JSON
    record = read_json(path)
    digest = record.pop("digest", None) if isinstance(record, dict) else None
    if digest is None or digest != hash_json(record):
        raise DamagedFile(f"{path} is damaged: its contents are not what was written")
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has the format {record.get('format')}: this version of the program reads {FORMAT}")
    files, hparams = record.get("files"), record.get("hparams")
    if not isinstance(files, dict) or not isinstance(hparams, dict) or not isinstance(record.get("card"), dict):
        raise DamagedFile(f"{path} is damaged: it does not describe a model")
    if not {AUTOENCODER} <= set(files) <= {AUTOENCODER, SAMPLER} or (SAMPLER in files) != ("sampler" in hparams):
        raise DamagedFile(f"{path} is damaged: it must list {AUTOENCODER}, and {SAMPLER} for a sampler")
    return record, {name: _load(folder / name, expected) for name, expected in files.items()}


def _load(path: Path, expected: Any) -> dict:
    from safetensors.torch import load_file

    if not path.is_file():
        raise DamagedFile(f"{path} is missing")
    if not isinstance(expected, dict) or sha256_file(path) != expected.get("sha256"):
        raise DamagedFile(f"{path} is damaged: its contents are not what was written")
    try:
        return load_file(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # someone else may have written the file and its hash
        raise DamagedFile(f"{path} is damaged: not a readable safetensors file ({error})") from None

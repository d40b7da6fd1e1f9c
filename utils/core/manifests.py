"""Reads the steps and the manifests of a run's checkpoints. utils/core/checkpoint.py reads the checkpoints themselves.
This module imports the standard library only.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.core.errors import DamagedFile
from utils.core.json_files import hash_json, read_json


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _has(**fields: Callable) -> Callable:
    """Return a check for a dict. The check requires that each of these fields exists and passes its own check."""
    return lambda value: isinstance(value, dict) and all(k in value and ok(value[k]) for k, ok in fields.items())


_is_file = _has(bytes=_is_count, sha256=_is_text)
# The fields of a manifest. A manifest always has `step` and `files`. The other fields depend on the run and on the
# version of the program that wrote the manifest. Unknown fields are ignored.
_FIELDS = dict(
    step=_is_count,
    files=lambda value: isinstance(value, dict) and all(map(_is_file, value.values())),
    stats_bytes=_is_count,
    stats_sha256=_is_text,
    run=_is_text,
    script=_is_text,
    hparams=_has(),
    images=_has(count=_is_count, names=_is_text),
    autoencoder=_has(path=_is_text, hash=_is_text),
)


def files_of(step: int) -> re.Pattern:
    """Return a pattern that matches the names of a step's files in manifests."""
    return re.compile(rf"saved_models/\w+_{step}\.th|saved_stats/stats_{step}")


class Manifests:
    """Lists the steps of one run folder (logs/<log_dir>) and reads their manifests."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.models = self.folder / "saved_models"

    def path(self, name: str, step: int) -> Path:
        return self.models / f"{name}_{step}.th"

    def manifest_path(self, step: int) -> Path:
        return self.models / f"manifest_{step}.json"

    def unfinished_path(self, step: int) -> Path:
        return self.models / f".unfinished_{step}.json"

    def key(self, path: Path) -> str:
        """Return the name of a file in manifests."""
        return path.relative_to(self.folder).as_posix()

    def steps(self) -> list[int]:
        """Return the steps that have a manifest, in ascending order."""
        return self._steps_of(r"manifest_(\d+)\.json")

    def steps_with(self, name: str) -> list[int]:
        """Return the steps that have a file of this name. A manifest is not required, because published checkpoints
        have no manifest."""
        return self._steps_of(re.escape(name) + r"_(\d+)\.th")

    def steps_of_model(self, name: str) -> list[int]:
        """Return the steps that have weights or averaged weights of this model, in ascending order."""
        return sorted({*self.steps_with(name), *self.steps_with(f"{name}_ema")})

    def _steps_of(self, pattern: str, folder: Path | None = None) -> list[int]:
        folder = folder or self.models
        matches = (re.fullmatch(pattern, entry) for entry in (os.listdir(folder) if folder.is_dir() else ()))
        return sorted(int(m.group(1)) for m in matches if m)

    def complete_steps(self, name: str) -> Iterator[int]:
        """Yield the steps of a model from the newest to the oldest. A step counts if its manifest lists weights, and
        these files exist with the listed sizes. If no step counts, yield the steps of weights without a manifest.
        (Published folders hold such weights.)"""
        known = self.steps()
        complete = (step for step in reversed(known) if self._lists_weights(name, step))
        if (newest := next(complete, None)) is not None:
            yield newest
            yield from complete
            return
        without = set(self.steps_of_model(name)) - set(known)
        yield from (step for step in sorted(without, reverse=True) if not self.unfinished_path(step).exists())

    def _lists_weights(self, name: str, step: int) -> bool:
        with contextlib.suppress(DamagedFile, OSError):
            files = self.manifest(step)["files"]
            paths = [
                path for path in (self.path(name, step), self.path(f"{name}_ema", step)) if self.key(path) in files
            ]
            return bool(paths) and all(path.stat().st_size == files[self.key(path)]["bytes"] for path in paths)
        return False

    def manifest(self, step: int) -> dict:
        """Return the manifest of a step. Raises DamagedFile if the file does not hold an unchanged manifest of this
        step. The check is strict because the folder may come from another person."""
        path = self.manifest_path(step)
        manifest = read_json(path)
        if not isinstance(manifest, dict):
            manifest = {}
        digest = manifest.pop("digest", None)
        wrong = [name for name, is_right in _FIELDS.items() if name in manifest and not is_right(manifest[name])]
        wrong += [name for name in ("step", "files") if name not in manifest]
        # The first versions wrote manifests without a digest and without a configuration.
        if digest != hash_json(manifest) and (digest is not None or "hparams" in manifest):
            wrong.append("digest")
        if not wrong and (manifest["step"] != step or not all(map(files_of(step).fullmatch, manifest["files"]))):
            wrong.append("step")
        if wrong:
            raise DamagedFile(f"{path} is damaged: not the manifest that was written (see '{wrong[0]}')")
        return manifest

    def config(self) -> dict[str, Any]:
        """Return the contents of config.json, or {} if the file does not exist. Raises DamagedFile if the contents are
        not a JSON object."""
        path = self.folder / "config.json"
        config = read_json(path) if path.exists() else {}
        if not isinstance(config, dict):
            raise DamagedFile(f"{path} is damaged: it holds no configuration")
        return config

    def hparams(self, steps: Iterable[int]) -> dict[str, Any] | None:
        """Return the configuration from the first undamaged manifest of these steps. Return None if this manifest holds
        no configuration."""
        for step in steps:
            with contextlib.suppress(DamagedFile, OSError):
                return self.manifest(step).get("hparams")
        return None

"""Writes and reads checkpoints. A checkpoint is complete or absent.

logs/<log_dir>/saved_models/<name>_<step>.th     plain state dicts, as the original program writes them
logs/<log_dir>/saved_stats/stats_<step>          everything else that a resume needs (meters, loss scale, counts)
logs/<log_dir>/saved_models/manifest_<step>.json sizes and hashes of these files, and its own hash; written last: a step
                                                 without a valid manifest is not a checkpoint
logs/<log_dir>/saved_models/.unfinished_<step>.json  while a checkpoint is written or removed: the names of its files
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.core.errors import DamagedFile, UserError
from utils.core.files import (
    fsync_folder,
    hash_json,
    load_tensors,
    read_json,
    remove_temporaries,
    save_tensors,
    sha256_file,
    write_json,
)
from utils.core.job import LOGS
from utils.core.manifests import Manifests, files_of

FORMAT = 1


class Checkpoints(Manifests):
    """Writes, verifies and removes the checkpoints of one run folder (logs/<log_dir>)."""

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self.stats = self.folder / "saved_stats"
        self._whole: set[int] = set()  # steps that this process has written or verified

    def stats_path(self, step: int) -> Path:
        return self.stats / f"stats_{step}"

    def lost_steps(self) -> list[int]:
        """Return the steps that have a file in saved_stats but nothing in saved_models. The weights are written before
        the stats file. Therefore the folder saved_models of such a step was emptied, or its disk is not mounted. An
        interrupted checkpoint always leaves weights or the file .unfinished_<step>.json."""
        steps = self._steps_of(r"stats_(\d+)", self.stats)
        return [s for s in steps if not (any(self.models.glob(f"*_{s}.th")) or self.unfinished_path(s).exists())]

    # ------------------------------------------------------------------ writing

    def save(self, step: int, state_dicts: dict, extra: dict, about: dict) -> None:
        """Write one checkpoint. state_dicts: {name: state dict}. extra: tensors and plain values. about: JSON values
        for the manifest. The manifest is written last; without a manifest the files are not a checkpoint."""
        self.sweep()
        values = {self.path(name, step): state for name, state in state_dicts.items()}
        values[self.stats_path(step)] = extra
        write_json(self.unfinished_path(step), dict(files=list(map(self.key, values))))
        self._whole.discard(step)
        try:
            files = {self.key(path): save_tensors(path, value) for path, value in values.items()}
            manifest = dict(format=FORMAT, step=step, **about, files=files)
            write_json(self.manifest_path(step), dict(manifest, digest=hash_json(manifest)))
        except OSError:
            with contextlib.suppress(OSError):  # the disk may be full: incomplete files must not use space
                self.sweep()
            raise
        self._whole.add(step)
        self.sweep()

    def sweep(self) -> None:
        """Remove the unfinished files that a killed process or a full disk has left. These are temporary files, and the
        files of checkpoints whose writing or removal did not end."""
        for folder in (self.models, self.stats):
            remove_temporaries(folder)
        for step in self._steps_of(r"\.unfinished_(\d+)\.json"):
            if not self.manifest_path(step).is_file():
                for path in self._files_of_unfinished(step):
                    path.unlink(missing_ok=True)
            self.unfinished_path(step).unlink(missing_ok=True)

    def _files_of_unfinished(self, step: int) -> list[Path]:
        """Return the files that .unfinished_<step>.json lists. Names that cannot belong to this step are left out. The
        JSON file is a former manifest if the checkpoint was being removed."""
        allowed = files_of(step)
        try:
            names = [str(name) for name in read_json(self.unfinished_path(step))["files"]]
        except (DamagedFile, KeyError, TypeError):
            names = []
        return [self.folder / name for name in names if allowed.fullmatch(name)]

    def prune(self, keep: int) -> None:
        """Remove old checkpoints. The `keep` newest complete checkpoints (at least 2), and everything newer than these,
        remain. Only steps with a manifest are removed, and only the files that the manifest lists."""
        complete = 0
        for step in reversed(self.steps()):
            if complete < max(keep, 2):
                complete += self._is_complete(step)
                continue
            with contextlib.suppress(DamagedFile):  # a damaged manifest does not tell which files to remove
                self.manifest(step)
                # This one atomic rename makes the checkpoint invalid and keeps the list of its files, which sweep()
                # removes.
                os.replace(self.manifest_path(step), self.unfinished_path(step))
        fsync_folder(self.models)
        self.sweep()

    def _is_complete(self, step: int) -> bool:
        with contextlib.suppress(DamagedFile, OSError):
            return step in self._whole or bool(self.verify(step))
        return False

    # ------------------------------------------------------------------ reading

    def verify(self, step: int) -> dict:
        """Return the manifest of a step. Raises DamagedFile unless all files match the manifest."""
        manifest = self.manifest(step)
        for name, expected in manifest["files"].items():
            self._verify_file(self.folder / name, expected)
        self._whole.add(step)
        return manifest

    @staticmethod
    def _verify_file(path: Path, expected: dict) -> None:
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise DamagedFile(f"{path} is damaged: its contents are not what was written")

    def newest_good(self, warn: Callable) -> tuple[int, dict] | tuple[None, None]:
        """Return (step, manifest) of the newest undamaged checkpoint, or (None, None) if no checkpoint is undamaged.
        Each damaged checkpoint is skipped, and reported by a call of `warn`."""
        for step in reversed(self.steps()):
            try:
                return step, self.verify(step)
            except (DamagedFile, OSError) as error:  # the disk raises OSError if it cannot read a file
                warn(f"checkpoint {step} is skipped: {error}")
        return None, None

    def load_stats(self, step: int) -> Any:
        return load_tensors(self.stats_path(step))

    def has(self, name: str, step: int) -> bool:
        """Return whether <name>_<step>.th exists, or is listed in the manifest (a listed file may be missing)."""
        path = self.path(name, step)
        return path.is_file() or (self.manifest_path(step).is_file() and self.key(path) in self.manifest(step)["files"])

    def load(self, name: str, step: int) -> dict:
        """Return the state dict in <name>_<step>.th. If a manifest lists the file, its contents are verified.

        If the file is missing, raises a UserError that lists the available steps.
        """
        path = self.path(name, step)
        if not path.is_file():
            there = ", ".join(map(str, self.steps_with(name)[-20:])) or "none"
            raise UserError(f"{path} does not exist; steps of '{name}' in {self.models}: {there}")
        manifest = self.manifest(step) if self.manifest_path(step).is_file() else {"files": {}}
        if expected := manifest["files"].get(self.key(path)):
            self._verify_file(path, expected)
        state = load_tensors(path)
        if not isinstance(state, dict):
            raise DamagedFile(f"{path} holds no state dict")
        return state


def checkpoints_of(run_name: str) -> Checkpoints:
    """Return the Checkpoints of logs/<run_name>."""
    return Checkpoints(LOGS / run_name)


def load_into(module: Any, state: Any, what: str) -> None:
    """Call module.load_state_dict(state). Raises a UserError with a message of one line if names or shapes differ."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = " ".join(lines[1:3] if len(lines) > 1 else lines)[:300]
        raise UserError(f"{what} does not fit the configured model: {detail}") from None

"""Checkpoints that are complete or absent.

logs/<log_dir>/saved_models/<name>_<step>.th     plain state dicts, as the original program writes them
logs/<log_dir>/saved_stats/stats_<step>          what else a resume needs (meters, loss scale, counts)
logs/<log_dir>/saved_models/manifest_<step>.json sizes and hashes of these and its own; written last: a step
                                                 without a manifest that holds is not a checkpoint
"""

import os
import re
from pathlib import Path

from utils.errors import DamagedFile, UserError
from utils.io import hash_json, load_tensors, read_json, save_tensors, sha256_file, write_json

FORMAT = 1
LOGS = Path("logs")


class Checkpoints:
    """The checkpoints of one run folder (logs/<log_dir>)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.models = self.folder / "saved_models"
        self.stats = self.folder / "saved_stats"

    def path(self, name, step):
        return self.models / f"{name}_{step}.th"

    def stats_path(self, step):
        return self.stats / f"stats_{step}"

    def manifest_path(self, step):
        return self.models / f"manifest_{step}.json"

    def steps(self):
        """Steps that have a manifest, ascending."""
        return self._steps_of(r"manifest_(\d+)\.json")

    def steps_with(self, name):
        """Steps for which there is a file of this name, with a manifest or not (published checkpoints)."""
        return self._steps_of(re.escape(name) + r"_(\d+)\.th")

    def _steps_of(self, pattern):
        if not self.models.is_dir():
            return []
        matches = (re.fullmatch(pattern, entry) for entry in os.listdir(self.models))
        return sorted(int(m.group(1)) for m in matches if m)

    # ------------------------------------------------------------------ writing

    def save(self, step, state_dicts, extra, about):
        """Write one checkpoint: state_dicts {name: state dict}, extra (tensors and plain values), about
        (JSON values for the manifest). Nothing counts until the manifest is there."""
        self._sweep()
        files = {}
        for name, state in state_dicts.items():
            path = self.path(name, step)
            files[str(path.relative_to(self.folder))] = save_tensors(path, state)
        path = self.stats_path(step)
        files[str(path.relative_to(self.folder))] = save_tensors(path, extra)
        manifest = dict(format=FORMAT, step=step, **about, files=files)
        write_json(self.manifest_path(step), dict(manifest, digest=hash_json(manifest)))

    def _sweep(self):
        """Remove the temporary files of a process that was killed while writing: they can be large."""
        for folder in (self.models, self.stats):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    # ------------------------------------------------------------------ reading

    def verify(self, step):
        """The manifest of a step whose files all are what it says. Raises DamagedFile otherwise."""
        path = self.manifest_path(step)
        manifest = read_json(path)
        try:
            files, digest = dict(manifest["files"]), manifest.pop("digest", None)
            if manifest["step"] != step or digest not in (None, hash_json(manifest)):  # None: before there were any
                raise KeyError("its contents are not what was written")
            for name, expected in files.items():
                self._verify_file(self.folder / name, expected["bytes"], expected["sha256"])
        except DamagedFile:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DamagedFile(f"{path} is damaged: not the manifest that was written") from None
        return manifest

    @staticmethod
    def _verify_file(path, size, digest):
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if path.stat().st_size != size or sha256_file(path) != digest:
            raise DamagedFile(f"{path} is damaged: its contents are not what was written")

    def newest_good(self, warn):
        """(step, manifest) of the newest checkpoint that verifies; (None, None) where there is none.
        Damaged ones are named through `warn` and passed over."""
        for step in reversed(self.steps()):
            try:
                return step, self.verify(step)
            except (DamagedFile, OSError) as error:  # OSError: a disk that cannot read them back
                warn(f"checkpoint {step} is passed over: {error}")
        return None, None

    def load_stats(self, step):
        return load_tensors(self.stats_path(step))

    def load(self, name, step):
        """The state dict <name>_<step>.th, verified where a manifest names it.

        Raises UserError that lists what there is where the file is missing.
        """
        path = self.path(name, step)
        if not path.is_file():
            there = ", ".join(map(str, self.steps_with(name)[-20:])) or "none"
            raise UserError(f"{path} does not exist; steps of '{name}' in {self.models}: {there}")
        if self.manifest_path(step).is_file():
            key = str(path.relative_to(self.folder))
            try:
                expected = read_json(self.manifest_path(step))["files"].get(key)
                size, digest = (expected["bytes"], expected["sha256"]) if expected else (None, None)
            except (KeyError, TypeError, AttributeError):
                raise DamagedFile(f"{self.manifest_path(step)} is damaged: not a manifest") from None
            if expected:
                self._verify_file(path, size, digest)
        state = load_tensors(path)
        if not isinstance(state, dict):
            raise DamagedFile(f"{path} holds no state dict")
        return state


def checkpoints_of(run_name):
    """The Checkpoints of logs/<run_name>."""
    return Checkpoints(LOGS / run_name)


def load_into(module, state, what):
    """module.load_state_dict(state) strictly, with one readable line when the names or shapes differ."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = " ".join(lines[1:3] if len(lines) > 1 else lines)[:300]
        raise UserError(f"{what} does not fit the configured model: {detail}") from None

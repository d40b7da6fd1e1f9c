"""A copy of the program with one more file, to test that a part is added by one file."""

import os
import shutil
import subprocess
import sys

from conftest import ROOT


class Copy:
    """A copy of the program in `folder`, with the text of one more file."""

    def __init__(self, folder, path, text):
        self.folder = folder
        for name in ("hparams", "models", "utils", "experiments"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("train_vqgan.py", "train_sampler.py", "datasets.yaml"):
            shutil.copy(ROOT / name, folder)
        (folder / path).write_text(text)

    def run(self, script, flags, code=0):
        """Run a script of the copy; returns what it printed."""
        env = dict(os.environ, OMP_NUM_THREADS="1")
        command = [sys.executable, script, *flags]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

"""A training run: where it writes, how it resumes, when it logs, how it ends.

The script owns the arithmetic; the run owns the events:

    with Run(H, "vqgan") as run:
        ... build models, optimisers ...
        run.restore(files=dict(vqgan=vqgan, ae_optim=optimiser), extra=dict(precision=precision))
        for step, batch in run.steps(make_batches):
            ... forward, backward, update ...
            run.report(loss=loss)
            if run.due(H.steps_per_eval): ...

Randomness and data order are functions of (seed, step), so that what is saved is only what was learned;
a resumed run equals the uninterrupted one bit for bit on the CPU.
"""

import contextlib
import json
import os
import sys
import time

import torch

from utils import distributed
from utils.checkpoint import LOGS, checkpoints_of, load_into
from utils.dashboard import Dashboard
from utils.errors import DamagedFile, UserError
from utils.io import Lines, read_json, remove_temporaries
from utils.meters import Meters
from utils.panes import duration, plan_of, time_left
from utils.progress import Forecast, Progress, say
from utils.records import curve_rows, curves_of
from utils.seed import seed_everything
from utils.shown import Shown
from utils.signals import StopRequest


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. Raises UserError where the device is not there."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    if name == "mps" and not mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU here; use --device cpu or auto")
    if name == "mps" and distributed.world_size() > 1:
        raise UserError("--device mps: an Apple GPU works for one process only; use --device cpu for several")
    if name == "cuda":
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{distributed.local_size()} processes on a machine with {torch.cuda.device_count()} CUDA device(s): "
                "give torchrun one for each (--nproc_per_node), or --device cpu"
            )
        torch.cuda.set_device(distributed.local_rank())
        return torch.device("cuda", distributed.local_rank())
    return torch.device(name)


def device_name(device):
    """As its maker calls it, where PyTorch knows."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


class Run(Shown):
    """One training run in logs/<log_dir>; see the module's docstring."""

    def __init__(self, H, name, name_batch=None):
        self.H, self.name = H, name
        self.name_batch = name_batch or (lambda step: None)
        self.device = pick_device(H.device)
        self.device_name = device_name(self.device)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.folder = os.path.join(LOGS, H.log_dir)
        self.store = checkpoints_of(H.log_dir)
        self.meters = Meters(self.device)
        self.first_bad = torch.zeros((), dtype=torch.int64, device=self.device)
        self.dashboard, self.progress, self.bars = None, None, {}
        self.about = {}  # JSON values for the manifests: what the weights depend on
        self._log = self._stats = self._speed = None
        distributed.must_agree(lambda: dict(H.to_dict(), num_workers=None), "the configuration")
        # manifest: of the checkpoint that is resumed; _saved_step: what need not be saved again
        self.step, self.manifest, self._saved_step = distributed.from_main(self._choose_start)

    # ------------------------------------------------------------------ start

    def _choose_start(self):
        """What to continue: (step, its manifest, the same step if all of it is saved), None where there is none.
        Refuses to write over another run's checkpoints."""
        H = self.H
        config = os.path.join(self.folder, "config.json")
        if H.resume and os.path.exists(config) and read_json(config).get("script", H.script) != H.script:
            raise UserError(f"--resume: {self.folder} is not a run of this script: give another --log_dir")
        if H.resume:
            step, manifest = self.store.newest_good(lambda m: say(f"warning: {m}"))
            if step is None and self.store.steps():
                raise UserError(f"no checkpoint in {self.folder} is whole: start afresh in another --log_dir")
            weights = self.store.steps_with(self.name)
            # A run of this program that was killed in its first checkpoint has left its config.json, too.
            if step is None and weights and not os.path.exists(config):
                raise UserError(
                    f"{self.folder} holds weights (step {weights[-1]}) but nothing else that a resume needs: start "
                    f"from them with --load_dir {H.log_dir} --load_step {weights[-1]} and another --log_dir"
                )
            if step is None:
                say(f"nothing to resume in {self.folder}: starting afresh")
            return step or 0, manifest, step
        existing = sorted({*self.store.steps(), *self.store.steps_with(self.name)})
        if not existing:
            return H.load_step, None, None
        if H.load_step and H.load_dir == H.log_dir and H.load_step == existing[-1]:
            whole = H.load_step in self.store.steps()
            return H.load_step, self.store.verify(H.load_step) if whole else None, None
        raise UserError(
            f"{self.folder} already holds checkpoints (newest: step {existing[-1]}): "
            "--resume continues it, another --log_dir starts afresh"
        )

    def __enter__(self):
        H = self.H
        if distributed.is_main():
            os.makedirs(self.folder, exist_ok=True)
            for folder in (self.folder, os.path.join(self.folder, "images")):
                remove_temporaries(folder)
            self.store.sweep()
            self.write_config()
            self._log = Lines(os.path.join(self.folder, "log.txt"))
            self._stats = self._open_stats()
            self.restore_bars()
            self._speed = Lines(os.path.join(self.folder, "speed.jsonl"))
        self.dashboard = Dashboard(
            H.visdom_server, H.visdom_port, H.log_dir, enabled=not H.no_visdom and distributed.is_main(), warn=self.say,
            plan=plan_of(H, self.name, self.device.type), images_per_step=H.batch_size,
        )  # fmt: skip
        self.dashboard.properties(dict(sorted(H.to_dict().items(), key=lambda item: item[0] not in H.explicit)))
        self._show_progress("starting")
        for other in (H.visdom_compare or ()) if self.dashboard.enabled else ():
            self.dashboard.compare(other, curve_rows(os.path.join(LOGS, other, "stats.jsonl")))
        return self

    def _open_stats(self):
        """stats.jsonl, cut back to what the checkpoint knew: later lines will be written again."""
        path = os.path.join(self.folder, "stats.jsonl")
        known = self.manifest or {}
        stats = Lines(path, keep=known.get("stats_bytes", 0))
        if stats.size < known.get("stats_bytes", 0) or known.get("stats_sha256", stats.sha256) != stats.sha256:
            say(
                f"warning: {path} is not what was written; the curves before step {self.step} are incomplete or wrong"
            )
        return stats

    def restore(self, files, extra):
        """Say what a checkpoint holds, and load what this run starts from.

        files: {file name: object with state_dict and load_state_dict}, each its own .th file;
        extra: likewise, kept together in stats_<step>.
        """
        self.files, self.extra = files, dict(extra, meters=self.meters)
        H = self.H
        if H.resume and self.step:
            for name, item in files.items():
                load_into(item, self.store.load(name, self.step), f"{self.store.path(name, self.step)}")
            self._load_extra()
            self.say(f"resumed {self.folder} after step {self.step}")
            if distributed.is_main():
                self.dashboard.history(curve_rows(os.path.join(self.folder, "stats.jsonl")))
        elif H.load_step:
            self._load_weights()
        for name, item in files.items():  # whatever the machines, the processes begin alike
            if not name.endswith("_optim"):
                distributed.tensors_from_main(item.state_dict().values())

    def _load_extra(self):
        state = self.store.load_stats(self.step)
        try:
            for name, item in self.extra.items():
                item.load_state_dict(state[name])
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise DamagedFile(f"{self.store.stats_path(self.step)} does not fit this run: {error!r}") from None

    def _load_weights(self):
        """--load_dir, --load_step: weights, and with --load_optim the optimisers."""
        H = self.H
        source = checkpoints_of(H.load_dir)
        main_state = source.load(self.name, H.load_step)
        for name, item in self.files.items():
            if name.endswith("_optim") and not H.load_optim:
                continue
            path = source.path(name, H.load_step)
            if name == f"{self.name}_ema" and not source.has(name, H.load_step):
                state = main_state  # a run without averages: they start at the weights
            else:
                state = main_state if name == self.name else source.load(name, H.load_step)
            load_into(item, state, str(path))
        self.say(f"loaded step {H.load_step} of {LOGS}/{H.load_dir}" + (" with optimisers" if H.load_optim else ""))

    def trains_on(self, images):
        """Note in the manifests what the weights learn from, and say so where a resumed run has other images."""
        known, now = (self.manifest or {}).get("images"), images.sketch()
        if known not in (None, now):
            self.say(
                f"warning: {self.folder} goes on with other images than it was trained on until step {self.step} "
                f"({now['count']} of '{self.H.dataset}', {known['count']} before)"
            )
        self.about["images"] = now

    # ------------------------------------------------------------------ the loop

    def steps(self, make_batches):
        """Yield (step, batch) from where the run stands up to train_steps, and do what is due between.

        make_batches(start_step) -> an endless iterator whose first item belongs to start_step.
        """
        H = self.H
        if self.step >= H.train_steps:
            self.say(f"{self.folder} is at step {self.step} already: nothing to do up to --train_steps {H.train_steps}")
            self._show_progress("finished")
            return
        batches = make_batches(self.step + 1)
        self._clock = (time.monotonic(), self.step)
        forecast = Forecast(H.train_steps)
        with StopRequest() as stop, Progress(
            H.train_steps, H.log_dir, "step", self.step, distributed.is_main()
        ) as self.progress:
            while self.step < H.train_steps:
                step = self.step + 1
                seed_everything("step", H.seed, step, distributed.rank())
                batch = next(batches)
                self.current = step
                yield step, batch
                self.step = step
                self._after_step()
                if expected := forecast.text(step):
                    self.say(f"expected: {expected}")
                signalled = distributed.any_rank(stop.number)
                if signalled:
                    self.save_checkpoint()
                    self.say(f"stopped by a signal after step {step}; continue with --resume:\n  {self.again()}")
                    raise SystemExit(128 + signalled)
            self.save_checkpoint()

    def due(self, every):
        """True where the current step is a multiple of `every` (0: never), and at the last step."""
        return every > 0 and (self.current % every == 0 or self.current == self.H.train_steps)

    def ends_epoch(self, n):
        """True where the current step is the first to complete a pass over n items."""
        done = self.current * self.H.batch_size
        return done // n > (done - self.H.batch_size) // n

    def report(self, **scalars):
        """Take numbers or () tensors into the means of stats.jsonl. `loss` must stay finite."""
        self.meters.add(scalars)
        if "loss" in scalars:
            bad = ~torch.isfinite(scalars["loss"].detach())
            self.first_bad = torch.where((self.first_bad == 0) & bad, self.current, self.first_bad)

    def _after_step(self):
        H, step = self.H, self.step
        log = step % H.steps_per_log == 0 or step == H.train_steps
        checkpoint = H.steps_per_checkpoint > 0 and step % H.steps_per_checkpoint == 0
        if log or checkpoint or self.device.type == "cpu":
            self._check_finite()
        shown = self._write_log() if log else None
        if distributed.is_main():
            self.progress.update(1, shown)
            if step == H.train_steps:  # before the checkpoint: after that nothing is done again
                self.show_strips()
        if checkpoint:
            self.save_checkpoint()

    def _check_finite(self):
        bad = distributed.any_rank(int(self.first_bad))
        if bad:
            batch = self.name_batch(bad)
            raise UserError(
                f"the loss is not finite at step {bad}{f' ({batch})' if batch else ''}; {self._newest()}. "
                "Lower --lr, train in float32 (--no_amp), or look at these images"
            )

    def _check_weights(self):
        """What an update has done to the weights the next step's loss would show: a checkpoint comes before that."""
        for name, item in self.files.items():
            if name.endswith("_optim"):
                continue
            for key, value in item.state_dict().items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise UserError(
                        f"the weights are not finite after step {self.step} ({key} of '{name}'); {self._newest()}. "
                        "Lower --lr, or train in float32 (--no_amp)"
                    )

    def _newest(self):
        steps = self.store.steps()
        return f"the newest checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"

    def _write_log(self):
        H = self.H
        means = self.meters.pop_means()
        now = time.monotonic()
        since, step_then = self._clock
        rate = (self.step - step_then) * H.batch_size / max(now - since, 1e-9)
        self._clock = (now, self.step)
        self.record(images=self.step * H.batch_size, **means)
        speed = dict(step=self.step, images_per_second=rate)
        if self.device.type == "cuda":
            speed["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._speed is not None:
            self._speed.append(json.dumps(speed))
        self.dashboard.scalars(self.step, {k: v for k, v in speed.items() if k != "step"})
        self._show_progress("running" if self.step < H.train_steps else "finished", rate)
        shown = {k: means[k] for k in ("loss",) if k in means}
        return dict(shown, **{"img/s": round(rate, 1)})

    def _show_progress(self, state, rate=None):
        """How far the run is, on the dashboard; rate: images a second now."""
        H = self.H
        shown = {"images seen": f"{self.step * H.batch_size:,}"}
        if self.progress is not None and self.progress.rate():
            shown["time so far"] = duration(time.monotonic() - self.progress.start)
            if state == "running":
                shown["time left"] = time_left((H.train_steps - self.step) / self.progress.rate())
        if rate:
            shown["images / s"] = f"{rate:.3g}"
        shown["device"] = device_name(self.device)
        self.dashboard.progress(self.step, H.train_steps, shown, state)

    def record(self, **values):
        """Write one line of stats.jsonl for the current step, and its curves."""
        if self._stats is not None:
            self._stats.append(json.dumps(dict(step=self.current, **values)))
        self.dashboard.scalars(self.current, curves_of(values))

    # ------------------------------------------------------------------ what is written

    def save_checkpoint(self):
        """Write the checkpoint of the current step, unless it is there and whole."""
        self._check_finite()
        if self._saved_step != self.step:
            self._check_weights()
            extra = {name: item.state_dict() for name, item in self.extra.items()}  # all processes' counts
            if distributed.is_main():
                self._write_checkpoint(extra)
            self._saved_step = self.step
        distributed.barrier()

    def _write_checkpoint(self, extra):
        self._stats.sync()
        self.store.save(
            self.step,
            {name: item.state_dict() for name, item in self.files.items()},
            extra,
            dict(stats_bytes=self._stats.size, stats_sha256=self._stats.sha256, run=self.name, **self.about),
        )
        if self.H.keep_checkpoints:
            self.store.prune(self.H.keep_checkpoints)

    def say(self, message):
        """One line on the terminal and in log.txt (rank 0 only)."""
        if not distributed.is_main():
            return
        say(message)
        if self._log is not None:
            self._log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def __exit__(self, kind, error, _traceback):
        if isinstance(error, UserError) and self._log is not None:
            with contextlib.suppress(OSError):  # what is on its way up says more
                self._log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {error}")
        if kind is not None:
            self._show_progress("stopped, go on with --resume" if kind is SystemExit else "failed")
        self.dashboard.close()
        for file in (self._log, self._stats, self._speed):
            if file is not None:
                file.close()
        if kind in (None, SystemExit):  # done, or stopped by a signal, which all have agreed on
            distributed.cleanup()
        sys.stdout.flush()
        return False

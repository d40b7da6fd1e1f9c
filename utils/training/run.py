"""A training run: where it writes, how it resumes, when it logs, how it ends.

The script computes the updates; the run handles everything between them:

    with Run(H, "vqgan") as run:
        ... build models, optimisers ...
        run.restore(files=dict(vqgan=vqgan, ae_optim=optimiser), extra=dict(precision=precision))
        for step, batch in run.steps(make_batches):
            ... forward, backward, update ...
            run.report(loss=loss)
            if run.due(H.steps_per_eval): ...

Randomness and data order are functions of (seed, step), so only what was learned is saved. On the CPU, a resumed run
equals the uninterrupted one bit for bit.
"""

import contextlib
import itertools
import json
import os
import sys
import time

import torch

from utils.core import distributed
from utils.core.checkpoint import LOGS, checkpoints_of, load_into
from utils.core.device import device_name, pick_device
from utils.core.errors import DamagedFile, UserError
from utils.core.files import Lines, hash_json, read_json, remove_temporaries, write_json
from utils.core.lock import FolderLock
from utils.core.progress import Forecast, Progress, duration, say
from utils.core.seed import seed_everything
from utils.core.signals import StopRequest
from utils.display.dashboard_panes import plan_of, time_left
from utils.display.live_dashboard import Dashboard
from utils.display.run_files import curve_rows, curves_of
from utils.training.meters import Meters
from utils.training.shown import Shown


class Run(Shown):
    """One training run in logs/<log_dir>; see the module's docstring."""

    def __init__(self, H, name, name_batch=None, loads=True):
        """name: the name of the model and of its files. name_batch: step -> text that names the images of its batch, or
        None. loads: True if --load_step names weights to start from; False if it names a model that the script
        measures."""
        self.H, self.name = H, name
        self.load_step = H.load_step if loads else 0
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
        self.facts = {}  # JSON values for config.json that are known only after the models are built
        self._lock = self._log = self._stats = self._speed = None
        distributed.must_agree(lambda: dict(H.to_dict(), num_workers=None), "the configuration")
        # manifest: of the checkpoint that is resumed; _saved_step: the step that is already saved
        self.step, self.manifest, self._saved_step = distributed.from_main(self._lock_and_choose)
        self.resumed = self._saved_step is not None

    # ------------------------------------------------------------------ start

    def _lock_and_choose(self):
        self._lock = FolderLock(self.folder, say)
        try:
            return self._choose_start()
        except BaseException:
            self._lock.release()
            raise

    def _choose_start(self):
        """What to start from: (step, its manifest or None, the same step if its checkpoint is complete,
        else None). Raises UserError rather than overwrite another run."""
        H, store = self.H, self.store
        config = self._recorded_config()
        if config.get("script", H.script) != H.script:
            raise UserError(
                f"{self.folder} is not a run of this script (but of {config['script']}): give another --log_dir"
            )
        if not store.steps():
            self._refuse_if_lost(config)
        if H.resume:
            step, manifest = store.newest_good(lambda m: say(f"warning: {m}"))
            if step is not None:
                return step, manifest, step
            if store.steps():
                raise UserError(f"no checkpoint in {self.folder} is complete: start afresh in another --log_dir")
        existing = sorted({*store.steps(), *store.steps_with(self.name)})
        if self.load_step and H.load_dir == H.log_dir and existing and self.load_step == existing[-1]:
            complete = self.load_step in store.steps()
            return self.load_step, store.verify(self.load_step) if complete else None, None
        if H.resume:
            # A run that was killed while it wrote its first checkpoint has left its config.json, too.
            if existing and not config:
                raise UserError(
                    f"{self.folder} holds weights (step {existing[-1]}) but nothing else that a resume needs: start "
                    f"from them with --load_dir {H.log_dir} --load_step {existing[-1]} and another --log_dir"
                )
            start = f"from step {self.load_step} of {LOGS}/{H.load_dir}" if self.load_step else "afresh"
            say(f"nothing to resume in {self.folder}: starting {start}")
        elif existing:
            raise UserError(
                f"{self.folder} already holds checkpoints (newest: step {existing[-1]}): "
                "--resume continues it, another --log_dir starts afresh"
            )
        return self.load_step, None, None

    def _recorded_config(self):
        """The contents of config.json; {} if it does not exist. A damaged one is reported, and is replaced later."""
        path = os.path.join(self.folder, "config.json")
        try:
            config = read_json(path) if os.path.exists(path) else {}
            return config if isinstance(config, dict) else {}
        except DamagedFile as error:
            say(f"warning: {error}; it is written again with the next checkpoint")
            return {}

    def _refuse_if_lost(self, config):
        """A disk that is not mounted looks like a run without checkpoints."""
        lost = [*self.store.lost_steps(), *([config["checkpoint"]] if config.get("checkpoint") else [])]
        if lost:
            raise UserError(
                f"{self.folder} had a checkpoint of step {lost[-1]}, which is not in {self.store.models} now: bring it "
                "back (is its disk mounted?), or start afresh in another --log_dir"
            )

    @property
    def source(self):
        """The Checkpoints that hold the weights of the step that the run starts from."""
        return self.store if self.resumed or not self.load_step else checkpoints_of(self.H.load_dir)

    def __enter__(self):
        H = self.H
        if distributed.is_main():
            for folder in (self.folder, os.path.join(self.folder, "images")):
                remove_temporaries(folder)
            self.store.sweep()
            self._log = Lines(os.path.join(self.folder, "log.txt"))
            self._stats = self._open_stats()
            self.restore_bars()
            self._speed = Lines(os.path.join(self.folder, "speed.jsonl"))
        self.dashboard = Dashboard(
            H.visdom_server,
            H.visdom_port,
            H.log_dir,
            enabled=not H.no_visdom and distributed.is_main(),
            warn=self.say,
            plan=plan_of(H, self.name, self.device.type),
            images_per_step=H.batch_size,
        )
        self.dashboard.properties(dict(sorted(H.to_dict().items(), key=lambda item: item[0] not in H.explicit)))
        self._show_progress("starting")
        for other in (H.visdom_compare or ()) if self.dashboard.enabled else ():
            self.dashboard.compare(other, curve_rows(os.path.join(LOGS, other, "stats.jsonl")))
        return self

    def _open_stats(self):
        """Open stats.jsonl, truncated to its size at the checkpoint: the run writes the later lines again. Without a
        checkpoint, an old file is renamed."""
        path = os.path.join(self.folder, "stats.jsonl")
        if self.manifest is None and os.path.isfile(path) and os.path.getsize(path):
            numbered = (os.path.join(self.folder, f"stats_{i}.jsonl") for i in itertools.count(1))
            aside = next(name for name in numbered if not os.path.lexists(name))
            os.rename(path, aside)
            say(f"the curves of an earlier start are kept in {aside}")
        known = self.manifest or {}
        stats = Lines(path, keep=known.get("stats_bytes", 0))
        if stats.size < known.get("stats_bytes", 0) or known.get("stats_sha256", stats.sha256) != stats.sha256:
            say(f"warning: {path} is not what was written; the curves before step {self.step} are incomplete or wrong")
        return stats

    def restore(self, files, extra):
        """Declare what a checkpoint holds, and load what this run starts from. A fresh run then writes its config.json,
        before long work begins.

        files: {file name: object with state_dict and load_state_dict}, each saved in a .th file of its own.
        extra: {name: object} of the same kind, saved together in stats_<step>.
        """
        self.files, self.extra = files, dict(extra, meters=self.meters)
        if self.resumed:
            for name, item in files.items():
                self._load(name, item)
            self._load_extra()
            self.say(f"resumed {self.folder} after step {self.step}")
            if distributed.is_main():
                self.dashboard.history(curve_rows(os.path.join(self.folder, "stats.jsonl")))
        elif self.load_step:
            self._load_weights()
        if distributed.is_main() and not self.resumed:
            self.write_config()
        for name, item in files.items():  # all processes start with the same values on any machine
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
        for name, item in self.files.items():
            if H.load_optim or not name.endswith("_optim"):
                self._load(name, item)
        self.say(f"loaded step {H.load_step} of {LOGS}/{H.load_dir}" + (" with optimisers" if H.load_optim else ""))

    def _load(self, name, item):
        """Load the object of one file. Averages that the source does not have start from its weights."""
        source = self.source
        if name == f"{self.name}_ema" and not source.has(name, self.step):
            name = self.name
        load_into(item, source.load(name, self.step), str(source.path(name, self.step)))

    def trains_on(self, images):
        """Record in the manifests what the weights learn from, and warn if a resumed run has other images."""
        if not distributed.is_main():
            return
        known, now = (self.manifest or {}).get("images"), images.sketch()
        if known and known != {k: now.get(k) for k in known}:  # earlier versions recorded less
            self.say(
                f"warning: {self.folder} continues with other images than it was trained on until step {self.step} "
                f"({now['count']} of '{self.H.dataset}', {known['count']} before)"
            )
        self.about["images"] = now

    # ------------------------------------------------------------------ the loop

    def steps(self, make_batches):
        """Yield (step, batch) from the current step up to train_steps. Between steps, write logs and checkpoints.

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
        with (
            StopRequest() as stop,
            Progress(H.train_steps, H.log_dir, "step", self.step, distributed.is_main()) as self.progress,
        ):
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
        """True if the current step is a multiple of `every` or the last step; always False if `every` is 0."""
        return every > 0 and (self.current % every == 0 or self.current == self.H.train_steps)

    def ends_epoch(self, n):
        """True if the current step completes a pass over n items."""
        done = self.current * self.H.batch_size
        return done // n > (done - self.H.batch_size) // n

    def report(self, **scalars):
        """Add numbers or () tensors to the means of stats.jsonl. `loss` must stay finite."""
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
            if step == H.train_steps:  # before the checkpoint: a resume after it would not repeat this
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
        """Check that the weights are finite before they are saved: only the next step's loss would show it."""
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
        """Show the progress of the run on the dashboard. rate: current images per second."""
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

    def write_config(self, **more):
        """Write config.json (configuration and facts). A fresh run writes it before its first step, a resumed run
        with its next checkpoint, so that a failed resume changes nothing. more: further JSON values."""
        hparams = self.H.to_dict()
        config = dict(format=1, script=self.H.script, hparams=hparams, digest=hash_json(hparams), facts=self.facts)
        write_json(os.path.join(self.folder, "config.json"), dict(config, **more))

    def save_checkpoint(self):
        """Write the checkpoint of the current step, unless a complete one exists."""
        self._check_finite()
        if self._saved_step != self.step:
            self._check_weights()
            extra = {name: item.state_dict() for name, item in self.extra.items()}  # sums all processes' counts
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
            dict(
                stats_bytes=self._stats.size,
                stats_sha256=self._stats.sha256,
                run=self.name,
                script=self.H.script,
                hparams=self.H.to_dict(),
                **self.about,
            ),
        )
        self.write_config(checkpoint=self.step)
        if self.H.keep_checkpoints:
            self.store.prune(self.H.keep_checkpoints)

    def say(self, message):
        """Print one line on the terminal and append it to log.txt (rank 0 only)."""
        if not distributed.is_main():
            return
        say(message)
        if self._log is not None:
            self._log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def __exit__(self, kind, error, _traceback):
        if isinstance(error, UserError) and self._log is not None:
            with contextlib.suppress(OSError):  # the error being raised matters more
                self._log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {error}")
        if kind is not None:
            self._show_progress("stopped, continue with --resume" if kind is SystemExit else "failed")
        self.dashboard.close()
        for file in (self._log, self._stats, self._speed):
            if file is not None:
                file.close()
        if self._lock is not None:
            self._lock.release()
        if kind in (None, SystemExit):  # finished, or all processes agreed to stop after a signal
            distributed.cleanup()
        sys.stdout.flush()
        return False

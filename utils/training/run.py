"""Manages a training run. The class Run resumes the run, writes its logs and checkpoints, and ends it.

The script computes the updates; the run handles everything between them:

    with Run(H, "vqgan", device) as run:
        ... build models, optimisers ...
        run.restore(files=dict(vqgan=vqgan, ae_optim=optimiser), extra=dict(precision=precision))
        for step, batch in run.steps(make_batches):
            ... forward, backward, update ...
            run.report(loss=loss)
            if run.due(H.steps_per_eval): ...

Random numbers and the order of the data are functions of (seed, step). Therefore checkpoints do not contain them. On
the CPU, a resumed run equals the uninterrupted run bit for bit.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from utils.core import distributed, progress
from utils.core.checkpoint import LOGS, Checkpoints, checkpoints_of, load_into
from utils.core.errors import SIGPIPE, DamagedFile, UserError, warn
from utils.core.files import hash_json, write_json
from utils.core.lock import FolderLock
from utils.core.progress import Forecast, Progress, say
from utils.core.seed import seed_everything
from utils.core.signals import StopRequest
from utils.data.images import ImageSet
from utils.data.sources import other_files
from utils.display import commands
from utils.display.report import report_at_end
from utils.training.meters import Meters
from utils.training.run_display import RunDisplay
from utils.training.run_logs import RunLogs
from utils.training.start import agree_on_steps, choose_start

MONTH = 30 * 86400.0  # seconds
LESS_WORK = (
    "fewer --train_steps take less time; so does a new run with --preset small, a smaller --img_size, --nf (stage 1), "
    "or --bert_n_emb and --bert_n_layers (stage 2)"
)


def is_optimiser(name: str) -> bool:
    """Return whether a file of a checkpoint holds the state of an optimiser instead of weights."""
    return name.endswith("_optim")


class Run:
    """One training run in logs/<log_dir>; see the module's docstring."""

    display: RunDisplay

    def __init__(
        self,
        H: Any,
        name: str,
        device: torch.device,
        name_batch: Callable[[int], str] | None = None,
        loads: bool = True,
    ) -> None:
        """name: the name of the model and of its files. name_batch: a function of a step that returns a text with the
        names of the images in the batch of this step. loads: True if --load_step names weights to start from. False if
        --load_step names a model that the script measures."""
        agree_on_steps(H)
        self.H, self.name, self.device, self.name_batch = H, name, device, name_batch
        self.load_step = H.load_step if loads else 0
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.folder = os.path.join(LOGS, H.log_dir)
        self.store = checkpoints_of(H.log_dir)
        self.meters = Meters(device)
        self.first_bad = torch.zeros((), dtype=torch.int64, device=device)  # the first step with a bad loss
        self.about: dict[str, Any] = {}  # JSON values for the manifests (the data, the autoencoder)
        self.facts: dict[str, Any] = {}  # JSON values for config.json, which are known after the models are built
        self._lock: FolderLock | None = None
        self._files: RunLogs | None = None
        self.progress: Progress | None = None
        distributed.must_agree(lambda: dict(H.to_dict(), num_workers=None), "the configuration")
        self.step, self.manifest, self.resumed = distributed.from_main(self._lock_and_choose)
        self._saved_step = self.step if self.resumed else None

    # ------------------------------------------------------------------ start

    def _lock_and_choose(self) -> tuple[int, dict[str, Any] | None, bool]:
        self._lock = FolderLock(self.folder, say)
        try:
            return choose_start(self.H, self.name, self.load_step, self.store)
        except BaseException:
            self._lock.release()
            raise

    @property
    def source(self) -> Checkpoints:
        """The Checkpoints object that holds the weights at the start of the run."""
        return self.store if self.resumed or not self.load_step else checkpoints_of(self.H.load_dir)

    def __enter__(self) -> Self:
        if distributed.is_main():
            self.store.sweep()
            self._files = RunLogs(self.folder, self.manifest)
        self.display = RunDisplay(self.H, self.name, self.device, self.folder, self.step, self.say)
        return self

    def trains_on(self, images: ImageSet) -> None:
        """Record the training images in the manifests, and warn if a resumed run has other images."""
        if not distributed.is_main():
            return
        if others := other_files(images.source):
            self.say(f"note: not read: {others} in the data set")
        known, now = (self.manifest or {}).get("images"), images.sketch()
        if known and known != {k: now.get(k) for k in known}:  # earlier versions recorded less
            self.say(
                f"warning: {self.folder} continues with other images than it was trained on until step {self.step} "
                f"({now['count']} of '{self.H.dataset}', {known['count']} before)"
            )
        self.about["images"] = now

    def restore(self, files: dict[str, Any], extra: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
        """Declare the objects that a checkpoint holds, and load the state at the start of this run. A new run also
        writes its config.json here, before long work begins.

        files: {file name: object with state_dict and load_state_dict}, each saved in a .th file of its own.
        extra: {name: object with state_dict and load_state_dict}, saved together in stats_<step>.
        optional: like extra, but a checkpoint may lack these objects, because their flag may have been given later.
        """
        self.files, self.optional = files, optional or {}
        self.extra = dict(extra, meters=self.meters, **self.optional)
        if self.resumed:
            self._load(optimisers=True)
            self._load_extra()
            self.say(f"resumed {self.folder} after step {self.step}")
            if self.H.changed:
                self.say(f"changed: {', '.join(self.H.changed)}")
            self.display.history()
        elif self.load_step:
            self._load(self.H.load_optim)
            with_optimisers = " with optimisers" if self.H.load_optim else ""
            self.say(f"loaded step {self.load_step} of {LOGS}/{self.H.load_dir}{with_optimisers}")
        if not self.resumed:
            self._write_config()
        for name, item in files.items():  # all processes start with the weights of the main process
            if not is_optimiser(name):
                distributed.broadcast_in_place(item.state_dict().values())

    def _load(self, optimisers: bool) -> None:
        """Load the files. If the source has no averages, or with --weights raw, the averages start from the weights."""
        raw = self.H.weights == "raw" and not self.resumed
        for name, item in self.files.items():
            if optimisers or not is_optimiser(name):
                if name == f"{self.name}_ema" and (raw or not self.source.has(name, self.step)):
                    name = self.name
                load_into(item, self.source.load(name, self.step), str(self.source.path(name, self.step)))

    def _load_extra(self) -> None:
        state = self.store.load_stats(self.step)
        try:
            for name, item in self.extra.items():
                if name in state or name not in self.optional:
                    item.load_state_dict(state[name])
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise DamagedFile(f"{self.store.stats_path(self.step)} does not fit this run: {error!r}") from None

    def introduce(self, items: int, parameters: int, precision: str, of: str = "images", validate: int = 0) -> None:
        """Print the first lines: the model, its data and device, and the folder of the run. items: the number of
        training items. of: the name of the items ("images"). validate: the number of validation items."""
        H, device = self.H, self.display.device_name
        split = f" ({items} train, {validate} validate)" if validate else ""
        self.say(
            f"{self.name}: {parameters / 1e6:.1f}M parameters, {items + validate} {of} of '{H.dataset}'{split}, "
            f"batch {H.batch_size}, {precision} on {device}"
        )
        self.say(f"writing to {self.folder}")
        self.facts = dict(model=self.name, parameters=parameters, items=items, of=of, precision=precision)
        self.facts.update(device=device, torch=torch.__version__)
        if not self.resumed:
            self._write_config()

    # ------------------------------------------------------------------ the loop

    def steps(self, make_batches: Callable[[int], Iterator[Any]]) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) from the current step up to train_steps. Between steps, write logs and checkpoints.

        make_batches: a function of start_step that returns an endless iterator. The first item belongs to start_step.
        """
        H = self.H
        if self.step >= H.train_steps:
            self.say(f"{self.folder} is at step {self.step} already: nothing to do up to --train_steps {H.train_steps}")
            self.display.progress(self.step, "finished")
            return
        batches = make_batches(self.step + 1)
        self._logged = (time.monotonic(), self.step)
        forecast = Forecast(H.train_steps)
        with (
            StopRequest() as stop,
            Progress(H.train_steps, H.log_dir, "step", self.step) as self.progress,
        ):
            while self.step < H.train_steps:
                self.current = self.display.step = self.step + 1
                seed_everything("step", H.seed, self.current, self.rank)
                yield self.current, next(batches)
                self.step = self.current
                self._after_step()
                if expected := forecast.text(self.step):
                    self.say(f"expected: {expected}")
                    if forecast.left > MONTH:
                        self.say(f"more than a month: {LESS_WORK}")
                if signalled := distributed.all_reduce_max(stop.number or SIGPIPE * progress.output_is_closed):
                    self.save_checkpoint()
                    self._say_why_it_stops(signalled)
                    raise SystemExit(128 + signalled)
            self.save_checkpoint()

    def _say_why_it_stops(self, signalled: int) -> None:
        reason = "a signal" if signalled != SIGPIPE else "closed output (no program reads stdout any more)"
        text = f"stopped by {reason} after step {self.step}; continue with --resume:"
        self.say(f"{text}\n  {self._again()}")
        if progress.output_is_closed:
            warn(f"{text} {self._again()}")

    def due(self, every: int) -> bool:
        """Return True if the current step is a multiple of `every`, or is the last step. With every=0, return False."""
        return every > 0 and (self.current % every == 0 or self.current == self.H.train_steps)

    def ends_epoch(self, n: int) -> bool:
        """Return True if the current step completes a pass over n items."""
        done = self.current * self.H.batch_size
        return done // n > (done - self.H.batch_size) // n

    def report(self, **scalars: Any) -> None:
        """Add numbers or () tensors to the means of stats.jsonl. `loss` must stay finite. Call it once a step."""
        self.meters.add(scalars)
        if "loss" in scalars:
            bad = ~torch.isfinite(scalars["loss"].detach())
            self.first_bad = torch.where((self.first_bad == 0) & bad, self.current, self.first_bad)
        precision = self.extra.get("precision")
        if precision is not None and precision.scaling and self.due(self.H.steps_per_log):
            self.record(skipped_updates=float(precision.skipped))

    def validated(self, **values: Any) -> None:
        """Write and print the results of a validation at the current step, named val_..."""
        self.record(**values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"validation at step {self.current}: {shown}")

    def record(self, **values: Any) -> None:
        """Write one line of stats.jsonl for the current step, and its curves."""
        if self._files is not None:
            self._files.write_curves(self.current, values)
        self.display.curves(values)

    def _after_step(self) -> None:
        H, shown = self.H, None
        checkpoint = H.steps_per_checkpoint > 0 and self.step % H.steps_per_checkpoint == 0
        if self.due(H.steps_per_log) or checkpoint or self.device.type == "cpu":
            self._check_loss()
        if self.due(H.steps_per_log):
            shown = self._write_log()
        if self.progress is not None:
            self.progress.update(1, shown)
        if distributed.is_main() and self.step == H.train_steps:
            self.display.strips()  # draw strips before the checkpoint, because a resumed run would not draw them
        if checkpoint:
            self.save_checkpoint()

    def _write_log(self) -> dict[str, float]:
        """Write the means since the last call. Returns what the progress bar shows."""
        means, now, (then, step_then) = self.meters.pop_means(), time.monotonic(), self._logged
        self._logged = (now, self.step)
        speed = dict(images_per_second=(self.step - step_then) * self.H.batch_size / max(now - then, 1e-9))
        rate = speed["images_per_second"]
        if self.device.type == "cuda":
            speed["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.record(images=self.step * self.H.batch_size, **means)
        if self._files is not None:
            self._files.write_speed(self.step, speed)
        self.display.dashboard.scalars(self.step, speed)
        state = "running" if self.step < self.H.train_steps else "finished"
        self.display.progress(self.step, state, rate, self.progress)
        shown = {"loss": means["loss"]} if "loss" in means else {}
        return {**shown, "img/s": round(rate, 1)}

    # ------------------------------------------------------------------ what must be finite

    def _check_loss(self) -> None:
        bad = distributed.all_reduce_max(int(self.first_bad))
        if bad:
            batch = f" ({self.name_batch(bad)})" if self.name_batch else ""
            raise UserError(
                f"the loss is not finite at step {bad}{batch}; {self._newest()}. "
                "Lower --lr, train in float32 (--no_amp), or look at these images"
            )

    def _check_weights(self) -> None:
        """Raise UserError if weights are not finite. This check runs before weights are saved. (The loss would become
        infinite only one step later.)"""
        for name, item in self.files.items():
            for key, value in item.state_dict().items() if not is_optimiser(name) else ():
                if value.is_floating_point() and not value.isfinite().all():
                    raise UserError(
                        f"the weights are not finite after step {self.step} ({key} of '{name}'); {self._newest()}. "
                        "Lower --lr, or train in float32 (--no_amp)"
                    )

    def _newest(self) -> str:
        steps = self.store.steps()
        return f"the newest checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"

    # ------------------------------------------------------------------ what is written

    def say(self, message: str) -> None:
        """Print one line on the terminal and append it to log.txt (rank 0 only)."""
        say(message)
        if self._files is not None:
            self._files.write_message(message)

    def _write_config(self, **more: Any) -> None:
        """Write config.json (configuration and facts). A new run writes the file before its first step. A resumed run
        writes the file with its next checkpoint, so that a failed resume changes nothing. more: further JSON values."""
        if distributed.is_main():
            hparams, given = self.H.to_dict(), sorted({*self.H.explicit, *self.H.given_before})
            config = dict(format=1, script=self.H.script, hparams=hparams, digest=hash_json(hparams), facts=self.facts)
            write_json(os.path.join(self.folder, "config.json"), dict(config, given=given, **more))

    def save_checkpoint(self) -> None:
        """Write the checkpoint of the current step, unless a complete one exists."""
        self._check_loss()
        if self._saved_step != self.step:
            self._check_weights()
            extra = {name: item.state_dict() for name, item in self.extra.items()}  # sums over processes
            if self._files is not None:
                self._write_checkpoint(extra, self._files)
            self._saved_step = self.step
        distributed.barrier()

    def _write_checkpoint(self, extra: dict[str, Any], files: RunLogs) -> None:
        files.stats.sync()
        about = dict(stats_bytes=files.stats.size, stats_sha256=files.stats.sha256, run=self.name, script=self.H.script)
        about.update(hparams=self.H.to_dict(), **self.about)
        self.store.save(self.step, {name: item.state_dict() for name, item in self.files.items()}, extra, about)
        self._write_config(checkpoint=self.step)
        if self.H.keep_checkpoints:
            self.store.prune(self.H.keep_checkpoints)

    # ------------------------------------------------------------------ end

    def _again(self) -> str:
        """Return the command line that continues the run."""
        again = commands.resume(self.H.script, vars(self.H), **self.H.given("dashboard"))
        return again or "the same command with --resume"

    def conclude(self, *following: tuple[str, str]) -> None:
        """Print the names of the written files, and the next commands. following: (description, command line)."""
        steps = self.store.steps()
        if not (distributed.is_main() and steps):
            return
        self.say(f"written: checkpoint of step {steps[-1]} in {self.store.models}{self.display.saved()}")
        for what, line in following:
            self.say(f"next, {what}:\n  {line}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, UserError) and self._files is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that is being raised
                self._files.write_message(f"error: {error}")
        if kind is not None:
            state = "stopped, continue with --resume" if kind is SystemExit else "failed"
            self.display.progress(self.step, state, None, self.progress)
        self.display.dashboard.close()
        if self._files is not None:
            self._files.close()
        if self._lock is not None:
            self._lock.release()
        if kind in (None, SystemExit):  # the run has finished, or all processes agreed to stop after a signal
            distributed.cleanup()
            if distributed.is_main():  # the report is last, so that Ctrl-C here loses only the report
                report_at_end(self.folder, say)
        sys.stdout.flush()

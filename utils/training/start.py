"""Chooses the start of a training run. A run starts from its newest checkpoint, from weights that the command line
names, or from new weights."""

from typing import Any

from utils.core import distributed
from utils.core.checkpoint import LOGS, Checkpoints
from utils.core.errors import DamagedFile, UserError
from utils.core.progress import say


def agree_on_steps(H: Any) -> None:
    """Use the main process's choice of the steps that the command line does not give. Without this agreement, processes
    could choose different steps while another run writes new checkpoints."""
    names = [name for name in ("load_step", "ae_load_step") if hasattr(H, name) and name not in H.explicit]
    vars(H).update(distributed.from_main(lambda: {name: getattr(H, name) for name in names}))


def choose_start(H: Any, name: str, load_step: int, store: Checkpoints) -> tuple[int, dict[str, Any] | None, bool]:
    """Return (last completed step, manifest, resumed). manifest: the manifest of this step's checkpoint in the run's
    folder, or None. resumed: whether the run continues from this checkpoint. Raises UserError if the run would
    overwrite another run.

    name: the name of the model's files. load_step: the step of the weights to load, or 0. store: the run's checkpoints.
    """
    folder, steps = store.folder, store.steps()
    config = _recorded_config(store)
    if config.get("script", H.script) != H.script:
        raise UserError(f"{folder} is not a run of this script (but of {config['script']}): give another --log_dir")
    if not steps:
        _refuse_if_lost(store, config)
    if H.resume:
        step, manifest = store.newest_good(lambda message: say(f"warning: {message}"))
        if step is not None:
            return step, manifest, True
        if steps:
            raise UserError(f"no checkpoint in {folder} is complete: start afresh in another --log_dir")
    existing = sorted({*steps, *store.steps_with(name)})
    if load_step and H.load_dir == H.log_dir and load_step in existing[-1:]:
        return load_step, store.verify(load_step) if load_step in steps else None, False
    if existing and not H.resume:
        raise UserError(
            f"{folder} already holds checkpoints (newest: step {existing[-1]}): "
            "--resume continues it, another --log_dir starts afresh"
        )
    # If a run was killed in its first checkpoint, its folder holds weights and config.json. Weights without config.json
    # come from another source.
    if existing and not config:
        raise UserError(
            f"{folder} holds weights (step {existing[-1]}) but nothing else that a resume needs: start "
            f"from them with --load_dir {H.log_dir} --load_step {existing[-1]} and another --log_dir"
        )
    if H.resume:
        start = f"from step {load_step} of {LOGS}/{H.load_dir}" if load_step else "afresh"
        say(f"nothing to resume in {folder}: starting {start}")
    return load_step, None, False


def _recorded_config(store: Checkpoints) -> dict[str, Any]:
    """Return the contents of config.json, or {} if the file does not exist. A damaged file is reported, and is replaced
    later."""
    try:
        return store.config()
    except DamagedFile as error:
        say(f"warning: {error}; it is written again with the next checkpoint")
        return {}


def _refuse_if_lost(store: Checkpoints, config: dict[str, Any]) -> None:
    """Raise UserError if checkpoints are missing, for example because their disk is not mounted."""
    lost = store.lost_steps() + ([config["checkpoint"]] if config.get("checkpoint") else [])
    if lost:
        raise UserError(
            f"{store.folder} had a checkpoint of step {lost[-1]}, which is not in {store.models} now: bring it "
            "back (is its disk mounted?), or start afresh in another --log_dir"
        )

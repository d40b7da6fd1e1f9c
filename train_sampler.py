"""Stage 2: train a prior over the codes of a VQGAN (absorbing diffusion, or autoregressive).

The images are encoded once, into a cache under latents/; training reads codes only.
"""

from hparams import get_hparams

EXAMPLES = """examples:
  python train_sampler.py --sampler absorbing --dataset churches --log_dir absorbing_churches \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --amp --ema
  python train_sampler.py --sampler absorbing --dataset churches --log_dir absorbing_churches \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --resume
"""
if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    H = get_hparams("sampler", "Stage 2: train a prior over the codes of a VQGAN.", epilog=EXAMPLES)

import torch

from experiments.common.codes import cached_codes, decode_batch
from experiments.common.images import load_images
from experiments.common.models import check_autoencoder, dry_run_on_images
from experiments.common.weights import load_autoencoder
from models.build import build_sampler
from models.samplers.base import SamplerLoss
from models.summary import count_parameters
from utils.core import distributed
from utils.core.device import pick_device, send
from utils.core.errors import run_main
from utils.core.seed import StepRandom, sample_uniforms, seed_everything
from utils.data.batches import code_batches, local_batch
from utils.display import commands
from utils.evaluation.weight_files import WEIGHT_FILES
from utils.training import compilation
from utils.training.amp import Precision
from utils.training.ema import EMA
from utils.training.meters import Meters
from utils.training.run import Run

N_SHOWN = 16  # the number of samples on a sheet that training draws


def sampler_step(sampler, optimiser, precision, ids, rng, parts=1):
    """Make one update on ids (B, L) -> SamplerLoss. parts: the number of parts of ids that are computed one after the
    other (--accumulate_steps)."""
    optimiser.zero_grad(set_to_none=True)
    outs = []
    for part, own in zip(ids.chunk(parts), [rng] if parts == 1 else rng.split(parts), strict=True):
        with precision.autocast():
            out = sampler.loss(part, own)
        precision.scale(out.loss / parts).backward()
        outs.append(SamplerLoss(out.loss.detach(), out.bits, out.extra))
    out = outs[0] if parts == 1 else joined(outs)
    distributed.average_gradients(sampler.parameters())
    precision.step(optimiser)
    precision.update()
    sampler.record({k: distributed.all_gather_rows(v) for k, v in out.extra.items()})
    return out


def joined(outs):
    """Join the SamplerLosses of equal parts to the SamplerLoss of the complete batch."""
    extra = {k: torch.cat([out.extra[k] for out in outs]) for k in outs[0].extra}
    return SamplerLoss(torch.stack([out.loss for out in outs]).mean(), torch.cat([out.bits for out in outs]), extra)


def warm_up(H, step):
    """Return the learning rate at a step. The rate rises linearly from 0 to lr over warmup_iters steps."""
    return H.lr * min(1.0, step / H.warmup_iters) if H.warmup_iters else H.lr


@torch.no_grad()
def validate(sampler, ids, H, run, precision):
    """Return the mean loss and the mean bits per token over all validation codes, ids (N, L).

    Every validation draws the same masks, so that two results differ only because the weights differ. Validation does
    not change the training state.
    """
    meters = Meters(run.device)
    sampler.eval()
    for number, batch in enumerate(ids.split(H.batch_size)):
        # Each process takes its rows of each batch and their masks. A network pass has as many rows as in training.
        size = local_batch(H)
        for start in range(run.rank * size, len(batch), run.world_size * size):
            part = batch[start : start + size].to(run.device)
            rng = StepRandom("validation", H.seed, number, device=run.device, at=(start, len(batch)))
            with precision.autocast():
                out = sampler.validation_loss(part, rng)
            meters.add(dict(val_loss=out.loss, val_bits=out.bits.mean()), len(part))
    return meters.pop_means()


def all_codes(H, split, autoencoder, run):
    """Return the codes of a split, (N, L). Training adds codes for --crops, and mirror images for --horizontal_flip."""
    images = load_images(H, split)
    if split == "train":
        run.trains_on(images)
    views, flips = [images], [False]
    if split == "train":
        views += [images.cropped(H.random_crop, number) for number in range(1, H.crops)]
        flips += [True] if H.horizontal_flip else []
    codes = [cached_codes(H, view, split, autoencoder, run.device, run.say, flip) for view in views for flip in flips]
    return torch.cat(codes)


@torch.no_grad()
def show_samples(sampler, best, autoencoder, draws, H, run, precision):
    """If pictures are due, show samples and the statistics of the sampler in training.

    best: the sampler that draws, with averaged weights if the run has them. draws: the random numbers of the samples.
    """
    if not (run.due(H.steps_per_display_output) or run.due(H.steps_per_save_output)):
        return
    best.eval()
    with precision.autocast():
        ids = best.sample(draws, H.temp)
    pictures = decode_batch(autoencoder.model, ids, H, precision)
    run.display.images("samples", pictures, save=run.due(H.steps_per_save_output))
    for name, values in sampler.histories().items():
        run.display.bars(name, values.tolist(), "time step t", "", list(range(1, len(values) + 1)))


def train(H):
    device = pick_device(H.device)
    with Run(H, H.sampler, device) as run:
        precision = Precision(H.amp, H.amp_dtype, device)
        autoencoder = load_autoencoder(H, device, (run.source, run.step) if run.step else None)
        check_autoencoder(run, autoencoder)
        seed_everything("init", H.seed)
        sampler = build_sampler(H).to(device)
        sampler.fixed_shapes = device.type == "cuda"
        optimiser = torch.optim.Adam(sampler.parameters(), lr=H.lr, fused=device.type != "mps")
        ema = EMA(sampler, H.ema_beta, warmup=H.ema_warmup) if H.ema else None
        best = ema.model if ema else sampler
        files = {H.sampler: sampler, f"{H.sampler}_optim": optimiser}
        if ema:
            files[f"{H.sampler}_ema"] = ema
        compilation.compile_model(sampler, H.compile, device, H.train_steps - run.step >= compilation.MANY_STEPS)
        run.restore(files, extra=dict(precision=precision))

        ids = all_codes(H, "train", autoencoder, run)
        val_ids = all_codes(H, "val", autoencoder, run) if H.steps_per_eval else None
        of_validation = 0 if val_ids is None else len(val_ids)
        run.introduce(len(ids), count_parameters(sampler), precision.describe(), "code sequences", of_validation)
        fixed_draws = sample_uniforms(H.seed, range(N_SHOWN), sampler.draws_per_sample(), device)

        for step, batch in run.steps(lambda start: code_batches(ids, H, start)):
            rng = StepRandom("sampler", H.seed, step, device=device, rank=run.rank, world_size=run.world_size)
            lr = optimiser.param_groups[0]["lr"] = warm_up(H, step)
            sampler.train()
            batch = send(batch, device)
            out = sampler_step(sampler, optimiser, precision, batch, rng, H.accumulate_steps)
            if ema and step % H.steps_per_update_ema == 0:
                ema.update(step // H.steps_per_update_ema)
            run.report(loss=out.loss, bits=out.bits.mean(), lr=lr)
            if val_ids is not None and run.due(H.steps_per_eval):
                run.validated(**validate(best, val_ids, H, run, precision))
            show_samples(sampler, best, autoencoder, fixed_draws, H, run, precision)
        if run.step >= H.train_steps:
            conclude(run, H, len(ids))


def conclude(run, H, n_images):
    """Print the next commands. The FID of the paper needs Inception's weights, which may be missing."""
    if WEIGHT_FILES["inception"].exists:
        samples, fid = commands.after_sampler(H, run.step, n_images)
        run.conclude(("samples", samples), ("their FID", fid))
    else:
        samples, distance = commands.after_sampler(H, run.step, n_images, "efficientnet_lite0")
        weights = commands.get_weights("inception")
        run.conclude(
            ("samples", samples),
            ("their distance to the images, with a network that is installed", distance),
            ("the weights that their FID needs", weights),
        )


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else train, H)

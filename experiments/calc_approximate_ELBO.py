"""Computes the likelihood of images as a bound on -log p(x), in nats and in bits per dimension.

-log p(x) <= -log p(x | z) - log p(z), where z are the codes of x. The first term comes from a Gaussian around the
reconstruction. This script fits the variance of the Gaussian (the generator's head `logsigma`). The second term comes
from the prior.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import ModelsConfig
from hparams import get_hparams
from hparams.config import opt
from hparams.sources import LOGS

FIT_STEPS = 10_000
FIT_LR = 1e-4


@dataclass
class ELBOConfig:
    """likelihood"""

    elbo_images: int = opt(None, "validation images, spread evenly over the set (default: all)", min=1)
    elbo_passes: int = opt(
        0,
        "stratified network passes per image for the prior's bound, with less noise per pass; "
        "0: the original's estimator, one pass for each of --total_steps",
        min=0,
        needs="sampler absorbing",
    )
    n_bits: int = opt(5, "bits per subpixel: 5 as in the original, 8 for the usual images", min=1, max=16)


EXAMPLES = f"""examples:
  python experiments/calc_approximate_ELBO.py --sampler absorbing --dataset churches --log_dir nll_churches \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 \\
      --ema --steps_per_eval 5000 --train_steps 10000
  python experiments/calc_approximate_ELBO.py ... --resume --elbo_passes 32 --n_bits 8

Here --train_steps ({FIT_STEPS} unless given), --lr ({FIT_LR:g} unless given) and --batch_size are for the fit of
logsigma. The bound is evaluated every --steps_per_eval steps and at the end. --resume continues a stopped fit. For
a finished fit, --resume only evaluates the bound again.
"""


def settle(H):
    """Set the defaults of the fit, which replace those of the sampler."""
    goes_on = H.resume and (LOGS / H.log_dir / "config.json").is_file()  # then config.json has the values
    for name, value in (("train_steps", FIT_STEPS), ("lr", FIT_LR)):
        if name not in H.explicit and not goes_on:
            setattr(H, name, value)


COMMAND_LINE = dict(
    family="sampler",
    description="Compute a bound on the likelihood of validation images.",
    epilog=EXAMPLES,
    extra=(ELBOConfig, ModelsConfig),
    reads=(
        "resume train_steps lr steps_per_log steps_per_checkpoint keep_checkpoints horizontal_flip visdom_compare"
    ).split(),
    settle=settle,
)
if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import math

import torch

from experiments.common.codes import encode_batch
from experiments.common.images import load_images
from experiments.common.models import check_autoencoder, dry_run_on_images, load_models, note_if_seen
from experiments.common.results import Report
from models.autoencoder import gaussian_nll
from models.summary import count_parameters
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.errors import UserError, run_main
from utils.core.progress import Progress
from utils.core.seed import StepRandom
from utils.data.batches import one_pass, training_batches
from utils.data.pixels import to_float
from utils.training.run import Run

CLIP_NORM = 0.1


def fit_step(models, optimiser, x, latent_shape):
    """Make one update of logsigma on images x (B, C, H, W) in [0, 1]. All weights except logsigma are frozen. Returns
    the mean nats per subpixel, ()."""
    generator, head = models.autoencoder.model.generator, models.autoencoder.model.generator.logsigma
    with torch.no_grad(), models.precision.autocast():
        ids = encode_batch(models.autoencoder.model, x)
        features = generator.features(models.autoencoder.model.embed(ids, *latent_shape))
        mean = generator.blocks[-1](features)
    loss = gaussian_nll(x, mean.float(), head(features.float())).mean() / x[0].numel()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    distributed.average_gradients(head.parameters())
    torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP_NORM)
    optimiser.step()
    return loss.detach()


class Evaluation:
    """Computes the bound for all images of an ImageSet. The prior's part is computed once, because the fit does not
    change the prior."""

    def __init__(self, H, models, images, say):
        self.H, self.models, self.images, self.say = H, models, images, say
        self.nats_z = None

    @torch.no_grad()
    def run(self):
        """Return {name: value} with means over the images and their standard errors (`_se`)."""
        parts = []
        with Progress(len(self.images), "evaluating", "img") as progress:
            for part in distributed.in_order(self._share(progress)):
                parts.append(part)
                progress.update(len(part[0]))
        if self.nats_z is None:
            # Only the main process has parts. The other processes store an empty tensor instead of None, which marks
            # the prior's part as computed.
            self.nats_z = torch.cat([nats_z for _, nats_z in parts]) if parts else torch.empty(0)
        return distributed.from_main(lambda: self.figures(torch.cat([nats_x for nats_x, _ in parts])))

    def _share(self, progress):
        """Yield both parts of the bound, (B,) each in nats, for this process's batches. The prior's part is None if
        this part is known."""
        H, device, precision = self.H, self.models.device, self.models.precision
        model, prior = self.models.autoencoder.model, self.models.sampler.model
        world = distributed.world_size()
        for turn, (x, _) in enumerate(one_pass(self.images, H.batch_size, H.num_workers, shared=True, say=self.say)):
            if not len(x):
                yield None
                continue
            x = to_float(x.to(device))
            ids, nats_z = encode_batch(model, x), None
            with precision.autocast():
                mean, logsigma = model.generator.distribution(model.embed(ids, *H.latent_shape[1:]))
                if self.nats_z is None:
                    rng = StepRandom("elbo", H.seed, turn * world + distributed.rank(), device=device)
                    nats_z = prior.nll(ids, rng, H.elbo_passes, progress.within(len(x) * world)).cpu().double()
            yield gaussian_nll(x, mean.float(), logsigma.float()).cpu().double(), nats_z

    def figures(self, nats_x):
        """Compute the figures to report. nats_x (N,): the images' part of the bound, in nats, for the density of images
        in [0, 1]."""
        H, nats = self.H, nats_x + self.nats_z
        dims = H.n_channels * H.img_size**2
        per_image = dict(nats=nats, nats_x=nats_x, nats_z=self.nats_z)
        per_image["bits_per_dim"] = (nats / math.log(2) + H.n_bits * dims) / dims
        per_image["bits_per_code"] = self.nats_z / (math.log(2) * H.block_size)
        figures = {}
        for name, values in per_image.items():
            figures[name] = float(values.mean())
            figures[f"{name}_se"] = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
        return figures


def main(H):
    if not H.load_step:
        raise UserError("--load_dir must name a trained sampler")
    with Run(H, "logsigma", pick_device(H.device), loads=False) as run:  # --load_step names the sampler
        models = load_models(H)
        images, val_images = (load_images(H, split, hold_out=True) for split in ("train", "val"))
        if H.elbo_images is not None and H.elbo_images < len(val_images):
            val_images = val_images.evenly(H.elbo_images)
        head = models.autoencoder.model.generator.logsigma.requires_grad_(True)
        optimiser = torch.optim.Adam(head.parameters(), lr=H.lr)
        report = Report(H, run.device, run.display.dashboard, autoencoder=models.autoencoder, sampler=models.sampler)
        check_autoencoder(run, models.autoencoder)
        run.about["sampler"] = report.checkpoints["sampler"]
        run.restore(dict(logsigma=head, logsigma_optim=optimiser), extra={})
        optimiser.param_groups[0]["lr"] = H.lr  # --lr can differ from the saved learning rate
        n_val = len(val_images)
        run.introduce(len(images), count_parameters(head), models.precision.describe(), validate=n_val)
        note_if_seen(H, run.say)
        evaluation = Evaluation(H, models, val_images, run.say)

        def evaluate(step):
            figures = evaluation.run()
            count = len(evaluation.nats_z)
            title = (
                f"{count} validation images of '{H.dataset}', logsigma fitted for {step} steps, {H.n_bits}-bit images"
            )
            report.values(title, figures, step=step, images=count)
            return figures

        for step, (x, _) in run.steps(lambda start: training_batches(images, H, start, run.say)):
            loss = fit_step(models, optimiser, to_float(x.to(run.device)), H.latent_shape[1:])
            run.report(loss=loss)
            if run.due(H.steps_per_eval) and step < H.train_steps:
                run.record(**{f"val_{k}": v for k, v in evaluate(step).items() if math.isfinite(v)})
        evaluate(run.step)
        report.conclude()


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)

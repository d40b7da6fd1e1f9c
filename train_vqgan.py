"""Stage 1: train a VQGAN, which turns an image into a small grid of discrete codes and back.

The functions generator_step and discriminator_step hold the arithmetic of a step. The file utils/training/run.py
handles resuming, logging, checkpoints and signals.
"""

from hparams import get_hparams

EXAMPLES = """examples:
  python train_vqgan.py --dataset churches --log_dir vqgan_churches --amp --ema --batch_size 4 --diff_aug
  python train_vqgan.py --dataset custom --custom_dataset_path ~/photos --log_dir vqgan_photos --preset small
  python train_vqgan.py --dataset churches --log_dir vqgan_churches --resume
"""
if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    H = get_hparams("vqgan", "Stage 1: train a VQGAN on images.", epilog=EXAMPLES)

from functools import partial

import torch

from experiments.common.efficientnet import load_distance
from experiments.common.images import load_images, note_images
from experiments.common.pictures import code_means
from experiments.common.weights import load_lpips, note_missing_weights
from hparams.resolve import continues, size_of_stage_2
from models.build import build_vqgan
from models.discriminator import LeCam, adaptive_weight, diff_augment, hinge_discriminator_loss, ramp
from models.layers import in_layout_of, in_parts
from models.quantizers import usage_figures
from models.summary import count_parameters, describe_stage_1, print_dry_run
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.errors import run_main
from utils.core.seed import StepRandom, seed_everything
from utils.data.batches import batch_positions, local_batch, one_pass, training_batches
from utils.data.images import fixed_images
from utils.data.packed import pack
from utils.data.pixels import to_float, to_uint8
from utils.display import commands
from utils.training import compilation
from utils.training.amp import Output, Precision
from utils.training.codebook import Codebook
from utils.training.ema import EMA
from utils.training.meters import CodeUsage, Meters
from utils.training.run import Run

N_FOR_CODES = 256  # the number of images that the picture of the codebook is made from
ADAM_BETA1 = 0.9
CODES_SHOWN = 1 << 15  # a larger codebook has no picture, because a picture takes some 25 KB of memory per code


def generator_step(vqgan, optimiser, precision, H, x, step, rng, parts=1):
    """One update of the autoencoder on images x (B, C, H, W) in [0, 1] (VQGAN, eq. 6 and 7).

    parts: the number of parts that x is split into (--accumulate_steps). The autoencoder and LPIPS process one part at
    a time. The discriminator sees all of x, because its batch norm needs all of x. The adaptive weight also depends on
    all of x.
    Returns (scalars, x_hat (B, C, H, W) detached, quantizers.Quantized).
    """
    with precision.autocast():
        x_hat, quantized = vqgan.ae(x, step=step, rng=rng, parts=parts)
        output = Output(x_hat.float(), precision)
        x_hat = output.value
        nll, l1, perceptual = reconstruction_nll(x, x_hat, vqgan.perceptual, H.perceptual_weight, H.mse_weight, parts)
    gradient = output.gradient(nll)
    loss = nll.detach() + quantized.loss.detach()
    scalars = dict(l1=l1, perceptual=perceptual, nll_loss=nll, codebook_loss=quantized.loss)

    share = ramp(step - H.disc_start_step - H.disc_warmup_steps, H.disc_ramp_steps)
    if share > 0:
        with precision.autocast():
            g_loss = -vqgan.disc(augment(x_hat, H, rng)).float().mean()
        g_gradient = output.gradient(g_loss)
        at_last_layer = output.gradients_at(vqgan.ae.generator.last_layer, gradient, g_gradient)
        d_weight = share * adaptive_weight(at_last_layer[0], at_last_layer[1], H.disc_weight_max)
        gradient = gradient + d_weight * g_gradient
        if precision.scaling:  # an overflow skips the update, so the weight in the loss is set to 0
            d_weight = d_weight.nan_to_num(0.0)
        loss = loss + d_weight * g_loss.detach()
        scalars.update(g_loss=g_loss, d_weight=d_weight)

    optimiser.zero_grad(set_to_none=True)
    output.backward(gradient, quantized.loss)
    distributed.average_gradients(vqgan.ae.parameters())
    precision.step(optimiser)
    return dict(scalars, loss=loss), x_hat.detach(), quantized


def discriminator_step(vqgan, optimiser, precision, H, x, x_hat, rng, lecam=None):
    """One update of the discriminator on images and the same step's reconstructions -> scalars.

    lecam: models.discriminator.LeCam, or None if its weight is 0.
    """
    with precision.autocast():
        real, fake = augment(x, H, rng), augment(x_hat, H, rng)
        # Two separate calls let batch norm see real and fake images apart, as in the published training.
        logits_real, logits_fake = vqgan.disc(real).float(), vqgan.disc(fake).float()
    loss = d_loss = hinge_discriminator_loss(logits_real, logits_fake)
    scalars = dict(d_loss=d_loss)
    if lecam is not None:
        scalars["lecam"] = lecam(logits_real, logits_fake)
        loss = d_loss + H.lecam_weight * scalars["lecam"]
    optimiser.zero_grad(set_to_none=True)
    precision.scale(loss).backward()
    distributed.average_gradients(vqgan.disc.parameters())
    precision.step(optimiser)
    return scalars


def reconstruction_nll(x, x_hat, perceptual, perceptual_weight, mse_weight=0.0, parts=1):
    """Return mean(|x - x_hat| + mse_weight * (x - x_hat)^2 + perceptual_weight * LPIPS(x, x_hat)), and the means of the
    absolute error and of LPIPS, all (). The published models have mse_weight 0.

    perceptual: a callable (x, x_hat) -> (B, 1, 1, 1), or None if the weight is 0. The images are in [0, 1] although
    LPIPS expects [-1, 1], because the published models were trained with images in [0, 1].
    parts: the number of parts of the batch that are computed one after the other (models.layers.in_parts).
    """
    error = x - x_hat
    l1 = error.abs().mean()
    nll = l1 + mse_weight * error.square().mean() if mse_weight else l1
    if perceptual is None:
        return nll, l1, l1.new_zeros(())
    distance = in_parts(parts, perceptual, x, in_layout_of(x, x_hat)).float().mean()
    return nll + perceptual_weight * distance, l1, distance


def augment(x, H, rng):
    """Return the images that the discriminator sees for images x."""
    return diff_augment(x, rng) if H.diff_aug else x


class Training:
    """Holds the state of stage 1: the networks with their optimisers, the averages, and the counts of codes."""

    def __init__(self, H, device, checkpoint):
        """Build everything. checkpoint: the path of the weights that the run loads next; the file may be missing."""
        self.H, self.precision = H, Precision(H.amp, H.amp_dtype, device)
        seed_everything("init", H.seed)
        perceptual = find_perceptual(H, checkpoint)
        self.vqgan = build_vqgan(H, perceptual).to(device, memory_format=memory_format(device))
        adam = partial(torch.optim.Adam, lr=H.lr, betas=(ADAM_BETA1, H.adam_beta2), fused=device.type != "mps")
        self.ae_optim, self.disc_optim = adam(self.vqgan.ae.parameters()), adam(self.vqgan.disc.parameters())
        self.lecam = LeCam().to(device) if H.lecam_weight else None
        self.ema = EMA(self.vqgan, H.ema_beta, (perceptual,), H.ema_warmup) if H.ema else None
        self.best = self.ema.model if self.ema else self.vqgan  # sampling and measuring will use these weights
        self.codebook = Codebook([self.vqgan, self.best] if H.ema else [self.vqgan], H, device)

    def restore(self, run):
        files = dict(vqgan=self.vqgan, ae_optim=self.ae_optim, disc_optim=self.disc_optim)
        if self.ema:
            files["vqgan_ema"] = self.ema
        usage, recent_usage = self.codebook.usage, self.codebook.recent_usage
        extra = dict(precision=self.precision, usage=usage, recent_usage=recent_usage)
        run.restore(files, extra, optional=dict(lecam=self.lecam) if self.lecam else {})
        for optimiser in (self.ae_optim, self.disc_optim):
            optimiser.param_groups[0].update(lr=self.H.lr, betas=(ADAM_BETA1, self.H.adam_beta2))

    def update(self, x, step, rng):
        """One step on images x (B, C, H, W) in [0, 1] -> scalars to report."""
        H, vqgan, precision = self.H, self.vqgan, self.precision
        vqgan.train()
        scalars, x_hat, quantized = generator_step(vqgan, self.ae_optim, precision, H, x, step, rng, H.accumulate_steps)
        # As published, the gradient of the discriminator counts one step before the discriminator learns. With a
        # warm-up, the discriminator learns first.
        if step > H.disc_start_step or (step == H.disc_start_step and H.disc_warmup_steps):
            scalars.update(discriminator_step(vqgan, self.disc_optim, precision, H, x, x_hat, rng, self.lecam))
        precision.update()
        if self.ema and step % H.steps_per_update_ema == 0:
            self.ema.update(step // H.steps_per_update_ema)
        self.codebook.update(quantized.ids, x, step)
        return dict(scalars, mean_distance=quantized.mean_distance, lr=H.lr)


def validate(vqgan, images, H, run, precision, step):
    """Compute means over all validation images. vqgan: the averaged networks if there are any."""
    meters, usage = Meters(run.device), CodeUsage(H.codebook_size, run.device)
    vqgan.eval()
    with torch.no_grad(), precision.autocast():
        for batch, _ in one_pass(images, local_batch(H), H.num_workers, shared=True, say=run.say):
            if not len(batch):
                continue
            x = to_float(batch.to(run.device))
            x_hat, quantized = vqgan.ae(x, step)
            nll, l1, perceptual = reconstruction_nll(
                x, x_hat.float(), vqgan.perceptual, H.perceptual_weight, H.mse_weight
            )
            meters.add(
                dict(val_nll_loss=nll, val_l1=l1, val_perceptual=perceptual, val_codebook_loss=quantized.loss), len(x)
            )
            if quantized.ids is not None:
                usage.add(quantized.ids)
    return {**meters.pop_means(), **usage_figures(usage.pop_counts(), "val_")}


def memory_format(device):
    """Return channels_last for CUDA, the format of tensor cores. On a CPU, a step took 0.39 s instead of 0.35 s."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@torch.no_grad()
def show_pictures(vqgan, fixed, images, H, run, precision):
    """If pictures are due, show `fixed`, uint8 (n, C, H, W), and its reconstructions. At the last step, show the
    picture of the codebook, too."""
    if not (run.due(H.steps_per_display_output) or run.due(H.steps_per_save_output)):
        return
    vqgan.eval()
    with precision.autocast():
        recons = to_uint8(vqgan.ae(to_float(fixed), run.current)[0])
    run.display.comparison("reconstructions", fixed, recons, save=run.due(H.steps_per_save_output))
    if run.current == H.train_steps and H.steps_per_save_output and H.codebook_size <= CODES_SHOWN:
        codes = code_means(vqgan.ae, fixed_images(images, N_FOR_CODES, run.say).to(run.device), H, precision)
        run.display.picture("codebook", codes.sheet(), codes.caption(), min_side=512)


def find_perceptual(H, checkpoint):
    """Return the perceptual distance, or None if its weight is 0. It is LPIPS with VGG16, or a distance between
    features of EfficientNet-Lite0. The weights of VGG16 come from their file, or from the checkpoint that the run loads
    next."""
    if H.perceptual_weight == 0:
        return None
    if H.perceptual_net == "efficientnet_lite0":
        return load_distance()
    otherwise = "; or take a network that needs no download: --perceptual_net efficientnet_lite0; or train without: "
    return load_lpips("vgg", H.perceptual_weights, checkpoint, f"{otherwise}--perceptual_weight 0")


def name_batch(H, images, step):
    """Name the first images of a step's batch, for a message."""
    positions = batch_positions(H.seed, step, H.batch_size, len(images))[:4]
    return "its images begin " + ", ".join(repr(images.name(i)) for i in positions)


def train(H):
    device = pick_device(H.device)
    images = load_images(H, "train")
    validation = load_images(H, "val") if H.steps_per_eval else None
    with Run(H, "vqgan", device, partial(name_batch, H, images)) as run:
        run.trains_on(images)
        training = Training(H, device, run.source.path("vqgan", run.step))
        vqgan, codebook = training.vqgan, training.codebook
        compilation.compile_model(vqgan, H.compile, device, H.train_steps - run.step >= compilation.MANY_STEPS)
        training.restore(run)
        for some, split in ((images, "train"), (validation, "val")):
            if H.cache_images and some:
                pack(some, f"{H.dataset}_{split}", H.num_workers, run.say)
        of_validation = len(validation) if validation else 0
        run.introduce(len(images), count_parameters(vqgan.ae), training.precision.describe(), validate=of_validation)
        fixed = fixed_images(validation or images, 16, run.say).to(device)

        for step, (batch, _) in run.steps(lambda start: training_batches(images, H, start, run.say)):
            x = to_float(batch.to(device, non_blocking=True)).contiguous(memory_format=memory_format(device))
            rng = StepRandom("vqgan", H.seed, step, device=device, rank=run.rank, world_size=run.world_size)
            if step == codebook.quantizer.start_step:
                codebook.place(training_batches(images, H, step, run.say))
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # all steps have the same shapes
                scalars = training.update(x, step, rng)
            run.report(**scalars)
            if run.ends_epoch(len(images)) and step >= codebook.quantizer.start_step:
                counts = codebook.usage.pop_counts()
                run.record(**usage_figures(counts))
                run.display.bars("codebook_usage", counts.tolist(), "code", "uses in an epoch")
            if validation and run.due(H.steps_per_eval):
                run.validated(**validate(training.best, validation, H, run, training.precision, step))
            show_pictures(training.best, fixed, validation or images, H, run, training.precision)
        if run.step >= H.train_steps:
            run.conclude(("a prior over these codes", commands.after_vqgan(H, run.step, **size_of_stage_2(H))))


def dry_run(H):
    with torch.device("meta"):
        vqgan = build_vqgan(H)
    print_dry_run(H, describe_stage_1(H, vqgan.ae, vqgan))
    note_images(H)
    uses_vgg = H.perceptual_weight and H.perceptual_net == "vgg"
    if uses_vgg and not (H.load_step or continues(vars(H))):  # a checkpoint of a VQGAN holds the weights of VGG16, too
        note_missing_weights(H, "vgg")


if __name__ == "__main__":
    run_main(dry_run if H.dry_run else train, H)

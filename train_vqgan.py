"""Stage 1: train a VQGAN, which turns an image into a small grid of discrete codes and back.

The arithmetic of a step is in generator_step and discriminator_step; everything around it (resume,
logging, checkpoints, signals) is in utils/training/run.py.
"""

from hparams import get_hparams

EXAMPLES = """examples:
  python train_vqgan.py --dataset churches --log_dir vqgan_churches --amp --ema --batch_size 4 --diff_aug
  python train_vqgan.py --dataset custom --custom_dataset_path ~/photos --log_dir vqgan_photos --img_size 128
  python train_vqgan.py --dataset churches --log_dir vqgan_churches --resume
"""
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams("vqgan", "Stage 1: train a VQGAN on images.", epilog=EXAMPLES)

import torch

from experiments.common.pictures import code_means
from experiments.common.weights import load_lpips, note_missing_weights
from hparams.resolve import continues
from models.diffaug import diff_augment
from models.losses import adaptive_weight, hinge_discriminator_loss, reconstruction_nll
from models.quantizers import usage_figures
from models.summary import count_parameters, describe_vqgan, print_dry_run
from models.vqgan import VQGAN
from utils.core import distributed
from utils.core.errors import run_main
from utils.core.seed import StepRandom, derive_seed, seed_everything
from utils.data.batches import batch_positions, local_batch, one_pass, training_batches
from utils.data.images import fixed_images, open_images
from utils.data.packed import pack
from utils.data.pixels import to_float, to_uint8
from utils.display import commands
from utils.training import compilation
from utils.training.amp import Precision
from utils.training.ema import EMA
from utils.training.meters import CodeUsage, Meters
from utils.training.run import Run

N_FOR_CODES = 256  # images for the picture of the codebook
CODES_SHOWN = 1 << 15  # of a larger codebook there is no picture: it takes some 25 KB of memory for each code


def generator_step(vqgan, optimiser, precision, H, x, step, rng, parts=1):
    """One update of the autoencoder on images x (B, C, H, W) in [0, 1].

    Each loss is differentiated once, down to the reconstruction; the last layer's gradients, which
    the adaptive weight compares, follow from there by a vector-Jacobian product through one
    convolution, and a single backward pass takes the weighted sum through the autoencoder. So LPIPS
    and the discriminator are back-propagated once a step, not twice.

    parts: of x that go through autoencoder and LPIPS one after the other (--accumulate_steps). The discriminator,
    whose batch norm asks for it, and the adaptive weight see all of x.
    Returns (scalars, x_hat (B, C, H, W) detached, quantizers.Quantized).
    """
    with precision.autocast():
        x_hat, quantized = vqgan.ae(x, step=step, rng=rng, parts=parts)
        x_hat = x_hat.float()
        recon = x_hat.detach().requires_grad_()
        nll, l1, perceptual = reconstruction_nll(x, recon, vqgan.perceptual, H.perceptual_weight, parts)
    (gradient,) = torch.autograd.grad(precision.scale(nll), recon)
    loss = nll.detach() + quantized.loss.detach()
    scalars = dict(l1=l1, perceptual=perceptual, nll_loss=nll, codebook_loss=quantized.loss)

    if step >= H.disc_start_step:
        with precision.autocast():
            g_loss = -vqgan.disc(diff_augment(recon, rng) if H.diff_aug else recon).float().mean()
        (g_gradient,) = torch.autograd.grad(precision.scale(g_loss), recon)
        last_layer = vqgan.ae.generator.last_layer
        at_last_layer = torch.stack(
            [torch.autograd.grad(x_hat, last_layer, g, retain_graph=True)[0] for g in (gradient, g_gradient)]
        )
        d_weight = adaptive_weight(
            *precision.unscaled(distributed.all_reduce_mean(at_last_layer)), maximum=H.disc_weight_max
        )
        gradient = gradient + d_weight * g_gradient
        if precision.scaling:  # where scaled gradients overflow, the update is skipped; the loss is no worse for it
            d_weight = d_weight.nan_to_num(0.0)
        loss = loss + d_weight * g_loss.detach()
        scalars.update(g_loss=g_loss, d_weight=d_weight)

    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward([x_hat, precision.scale(quantized.loss)], [gradient, None])
    distributed.average_gradients(vqgan.ae.parameters())
    precision.step(optimiser)
    return dict(scalars, loss=loss), x_hat.detach(), quantized


def discriminator_step(vqgan, optimiser, precision, H, x, x_hat, rng):
    """One update of the discriminator on images and the same step's reconstructions -> {'d_loss': ()}."""
    with precision.autocast():
        real, fake = (diff_augment(x, rng), diff_augment(x_hat, rng)) if H.diff_aug else (x, x_hat)
        # Two calls, not one on the concatenation: batch norm sees real and fake apart, as published.
        d_loss = hinge_discriminator_loss(vqgan.disc(real).float(), vqgan.disc(fake).float())
    optimiser.zero_grad(set_to_none=True)
    precision.scale(d_loss).backward()
    distributed.average_gradients(vqgan.disc.parameters())
    precision.step(optimiser)
    return dict(d_loss=d_loss)


def validate(vqgan, images, H, run, precision, step):
    """Means over all validation images, with the weights that will be used (EMA where kept)."""
    meters, usage = Meters(run.device), CodeUsage(H.codebook_size, run.device)
    vqgan.eval()
    with torch.no_grad(), precision.autocast():
        for batch, _ in one_pass(images, local_batch(H), H.num_workers, shared=True):
            if not len(batch):
                continue
            x = to_float(batch.to(run.device))
            x_hat, quantized = vqgan.ae(x, step)
            nll, l1, perceptual = reconstruction_nll(x, x_hat.float(), vqgan.perceptual, H.perceptual_weight)
            meters.add(
                dict(val_nll_loss=nll, val_l1=l1, val_perceptual=perceptual, val_codebook_loss=quantized.loss), len(x)
            )
            if quantized.ids is not None:
                usage.add(quantized.ids)
    return {**meters.pop_means(), **usage_figures(usage.pop_counts(), "val_")}


@torch.no_grad()
def place_codes(models, images, H, step, device):
    """At the quantizer's start_step: it places its codes by the latents of the coming batches, so that every code
    starts where there is data. All `models` get the same codes."""
    vectors, wanted, batches = [], 32 * H.codebook_size, training_batches(images, H, step)
    while sum(map(len, vectors)) < wanted:
        z = models[0].ae.encoder(to_float(next(batches)[0].to(device))).float()
        vectors.append(distributed.all_gather_rows(z).permute(0, 2, 3, 1).reshape(-1, H.emb_dim))
    quantizer = models[0].ae.quantize
    if distributed.is_main():  # processors differ, and two k-means need not end alike
        quantizer.place_codes(torch.cat(vectors), derive_seed("kmeans", H.seed))
    distributed.tensors_from_main([quantizer.codebook_weight()])
    share_codes(models, slice(None))


@torch.no_grad()
def restart_codes(models, usage, x, H, step):
    """Every restart_steps of the quantizer: it moves the codes that were not used since the last time onto latents of
    x, the same ones in every process."""
    rng = StepRandom("restart", H.seed, step, device=x.device)
    unused = usage.pop_counts().to(x.device) == 0
    z = distributed.all_gather_rows(models[0].ae.encoder(x).float())
    models[0].ae.quantize.restart_codes(unused, z, rng)
    share_codes(models, unused)


def share_codes(models, rows):
    """Copy these rows of the first model's codebook to the others': an average would follow a jump too slowly."""
    first, *others = (model.ae.quantize.codebook_weight().data for model in models)
    for codebook in others:
        codebook[rows] = first[rows]


def memory_format(device):
    """channels_last is what tensor cores want; on CPUs it measured no faster (0.39 s for 0.35 s a step)."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@torch.no_grad()
def show_pictures(vqgan, fixed, images, H, run, precision):
    """If pictures are due, show `fixed`, uint8 (n, C, H, W), and its reconstructions; at the last step also the picture
    of the codebook."""
    if not (run.due(H.steps_per_display_output) or run.due(H.steps_per_save_output)):
        return
    vqgan.eval()
    with precision.autocast():
        recons = to_uint8(vqgan.ae(to_float(fixed), run.current)[0])
    run.show_comparison("reconstructions", fixed, recons, save=run.due(H.steps_per_save_output))
    if run.current == H.train_steps and H.steps_per_save_output and H.codebook_size <= CODES_SHOWN:
        codes = code_means(vqgan.ae, fixed_images(images, N_FOR_CODES).to(run.device), H, precision)
        run.show_picture("codebook", codes.sheet(), codes.caption(), min_side=512)


def find_perceptual(H, checkpoint):
    """LPIPS with VGG16, from its file or from the checkpoint that is about to be loaded; None where its weight is 0."""
    if H.perceptual_weight == 0:
        return None
    return load_lpips("vgg", H.perceptual_weights, checkpoint, ", or train without: --perceptual_weight 0")


def train(H):
    images = open_images(H, "train")
    validation = open_images(H, "val") if H.steps_per_eval else None

    def name_batch(step):
        positions = batch_positions(H.seed, step, H.batch_size, len(images))[:4]
        return "its images begin " + ", ".join(repr(images.source.name(images.indices[i])) for i in positions)

    with Run(H, "vqgan", name_batch) as run:
        run.trains_on(images)
        device = run.device
        seed_everything("init", H.seed)
        perceptual = find_perceptual(H, run.source.path("vqgan", run.step))
        vqgan = VQGAN(H, perceptual).to(device, memory_format=memory_format(device))
        precision = Precision(H.amp, H.amp_dtype, device)
        fused = device.type != "mps"
        ae_optim = torch.optim.Adam(vqgan.ae.parameters(), lr=H.lr, fused=fused)
        disc_optim = torch.optim.Adam(vqgan.disc.parameters(), lr=H.lr, fused=fused)
        ema = EMA(vqgan, H.ema_beta, shared=(perceptual,)) if H.ema else None
        best = ema.model if ema else vqgan
        models = [vqgan, ema.model] if ema else [vqgan]
        quantizer = vqgan.ae.quantize
        usage, recent_usage = CodeUsage(H.codebook_size, device), CodeUsage(H.codebook_size, device)

        files = dict(vqgan=vqgan, ae_optim=ae_optim, disc_optim=disc_optim)
        if ema:
            files["vqgan_ema"] = ema
        compilation.compile_model(vqgan, H.compile, device, H.train_steps - run.step >= compilation.MANY_STEPS)
        run.restore(files, extra=dict(precision=precision, usage=usage, recent_usage=recent_usage))
        for optimiser in (ae_optim, disc_optim):
            optimiser.param_groups[0]["lr"] = H.lr
        for some, split in ((images, "train"), (validation, "val")):
            if H.cache_images and some:
                pack(some, H, split, run.say)
        run.introduce(len(images), count_parameters(vqgan.ae), precision.describe())
        fixed = fixed_images(validation or images, 16).to(device)

        for step, (batch, _) in run.steps(lambda start: training_batches(images, H, start)):
            if run.due(H.steps_per_log):
                images.share_broken()
            images.check_broken(run.say)
            x = to_float(batch.to(device, non_blocking=True)).contiguous(memory_format=memory_format(device))
            rng = StepRandom("vqgan", H.seed, step, device=device, rank=run.rank, world_size=run.world_size)
            vqgan.train()
            if step == quantizer.start_step:
                place_codes(models, images, H, step, device)

            scalars, x_hat, quantized = generator_step(vqgan, ae_optim, precision, H, x, step, rng, H.accumulate_steps)
            if step > H.disc_start_step:
                scalars.update(discriminator_step(vqgan, disc_optim, precision, H, x, x_hat, rng))
            precision.update()
            if ema and step % H.steps_per_update_ema == 0:
                ema.update()

            if quantized.ids is not None:
                usage.add(quantized.ids)
                recent_usage.add(quantized.ids)
            if quantizer.restart_steps and step % quantizer.restart_steps == 0 and quantized.ids is not None:
                restart_codes(models, recent_usage, x, H, step)
            run.report(**scalars, mean_distance=quantized.mean_distance, lr=ae_optim.param_groups[0]["lr"])
            if precision.scaling and run.due(H.steps_per_log):
                run.record(skipped_updates=float(precision.skipped))
            if run.ends_epoch(len(images)) and step >= quantizer.start_step:
                counts = usage.pop_counts()
                run.record(**usage_figures(counts))
                run.show_bars("codebook_usage", counts.tolist(), "code", "uses in an epoch")
            if validation and run.due(H.steps_per_eval):
                run.record(**validate(best, validation, H, run, precision, step))
                validation.check_all_broken(run.say)
            show_pictures(best, fixed, validation or images, H, run, precision)
        images.check_all_broken(run.say)
        if run.step >= H.train_steps:
            run.conclude(("a prior over these codes", commands.after_vqgan(H, run.step)))


def dry_run(H):
    with torch.device("meta"):
        vqgan = VQGAN(H)
    print_dry_run(H, describe_vqgan(H, vqgan))
    if H.perceptual_weight and not (H.load_step or continues(vars(H))):  # a checkpoint holds them, too
        note_missing_weights(H, "vgg")


if __name__ == "__main__":
    run_main(dry_run if H.dry_run else train, H)

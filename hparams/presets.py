"""Presets, which are sets of defaults with a name. A preset sets only flags that the command line does not give.

Keys: preset name -> family ('vqgan' or 'sampler') -> flag -> value. `--preset` or an entry of datasets.yaml names the
preset. An entry may also have values of its own under `hparams`. Without a preset the flags have their own defaults.
These defaults are the paper's values for LSUN churches.
"""

PAPER_LEVELS = [1, 1, 2, 2, 4]  # published models and runs of earlier versions have this --ch_mult

_PAPER: dict = dict(vqgan=dict(batch_size=3), sampler=dict(batch_size=20, lr=2e-4, warmup_iters=10_000))
_FFHQ = dict(vqgan=_PAPER["vqgan"], sampler=dict(batch_size=20, lr=1e-4, warmup_iters=30_000))
# The demo trains in minutes on two CPU cores. It has 32 x 32 pixels, 8 x 8 codes and no VGG weights.
_DEMO: dict = dict(horizontal_flip=True, ema=True, ema_beta=0.95, steps_per_update_ema=5)
_DEMO.update((f"steps_per_{event}", 250) for event in ("eval", "checkpoint", "display_output", "save_output"))
_DEMO_MODEL = dict(img_size=32, nf=32, ch_mult=[1, 1, 2], res_blocks=1, emb_dim=32, codebook_size=256)
# With codes that follow the latents, a squared error and faster averages, colours are learned early (docs/training.md).
_EARLY_COLOURS = dict(quantizer="ema", codebook_decay=0.95, mse_weight=10.0, adam_beta2=0.99, lr=2e-3, batch_size=8)
_CODES = dict(codebook_init="kmeans", codebook_init_step=150, codebook_restart_steps=25)
_LOSS: dict = dict(perceptual_weight=0.0, ndf=32, disc_start_step=10**9)
# The best samples of the demo's models in 32 network passes (docs/sampling.md).
_FEW_PASSES: dict = dict(sample_order="confidence", sample_schedule="arccos", sample_steps=32, temp=0.7)
_DEMO_PRIOR = dict(bert_n_emb=128, bert_n_head=4, bert_n_layers=6, total_steps=64, **_FEW_PASSES)

# The preset "small" is for some hundred to some ten thousand images, on one GPU or two CPU cores.
_SMALL: dict = dict(horizontal_flip=True, ema=True, steps_per_eval=250, steps_per_checkpoint=500)
_SMALL.update(steps_per_display_output=500, steps_per_save_output=500)
_SMALL_MODEL = dict(img_size=64, nf=32, ch_mult=[1, 1, 2, 2], res_blocks=1, emb_dim=64, codebook_size=256)
_SMALL_PRIOR = dict(bert_n_emb=192, bert_n_head=4, bert_n_layers=6, total_steps=64, **_FEW_PASSES)
_SMALL_PRIOR_LOSS = dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1, batch_size=32, lr=1e-3, warmup_iters=200)

OF_DATA_SETS = ("churches", "bedrooms", "ffhq", "demo")  # a data set of this name has this preset by default
PRESETS: dict[str, dict[str, dict]] = {
    "churches": _PAPER,
    "bedrooms": _PAPER,
    "ffhq": _FFHQ,
    "custom": _PAPER,
    "small": dict(
        vqgan=dict(**_SMALL_MODEL, **_CODES, **_LOSS, **_EARLY_COLOURS, **_SMALL, train_steps=4000),
        sampler=dict(**_SMALL_PRIOR, **_SMALL_PRIOR_LOSS, **_SMALL, train_steps=1500),
    ),
    "demo": dict(
        vqgan=dict(**_DEMO_MODEL, **_CODES, **_LOSS, disc_layers=2, **_EARLY_COLOURS, **_DEMO, train_steps=4000),
        sampler=dict(**_DEMO_PRIOR, **_DEMO, batch_size=32, lr=2e-3, warmup_iters=100, train_steps=2000),
    ),
}

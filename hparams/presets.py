"""Defaults by data set. A preset fills only what the command line leaves unset.

Keys: preset name -> family ('vqgan' or 'sampler') -> flag -> value. An entry of datasets.yaml names a
preset, or carries values of its own under `hparams`; without either the class defaults hold, which
are the paper's values for LSUN churches.
"""

_VQGAN_256 = dict(batch_size=3)
_SAMPLER_256 = dict(batch_size=20, lr=2e-4, warmup_iters=10_000)

PRESETS = {
    "churches": dict(vqgan=_VQGAN_256, sampler=_SAMPLER_256),
    "bedrooms": dict(vqgan=_VQGAN_256, sampler=_SAMPLER_256),
    "ffhq": dict(vqgan=_VQGAN_256, sampler=dict(batch_size=20, lr=1e-4, warmup_iters=30_000)),
    "custom": dict(vqgan=_VQGAN_256, sampler=_SAMPLER_256),
    # Small enough for minutes on two CPU cores: 32 x 32 pixels, 8 x 8 codes, no VGG weights.
    "demo": dict(
        vqgan=dict(
            img_size=32,
            nf=32,
            ch_mult=[1, 1, 2],
            res_blocks=1,
            emb_dim=32,
            codebook_size=256,
            codebook_init="kmeans",
            codebook_init_step=150,
            codebook_restart_steps=25,
            perceptual_weight=0.0,
            ndf=32,
            disc_layers=2,
            disc_start_step=10**9,
            horizontal_flip=True,
            batch_size=16,
            lr=1e-3,
            ema=True,
            ema_beta=0.95,
            steps_per_update_ema=5,
            steps_per_eval=250,
            steps_per_checkpoint=250,
            steps_per_display_output=250,
            steps_per_save_output=250,
        ),
        sampler=dict(
            bert_n_emb=128,
            bert_n_head=4,
            bert_n_layers=6,
            total_steps=64,
            sample_steps=64,
            horizontal_flip=True,
            temp=0.8,
            batch_size=32,
            lr=2e-3,
            warmup_iters=100,
            ema=True,
            ema_beta=0.95,
            steps_per_update_ema=5,
            steps_per_eval=250,
            steps_per_checkpoint=250,
            steps_per_display_output=250,
            steps_per_save_output=250,
        ),
    ),
}

"""The packaged U-Net, of Stable Diffusion's kind, on the embedded pictures.

    python -m seed_jax.train --config configs/tiny_diffusion.py --workdir runs/diffusion \
        --config.autoencoder=runs/autoencoder/model

The packaged one was trained twice, the second time from the first's weights, 80 and 90 minutes on
shared CPU cores. The first run had 4900 steps; its learning rate was higher for longer than here:
it fell towards a config.steps of 8000 up to step 551, of 4000 up to 2086, of 12000 up to 2250, and
of 6200 up to 2644. The second is what stands here, with --config.init=FIRST and a rate that fell
towards a config.steps of 8000 up to step 3601.
"""

from ml_collections import ConfigDict

from configs import tiny_causal_qformer


def get_config() -> ConfigDict:
    config = tiny_causal_qformer.get_config().unlock()
    config.task = "diffusion"
    config.steps = 6200
    config.batch_size = 64
    del config.train_vit, config.first_scale, config.tokenizer
    config.init = ""  # Stable Diffusion directory whose U-Net to go on from; "" begins anew
    config.autoencoder = ""  # directory with a vae/; "" is the packaged one
    config.teacher = ""  # Stable Diffusion directory with a text encoder; "" is the packaged one
    config.remember = True
    config.drop_prompt = 0.1  # share of captions left out, for classifier-free guidance

    config.model = ConfigDict(
        {
            "sample_size": 8,  # latents a side
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (80, 112),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "attention_head_dim": 4,  # heads: diffusers keeps a misnomer
        }
    )
    config.scheduler = ConfigDict(  # of the noise, as in Stable Diffusion 1.4
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
    )
    # Weigh steps of little noise by no more than this over their signal-to-noise ratio
    # (arXiv 2303.09556).
    config.loss = ConfigDict({"min_snr": 5.0})
    config.optimizer.update(
        learning_rate=1e-3,
        warmup_from=1e-5,
        final_learning_rate=1e-6,
        warmup_steps=100,
        weight_decay=0.01,
        b2=0.99,
    )
    config.data.update(max_tags=0, crop_scale=(), flip=False)
    config.log_every = 50
    config.checkpoint_every = 500
    return config.lock()

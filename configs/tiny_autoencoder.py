"""The packaged autoencoder, of Stable Diffusion's kind, on the embedded pictures.

python -m seed_jax.train --config configs/tiny_autoencoder.py --workdir runs/autoencoder

The packaged one took 75 minutes on two CPU cores, behind other jobs; 24.1 dB on the
first 24 pictures of the split 'style'.
"""

from ml_collections import ConfigDict

from configs import tiny_causal_qformer


def get_config() -> ConfigDict:
    config = tiny_causal_qformer.get_config().unlock()
    config.task = "autoencoder"
    config.steps = 3000
    config.batch_size = 16
    del config.init, config.train_vit, config.first_scale, config.tokenizer

    config.model = ConfigDict(
        {
            "sample_size": 64,  # pixels a side
            "block_out_channels": (16, 32, 64, 64),  # a level each; every next one halves the sides
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }
    )
    config.loss = ConfigDict({"divergence": 1e-3})  # weight of the pull to a unit Gaussian
    config.optimizer.update(
        learning_rate=2e-3,
        warmup_from=1e-5,
        final_learning_rate=1e-5,
        warmup_steps=100,
        weight_decay=0.01,
        b2=0.99,
    )
    config.log_every = 50
    config.checkpoint_every = 500
    return config.lock()

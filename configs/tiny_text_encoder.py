"""The packaged text encoder that stage 2 learns from: a small CLIP on the embedded pictures.

    python -m seed_jax.train --config configs/tiny_text_encoder.py --workdir runs/text_encoder
    cp -r runs/text_encoder/model/text_encoder seed_jax/assets/tiny_stable_diffusion/

Made the packaged one in ten minutes on two shared CPU cores: three of ten captions of a training
batch of 256 find their picture.
"""

from ml_collections import ConfigDict

from configs import tiny_causal_qformer


def get_config() -> ConfigDict:
    config = tiny_causal_qformer.get_config().unlock()
    config.task = "text_encoder"
    config.tokenizer = ""  # "" is the packaged CLIP-style one
    config.steps = 300
    config.batch_size = 256
    config.optimizer.learning_rate = 2.5e-3
    del config.init, config.train_vit, config.first_scale

    vit = config.model.vit
    vit.update(depth=2, heads=4)
    config.model = ConfigDict(
        {
            "vit": vit,
            "hidden_size": 128,  # width of the text states
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "contrastive_dim": 128,
        }
    )
    return config.lock()

"""The packaged text encoder that stage 2 learns from: a small CLIP on the embedded pictures.

python -m seed_jax.train --config configs/tiny_text_encoder.py --workdir runs/text_encoder
cp -r runs/text_encoder/model/. seed_jax/assets/tiny_stable_diffusion/
"""

from ml_collections import ConfigDict

from configs import tiny_causal_qformer


def get_config() -> ConfigDict:
    config = tiny_causal_qformer.get_config().unlock()
    config.task = "text_encoder"
    config.tokenizer = ""  # "" is the packaged CLIP-style one
    config.steps = 300
    del config.init, config.train_vit

    vit = config.model.vit
    vit.depth = 2
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

"""Stage 1 on the embedded pictures: minutes on two CPU cores. The ViT trains too.

python -m seed_jax.train --config configs/tiny_causal_qformer.py --workdir runs/causal_qformer
"""

from ml_collections import ConfigDict

from configs import causal_qformer


def get_config() -> ConfigDict:
    config = causal_qformer.get_config().unlock()
    config.steps = 700
    config.batch_size = 128
    config.image_size = 64
    config.precision = "float32"
    config.remat = "none"
    config.unroll = True
    config.train_vit = True
    config.first_scale.update(queries=3.0, words=3.0)
    config.tokenizer = ""

    config.model.vit.update(image_size=64, patch_size=16, width=128, depth=4, heads=2, mlp_dim=512)
    config.model.qformer.update(
        width=128,
        depth=2,
        heads=4,
        mlp_dim=256,
        encoder_width=128,
        dropout=0.0,
        vocab_size=2048,
        max_positions=32,
    )
    config.model.contrastive_dim = 128
    config.model.text_length = 32

    config.loss.min_temperature = 0.01
    config.optimizer.update(
        learning_rate=1.5e-3,
        warmup_from=1e-5,
        final_learning_rate=2.5e-5,
        warmup_steps=50,
        clip_norm=1.0,
        weight_decay=0.1,
        b2=0.98,  # 0.999 looks back further than such a run is long
    )
    config.data.update(
        path="embedded",
        split="train",
        cache=True,
        workers=0,
        max_tags=8,
        drop_caption=0.5,
        crop_scale=(0.7, 1.0),
    )
    config.log_every = 10
    config.checkpoint_every = 100
    config.keep_checkpoints = 2
    return config.lock()

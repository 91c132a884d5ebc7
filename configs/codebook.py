"""Stage 2 at the paper's scale: codebook and reverse Q-Former (SEED, section 3.2).

    python -m seed_jax.train --config configs/codebook.py --workdir runs/codebook \
        --config.data.path=SHARDS --config.init=runs/causal_qformer/model --config.teacher=SD_DIR

Hardware: 64 V100. SD_DIR is a Stable Diffusion 1.x directory or hub name, whose text encoder is the
teacher. Batch size and learning rate are of the follow-up's published code.
"""

from ml_collections import ConfigDict

from configs import causal_qformer


def get_config() -> ConfigDict:
    config = causal_qformer.get_config().unlock()
    config.task = "codebook"
    config.steps = 152_588  # 500 passes over 5M pairs, the published maximum
    config.batch_size = 256 * 64
    config.accumulate = 1  # microbatches of a step, to save memory; the loss stays the batch's own
    config.teacher = "CompVis/stable-diffusion-v1-4"  # "" is the packaged tiny text encoder
    config.remember = False  # run what is frozen once a record, not once a step: one view of each
    # Folders of `seed_jax.tokenize --features`, split by commas and mixed by data.weights, in place
    # of data.path and of running what is frozen.
    config.data.features = ""
    # Stage 1 is frozen and brings its tokenizer.
    del config.train_vit, config.first_scale, config.tokenizer

    config.model = ConfigDict()  # the encoder's sizes come with config.init
    config.model.codebook = ConfigDict(
        {
            "size": 8192,
            "dim": 32,
            "rotation_trick": False,  # gradient by rotation (arXiv 2410.06424)
        }
    )
    config.model.decoder_heads = 12
    config.model.decoder_depth = 4
    config.model.reconstruction = True
    config.model.generation = ConfigDict(
        {
            "kind": "reverse_qformer",
            "queries": 77,  # text states of the teacher
            "depth": 4,
        }
    )

    config.loss = ConfigDict(
        {
            "vq": 5.0,
            "reconstruction": 2.0,
            "generation": 0.5,
            "retrieval": 0.0,  # 1 - cosine of the features that captions are compared with
            "beta": 0.25,
            "legacy_beta": True,  # commitment 1, codebook beta; the formula swaps them
        }
    )
    # Ways to keep codes in use, all off in the published recipe.
    config.codebook_health = ConfigDict(
        {
            "kmeans_batches": 0,  # start codes at k-means centres of so many batches; 0: don't
            "dead_code_threshold": 0.0,  # revive codes below this share of the mean count
            "decay": 0.99,  # of the running counts that usage and revival go by
        }
    )

    config.optimizer.update(
        learning_rate=1e-4, warmup_from=1e-6, final_learning_rate=1e-5, warmup_steps=2000
    )
    return config.lock()

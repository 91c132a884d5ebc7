"""Stage 1 at the paper's scale: the causal Q-Former, contrastive (SEED, section 3.1).

    python -m seed_jax.train --config configs/causal_qformer.py --workdir runs/causal_qformer \
        --config.data.path=SHARDS --config.init=MODEL_DIR

Hardware: 64 V100. Data: 5M image-text pairs (CC3M, Unsplash, COCO). SHARDS is a folder of
ArrayRecord shards or of pictures with captions; MODEL_DIR a causal encoder with BLIP-2's stage-1
weights, or a ViT and a BERT, which BLIP-2 started from (docs/weights.md). The paper gives neither
batch size nor learning rate; those here are of the follow-up's published code.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "causal_qformer"
    config.seed = 0  # of the weights, the data order and dropout
    config.steps = 12_207  # 10 passes over 5M pairs
    config.batch_size = 64 * 64  # pictures in a step, all devices together
    # Microbatches that a step runs one after the other to save memory; all of batch_size stay
    # negatives of each other, at the price of one more forward pass of what trains. 1 runs all at
    # once.
    config.accumulate = 1
    config.image_size = 224  # pixels a side
    # float32, bfloat16, or float16 for V100s, which have no bfloat16: the loss is scaled, and a
    # step that overflows is skipped.
    config.precision = "float16"
    # What the backward pass recomputes to save memory: "none", "dots" (all of a layer but its
    # products with weights) or "full".
    config.remat = "full"
    config.unroll = False  # unroll the loop over layers; worth it for small models on a CPU
    config.mesh = ConfigDict(
        {"data": -1, "fsdp": 1, "tensor": 1}
    )  # devices an axis; -1 takes the rest
    # Model directories to start from, split by commas; where two hold the same, the later one wins.
    # Needed unless the ViT trains. What none of them holds starts from chance.
    config.init = ""
    config.train_vit = False  # the paper keeps the ViT frozen
    config.first_scale = (
        ConfigDict(  # what some weights are first multiplied by if they come from chance
            {
                "queries": 1.0,  # more sharpens the queries' first look at the picture
                "words": 1.0,  # word embeddings; rare words keep theirs
            }
        )
    )
    config.tokenizer = "bert-base-uncased"  # hub name or folder; "" is the packaged small one

    config.model = ConfigDict()
    config.model.vit = ConfigDict(
        {
            "image_size": 224,
            "patch_size": 14,
            "width": 1408,
            "depth": 39,
            "heads": 16,
            "mlp_dim": 6144,
        }
    )
    config.model.qformer = ConfigDict(
        {
            "queries": 32,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "encoder_width": 1408,
            "cross_attention_every": 2,
            "dropout": 0.1,
            "vocab_size": 30_523,  # BERT's, and the [DEC] token that BLIP-2 added
            "max_positions": 512,
        }
    )
    config.model.contrastive_dim = 256  # width of the space pictures and captions share
    config.model.text_length = 32  # tokens a caption is cut to

    config.loss = ConfigDict(
        {
            "label_smoothing": 0.1,
            "min_temperature": 0.0,  # of the learned temperature; 0 leaves it free, as published
        }
    )

    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-5,
            "warmup_from": 3e-7,
            "final_learning_rate": 3e-6,
            "warmup_steps": 2000,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.999,
            "clip_norm": 0.0,  # 0 clips nothing
        }
    )

    config.data = ConfigDict(
        {
            # Folder of pictures with captions, ArrayRecord shards, or "embedded"; several, split by
            # commas, are mixed.
            "path": "",
            "split": "",  # records whose "split" field says so; "" takes all
            # Of several sets, how many rows come from each, such as (2.0, 1.0): one that is small
            # for its weight comes round more often. () takes every record once an epoch.
            "weights": (),
            "cache": False,  # keep decoded pictures in memory
            "workers": 8,  # processes that read ahead; 0 reads in this one
            "max_tags": 0,  # tags drawn onto a caption, for sets that have tags
            "drop_caption": 0.0,  # share of the draws with tags that are tags alone
            "crop_scale": (0.5, 1.0),  # share of the picture that a random crop covers
            "flip": True,  # mirror half of the pictures
            "max_unreadable": 0.01,  # share of pictures that may be unreadable before the run stops
        }
    )

    config.log_every = 50  # steps between lines of metrics
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    return config.lock()

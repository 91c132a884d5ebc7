"""Stage 3 at the paper's scale: SEED-OPT 2.7B (SEED, section 3.3).

    python -m seed_jax.train --config configs/seed_opt.py --workdir runs/seed_opt \
        --config.data.path=SHARDS --config.init=runs/codebook/model --config.opt=OPT_DIR

Hardware: 64 V100 (the paper's took 44 hours). OPT_DIR is OPT-2.7B as transformers saves it, or what
seed_jax.convert made of one. Rank, learning rate and its like are of the follow-up's published
code; the paper gives none. With
--config.codes=CODES, which `seed_jax.tokenize` writes, no picture is read and no ViT runs.
"""

from ml_collections import ConfigDict

from configs import causal_qformer
from seed_jax.data.sequences import CAPTION_PROMPT


def get_config() -> ConfigDict:
    config = causal_qformer.get_config().unlock()
    config.task = "seed_opt"
    config.steps = 20_000
    config.batch_size = 64 * 64  # pictures in a step, all devices together
    config.accumulate = 1  # microbatches of a step, to save memory; the loss stays the batch's own
    config.init = ""  # stage 2's model directory: the tokenizer
    config.opt = (
        "opt-2.7b"  # folder of the base, or its model directory; "" is the packaged tiny one
    )
    config.codes = ""  # what `seed_jax.tokenize` wrote; "" computes codes in the step
    config.train_words = False  # also train the word embeddings of the base
    del config.train_vit, config.first_scale, config.tokenizer, config.loss

    config.model = ConfigDict()  # the base's and tokenizer's sizes come with them
    config.model.code_input = "codebook"  # or "learned": a row for each code, as in SEED-LLaMA
    config.model.dropout = 0.0  # of the base
    config.model.lora = ConfigDict(
        {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.05,
            "targets": ("query", "key", "value", "out", "up", "down"),
        }
    )

    config.sequences = ConfigDict(
        {
            "row_length": 512,  # tokens of a row
            # Pictures with captions packed into it, which don't see each other; those that find no
            # room are left out. 1 packs nothing. A batch has batch_size / per_row rows.
            "per_row": 8,
            "caption_length": 48,  # tokens a caption is cut to
            "prompts": (CAPTION_PROMPT,),  # one of these is drawn to ask for a caption
            "picture_to_text_steps": 10_000,  # phase A; then phase B, in both directions
            "drawing_share": 0.5,  # of phase B's sequences that are text to picture
        }
    )

    config.optimizer.update(
        learning_rate=1.5e-4,
        warmup_from=1e-6,
        final_learning_rate=1.5e-5,
        warmup_steps=600,
        b2=0.95,
        clip_norm=1.0,
    )
    config.data.crop_scale = ()  # the whole picture, resized
    config.data.flip = False
    return config.lock()

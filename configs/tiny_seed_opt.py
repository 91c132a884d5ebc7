"""Stage 3 on the embedded pictures and the packaged tiny OPT, on two CPU cores.

    python -m seed_jax.train --config configs/tiny_seed_opt.py --workdir runs/seed_opt

takes the tokenizer of `bash launch/quickstart.sh out`; --config.init names another.
"""

from ml_collections import ConfigDict

from configs import seed_opt
from seed_jax.data.sequences import CAPTION_PROMPT, QUESTION_PROMPT


def get_config() -> ConfigDict:
    config = seed_opt.get_config().unlock()
    config.init = "out/tokenizer"
    config.steps = 1200
    config.batch_size = 48
    config.image_size = 64
    config.precision = "float32"
    config.remat = "none"
    config.unroll = True
    config.opt = ""

    config.model.lora.update(rank=64, alpha=128.0, dropout=0.0)
    config.model.dropout = 0.1
    config.sequences.update(
        row_length=288,
        per_row=6,
        caption_length=24,
        prompts=(CAPTION_PROMPT, QUESTION_PROMPT.format("What is this?")),
        picture_to_text_steps=300,
        drawing_share=0.5,
    )
    config.optimizer.update(
        learning_rate=4e-3,
        warmup_from=1e-5,
        final_learning_rate=4e-5,
        warmup_steps=20,
    )
    config.data.update(path="embedded", split="train", cache=True, workers=0, crop_scale=(0.8, 1.0))
    config.log_every = 10
    config.checkpoint_every = 250
    config.keep_checkpoints = 2
    return config.lock()

"""The packaged base of the tiny SEED-OPT: a small OPT on the embedded captions and tags.

python -m seed_jax.train --config configs/tiny_opt.py --workdir runs/tiny_opt
cp runs/tiny_opt/model/{config.json,model.safetensors} seed_jax/assets/tiny_opt/

Two CPU cores: about five minutes.
"""

from ml_collections import ConfigDict

from configs import tiny_causal_qformer
from seed_jax.data.sequences import CAPTION_PROMPT, DRAWING_PROMPT, QUESTION_PROMPT


def get_config() -> ConfigDict:
    config = tiny_causal_qformer.get_config().unlock()
    config.task = "language_model"
    config.steps = 800
    config.batch_size = 224  # captions in a step
    config.image_size = 0  # pictures are not read
    config.tokenizer = ""  # "" is the packaged small one
    del config.init, config.train_vit, config.first_scale, config.loss

    config.model = ConfigDict(
        {
            "width": 128,
            "depth": 4,
            "heads": 4,
            "mlp_dim": 512,
            "max_positions": 128,  # tokens of the longest text
            "dropout": 0.1,
        }
    )
    config.sequences = ConfigDict(
        {
            "row_length": 128,  # tokens of a row
            "per_row": 7,  # captions packed into it; those that find no room are left out
            "hinted": 0.5,  # share of the texts that begin with the picture's tags
            # One of these is drawn to stand before the caption.
            "prompts": (
                "",
                CAPTION_PROMPT,
                DRAWING_PROMPT,
                QUESTION_PROMPT.format("What is this?"),
            ),
        }
    )
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=2e-5, b2=0.95)
    config.data.update(max_tags=4, drop_caption=0.1)
    return config.lock()

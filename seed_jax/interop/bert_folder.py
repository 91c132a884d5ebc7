"""BERT in transformers' folders, as what a Q-Former's text tower starts from."""

import re
from pathlib import Path

from seed_jax.cli import UserError
from seed_jax.interop import transformers_folder
from seed_jax.interop.torch_io import StoredTensor
from seed_jax.models.qformer import QFormerConfig

# What the Q-Former takes for granted, and transformers' default.
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
# Of layer norms in files that stem from TensorFlow's, `bert-base-uncased` among them.
OLD_NAMES = {"gamma": "weight", "beta": "bias"}


def read_config(folder: Path) -> QFormerConfig:
    """The sizes, of a Q-Former without queries.

    Raises:
      UserError: no config.json of a BERT there, or of one that is built otherwise.
    """
    file = folder / transformers_folder.CONFIG
    values = transformers_folder.read_config(folder, "bert")
    for name, wanted in FIXED.items():
        if values.get(name, wanted) != wanted:
            raise UserError(f"{file}: {name} is {values[name]!r}; the Q-Former has {wanted!r}")
    try:
        return QFormerConfig(
            queries=0,
            width=values["hidden_size"],
            depth=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            mlp_dim=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            max_positions=values["max_position_embeddings"],
            dropout=values.get("hidden_dropout_prob", 0.1),
            epsilon=values.get("layer_norm_eps", 1e-12),
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error}, which tells a size of the model") from None


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors under BertModel's names; none is read yet.

    Raises:
      UserError: no weights there, or a file is missing or damaged.
    """
    return {_modern(k): v for k, v in transformers_folder.read_tensors(folder).items()}


def _modern(key: str) -> str:
    # A model with a head has the BERT as a part.
    key = key.removeprefix("bert.")
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: OLD_NAMES[m[0]], key)

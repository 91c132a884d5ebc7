"""SEED's losses: pure functions on arrays, computed in float32.

Shapes: B batch, Q queries, T tokens, K code dim, D width, E contrastive width, V ids.
"""

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def contrastive(
    image_BE: Array, text_BE: Array, temperature: Array, *, label_smoothing: float = 0.1
) -> tuple[Array, dict[str, Array]]:
    """Image-text contrastive loss, both directions, over the global batch.

    Under a sharded step the arguments are global arrays, so every device's pairs are negatives of
    every other's, and gradients flow through both sides.

    Source: SEED section 3.1, after BLIP-2 (learned temperature that divides, smoothing 0.1).

    Args:
      image_BE, text_BE: L2-normalised features; row i of both belongs together.
      temperature: scalar, positive.

    Returns:
      The loss and the share of rows whose own partner ranks first, each way.
    """
    scores_BB = jnp.matmul(
        image_BE.astype(jnp.float32),
        text_BE.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,  # else TPUs and newer GPUs round the features
    )
    scores_BB = scores_BB / temperature
    targets_B = jnp.arange(scores_BB.shape[0])
    i2t = matching(scores_BB, label_smoothing=label_smoothing)
    t2i = matching(scores_BB.T, label_smoothing=label_smoothing)
    return (i2t + t2i) / 2, {
        "i2t_accuracy": jnp.mean(jnp.argmax(scores_BB, axis=1) == targets_B),
        "t2i_accuracy": jnp.mean(jnp.argmax(scores_BB, axis=0) == targets_B),
    }


def matching(scores_BB: Array, *, label_smoothing: float) -> Array:
    """Cross-entropy of telling each row's own column, the one of its number, from the others."""
    onehot_BB = jax.nn.one_hot(jnp.arange(scores_BB.shape[0]), scores_BB.shape[1])
    smooth_BB = optax.smooth_labels(onehot_BB, label_smoothing)
    return optax.softmax_cross_entropy(scores_BB, smooth_BB).mean()


def vector_quantization(
    z_BQK: Array, e_BQK: Array, *, beta: float = 0.25, legacy: bool = True
) -> Array:
    """Commitment and codebook terms of VQ-VAE (arXiv 1711.00937).

    Args:
      z_BQK: encoder outputs.
      e_BQK: their code vectors, not detached.
      legacy: weight the commitment term 1 and the codebook term `beta`, as SEED's published
        quantizer does; the paper's formula has them the other way round.
    """
    z_BQK = z_BQK.astype(jnp.float32)
    commitment = jnp.mean((jax.lax.stop_gradient(e_BQK) - z_BQK) ** 2)
    codebook = jnp.mean((e_BQK - jax.lax.stop_gradient(z_BQK)) ** 2)
    return commitment + beta * codebook if legacy else beta * commitment + codebook


def cosine_reconstruction(prediction_BQD: Array, target_BQD: Array) -> Array:
    """Mean of 1 - cosine over positions; no gradient to the target (SEED section 3.2)."""
    prediction_BQD = prediction_BQD.astype(jnp.float32)
    target_BQD = jax.lax.stop_gradient(target_BQD.astype(jnp.float32))
    cosine_BQ = optax.losses.cosine_similarity(prediction_BQD, target_BQD, epsilon=1e-8)
    return jnp.mean(1 - cosine_BQ)


def mean_squared_error(prediction: Array, target: Array) -> Array:
    """Mean squared error of any shape; no gradient to the target."""
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    return jnp.mean((prediction.astype(jnp.float32) - target) ** 2)


def each_token(logits_BTV: Array, ids_BT: Array) -> Array:
    """Cross-entropy of every token but a row's first, given those before it, [B, T - 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV[:, :-1].astype(jnp.float32), jnp.maximum(ids_BT[:, 1:], 0)
    )


def mean_where(losses: Array, counts: Array) -> Array:
    """Mean of the losses at which `counts` is true; 0 if there is none."""
    weights = counts.astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.maximum(weights.sum(), 1.0)

"""Modules with random weights, without their initialisers, which take seconds to compile."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax import model_dir

M = TypeVar("M", bound=nnx.Module)


def random_weights(build: Callable[[], M], deviation: float = 0.2) -> M:
    """What `build` would make, with normal weights, none of them at a value that hides it."""
    rng = np.random.default_rng(0)
    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    weights = {
        name: jnp.asarray(rng.normal(name.endswith("scale"), deviation, a.shape), a.dtype)
        for name, a in model_dir.flat_params(params).items()
    }
    rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest)
    return nnx.merge(graphdef, model_dir.unflatten_params(params, weights), rest)

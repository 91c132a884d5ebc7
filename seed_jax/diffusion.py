"""Generation embeddings to pictures: Stable Diffusion 1.x draws from them instead of text states.

Shapes in names: B batch, H height, W width and C channels of latents, P prompts a picture (the
unconditional one, then its own), S text states, D their width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seed_jax import samplers, sharding
from seed_jax.cli import UserError
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.interop import clip_weights, diffusers_folder
from seed_jax.models import teacher
from seed_jax.models.layers import Array, Compute
from seed_jax.models.stable_diffusion import Autoencoder, UNet
from seed_jax.models.teacher import TextTeacher
from seed_jax.models.tokenizer import GenerationConfig
from seed_jax.samplers import SAMPLERS, Schedule

Sampler = Literal["ddim", "pndm", "dpm"]
GUIDANCE_SCALE = 7.5  # what Stable Diffusion 1.x is usually drawn with


def refuse_one_vector(generation: GenerationConfig, name: str | Path) -> None:
    """Raises a UserError if the tokenizer called `name` makes no text states."""
    if generation.one_vector:
        raise UserError(
            f"{name} makes one image embedding of the codes, for unCLIP; Stable Diffusion 1.x "
            "draws from text states"
        )


def check_width(generation: GenerationConfig, name: str | Path, width: int, diffusion: str) -> None:
    """Raises a UserError if the U-Net of `diffusion` reads states of another width."""
    if generation.output_dim != width:
        raise UserError(
            f"{name} makes generation embeddings {generation.output_dim} wide, but {diffusion} "
            f"draws from {width}; name as --diffusion the one whose text encoder was "
            "config.teacher of its stage 2"
        )


def sample(
    unet: UNet, schedule: Schedule, latents_BHWC: Array, states_BPSD: Array, guidance: Array | float
) -> tuple[Array, tuple[Array, Array]]:
    """Noise to latents of pictures, and what each step made (see `samplers.sample`).

    Args:
      states_BPSD: the states to draw from (P is 1), or the unconditional ones before them (2).
      guidance: how far to go from the unconditional prediction towards the other and beyond.
    """
    batch, prompts, *rest = states_BPSD.shape
    # Both predictions of a picture lie side by side, so that one call makes them all.
    states = states_BPSD.reshape(batch * prompts, *rest)

    def predict_noise(latents_BHWC: Array, timestep: Array) -> Array:
        timesteps = jnp.full((batch * prompts,), timestep)
        noise = unet(jnp.repeat(latents_BHWC, prompts, axis=0), timesteps, states)
        noise_BPHWC = noise.reshape(batch, prompts, *latents_BHWC.shape[1:])
        unconditional, own = noise_BPHWC[:, 0], noise_BPHWC[:, -1]
        return own if prompts == 1 else unconditional + guidance * (own - unconditional)

    return samplers.sample(schedule, latents_BHWC, predict_noise)


def decode(autoencoder: Autoencoder, latents_BHWC: Array, slice_size: int) -> Array:
    """Latents as the U-Net makes them to pictures in [0, 1], so many at a time, [B, 8H, 8W, 3]."""
    scaled_BHWC = latents_BHWC / autoencoder.config.scaling_factor

    def one(latents_HWC: Array) -> Array:
        return autoencoder.decode(latents_HWC[None])[0]

    pictures = jax.lax.map(one, scaled_BHWC, batch_size=min(slice_size, len(latents_BHWC)))
    return jnp.clip(pictures / 2 + 0.5, 0, 1)


class StableDiffusion:
    """A Stable Diffusion 1.x model on every local device; a batch is split among them.

    Attributes:
      width: of the generation embeddings that it draws from.
      size: height and width of its pictures, unless another is asked for.
      name: for messages.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        scheduler: Mapping[str, Any],
        text: tuple[TextTeacher, TextField] | None = None,
        *,
        name: str = "the diffusion model",
        mesh: Mesh | None = None,
    ):
        """Puts the weights on the mesh; see `from_pretrained`.

        Args:
          scheduler: diffusers' config of one.
          text: the text encoder, and what makes its ids; None: only embeddings can be drawn from.
        """
        self.width = unet.config.cross_attention_dim
        self.size = (unet.config.sample_size * autoencoder.config.downsampling,) * 2
        self.name, self._scheduler = name, scheduler
        self._stride, self._channels = autoencoder.config.downsampling, unet.config.in_channels
        self._mesh = mesh or sharding.make_mesh({"data": -1}, jax.local_devices())
        self._field = None
        if text is not None:
            self._text_graphdef, text_state = nnx.split(text[0])
            self._text_state, self._field = self._everywhere(text_state), text[1]
        self._graphdef, state = nnx.split((unet, autoencoder))
        self._state = self._everywhere(state)
        self._draw = jax.jit(self._draw_sharded, static_argnames="slice_size")
        self._encode_text = jax.jit(
            lambda state, ids: nnx.merge(self._text_graphdef, state)(ids).astype(jnp.float32)
        )

    @classmethod
    def from_pretrained(
        cls, path: str = "", *, compute: Compute = Compute(), mesh: Mesh | None = None
    ) -> "StableDiffusion":
        """Loads a directory in diffusers layout, with Flax or safetensors weights; runs no code.

        Args:
          path: a local directory or hub name; '' for the small model that comes with this package.
          compute: the type of the U-Net and text encoder. The autoencoder's is float32 always.
          mesh: of local devices; all of them by default.

        Raises:
          UserError: a part is missing or damaged, or it is not a Stable Diffusion 1.x model.
        """
        unet = diffusers_folder.read_unet(path, compute=compute)
        autoencoder = diffusers_folder.read_autoencoder(path)
        scheduler = diffusers_folder.read_scheduler(path)
        name = path or str(teacher.PACKAGED)
        if autoencoder.config.latent_channels != unet.config.in_channels:
            raise UserError(
                f"{name}: the autoencoder has {autoencoder.config.latent_channels} latent "
                f"channels, the U-Net {unet.config.in_channels}; they do not belong together"
            )
        text = None
        if diffusers_folder.has_text_encoder(path):
            text = _load_text(path, compute)
            if (width := text[0].config.hidden_size) != unet.config.cross_attention_dim:
                raise UserError(
                    f"{name}: the text encoder's states are {width} wide, and the U-Net draws from "
                    f"{unet.config.cross_attention_dim}; they do not belong together"
                )
        return cls(unet, autoencoder, scheduler, text, name=name, mesh=mesh)

    def text_states(self, prompts: Sequence[str]) -> Array:
        """What the model's own text encoder makes of `B` prompts, float32 [B, 77, D].

        Raises:
          UserError: the directory had no text encoder.
        """
        if self._field is None:
            raise UserError(f"{self.name} has no text_encoder/ and tokenizer/ to encode text with")
        ids_BT, _ = self._field.batch(prompts)
        return self._encode_text(self._text_state, self._split(ids_BT))[: len(prompts)]

    def draw(
        self,
        embeddings_BSD: Array | np.ndarray,
        *,
        steps: int = 50,
        guidance_scale: float = GUIDANCE_SCALE,
        scheduler: Sampler = "pndm",
        seed: int = 0,
        first: int = 0,
        negative: Array | np.ndarray | Literal["zeros"] | None = None,
        size: tuple[int, int] | None = None,
        latents_BHWC: Array | np.ndarray | None = None,
        slice_size: int = 4,
    ) -> Array:
        """Draws a picture from each row of generation embeddings (or of text states).

        One compiled call, the loop over the steps inside; compiled anew for another number of
        steps or pictures, or another size.

        Args:
          embeddings_BSD: float [B, 77, D].
          steps: one more for 'pndm', which calls the U-Net twice in its first.
          guidance_scale: at most 1: no guidance, at half the cost.
          scheduler: the sampler; the noise schedule is the model's own.
          seed, first: picture `i` starts from noise that is a function of `seed` and `first + i`
            alone, so that it does not depend on the batch that it is in.
          negative: the unconditional embeddings, [77, D] or [B, 77, D]; by default the model's
            text states of the empty prompt, 'zeros' for zeros.
          size: height and width in pixels.
          latents_BHWC: noise to start from, instead of the seed's.
          slice_size: pictures that a device decodes at a time.

        Returns:
          uint8 [B, height, width, 3].

        Raises:
          UserError: embeddings of another width, an unknown sampler, a size that is no multiple of
            the autoencoder's, no text encoder to make the unconditional embeddings.
        """
        embeddings_BSD = self._checked(embeddings_BSD)
        batch = len(embeddings_BSD)
        if scheduler not in SAMPLERS:
            raise UserError(f"no sampler {scheduler!r}; there are {', '.join(SAMPLERS)}")
        schedule = SAMPLERS[scheduler](self._scheduler, steps)
        if latents_BHWC is None:
            latents_BHWC = self._noise(seed, first, batch, size or self.size)
        states_BPSD = embeddings_BSD[:, None]
        if guidance_scale > 1:
            unconditional = self._unconditional(negative, embeddings_BSD.shape)
            states_BPSD = jnp.stack([unconditional, embeddings_BSD], 1)
        pictures = self._draw(
            self._state,
            schedule,
            jnp.float32(guidance_scale),
            self._split(latents_BHWC),
            self._split(states_BPSD),
            slice_size=slice_size,
        )
        return pictures[:batch]

    def _draw_sharded(
        self,
        state: nnx.State,
        schedule: Schedule,
        guidance: Array,
        latents_BHWC: Array,
        states_BPSD: Array,
        *,
        slice_size: int,
    ) -> Array:
        """Every device draws its own rows, with nothing to tell the others."""
        whole, split = PartitionSpec(), sharding.batch_sharding(self._mesh).spec

        @partial(
            jax.shard_map,
            mesh=self._mesh,
            in_specs=(whole, whole, whole, split, split),
            out_specs=split,
            check_vma=False,
        )
        def draw(
            state: nnx.State,
            schedule: Schedule,
            guidance: Array,
            latents_BHWC: Array,
            states_BPSD: Array,
        ) -> Array:
            unet, autoencoder = nnx.merge(self._graphdef, state)
            latents_BHWC, _ = sample(unet, schedule, latents_BHWC, states_BPSD, guidance)
            pictures = decode(autoencoder, latents_BHWC, slice_size)
            return jnp.round(pictures * 255).astype(jnp.uint8)

        return draw(state, schedule, guidance, latents_BHWC, states_BPSD)

    def _checked(self, embeddings_BSD: Array | np.ndarray) -> Array:
        if embeddings_BSD.ndim != 3 or embeddings_BSD.shape[-1] != self.width:
            raise UserError(
                f"generation embeddings of shape {list(embeddings_BSD.shape)}: {self.name} draws "
                f"from [pictures, 77, {self.width}]; use a tokenizer trained with its text encoder"
            )
        return self._everywhere(jnp.asarray(embeddings_BSD, jnp.float32))

    def _unconditional(
        self, negative: Array | np.ndarray | str | None, shape: tuple[int, ...]
    ) -> Array:
        if isinstance(negative, str):
            if negative != "zeros":
                raise UserError(f"negative is {negative!r}; it can be 'zeros', embeddings or None")
            return jnp.zeros(shape)
        states = self.text_states([""])[0] if negative is None else self._everywhere(negative)
        if states.shape not in (shape, shape[1:]):
            raise UserError(
                f"unconditional embeddings {list(states.shape)} beside generation embeddings "
                f"{list(shape)}; they must be alike"
            )
        return jnp.broadcast_to(
            states.astype(jnp.float32)[None] if states.ndim == 2 else states, shape
        )

    def _noise(self, seed: int, first: int, batch: int, size: tuple[int, int]) -> Array:
        height, width = (side // self._stride for side in size)
        if (height * self._stride, width * self._stride) != tuple(size) or not height * width:
            raise UserError(f"size {size}: height and width must be multiples of {self._stride}")

        def noise_HWC(number: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), number)
            return jax.random.normal(key, (height, width, self._channels))

        return jax.vmap(noise_HWC)(first + jnp.arange(batch))

    def _split(self, array: Array | np.ndarray) -> Array:
        """Rows among the devices, the last repeated to make a number that they divide."""
        missing = -len(array) % self._mesh.size
        padded = jnp.concatenate([array, *[array[-1:]] * missing])
        return jax.device_put(padded, sharding.batch_sharding(self._mesh))

    def _everywhere(self, tree: Any) -> Any:
        """Arrays that may be on one device, on all of the mesh."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))


def _load_text(path: str, compute: Compute) -> tuple[TextTeacher, TextField]:
    encoder = clip_weights.open_text_encoder(path, compute)
    folder, subfolder = teacher.locate(path, "tokenizer")
    tokenizer = load_tokenizer(folder, subfolder=subfolder)
    return encoder, TextField(tokenizer, encoder.config.max_position_embeddings)

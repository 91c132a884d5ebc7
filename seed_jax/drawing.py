"""What commands that draw share: options, a model that fits the tokenizer, sheets of pictures."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from seed_jax import inference
from seed_jax.diffusion import (
    GUIDANCE_SCALE,
    Sampler,
    StableDiffusion,
    check_width,
    refuse_one_vector,
)
from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.samplers import SAMPLERS
from seed_jax.tasks import PRECISIONS

SHEET_PANELS = 8  # side by side, at most
# A small model that is pushed as far as Stable Diffusion oversaturates.
PACKAGED_GUIDANCE_SCALE = 2.0
PANEL_INCHES, GAP_INCHES, LINE_INCHES = 2.0, 0.08, 0.14


class Shown(NamedTuple):
    """Pictures that belong together on a sheet.

    Attributes:
      title: stands over the first of them.
      panels: what stands over a picture -> the picture, uint8 [H, W, 3]; None leaves a gap.
    """

    title: str
    panels: dict[str, np.ndarray | None]


def add_arguments(
    parser: argparse.ArgumentParser, *, steps: int = 50, scheduler: Sampler = "pndm"
) -> None:
    """The options of drawing, with these defaults; see `open_diffusion` and `settings`."""
    group = parser.add_argument_group("how to draw")
    group.add_argument(
        "--diffusion",
        default="",
        metavar="DIR",
        help="Stable Diffusion 1.x, a directory in diffusers layout or a hub name: the one whose "
        "text encoder was config.teacher of stage 2 (default: the small packaged one)",
    )
    group.add_argument(
        "--steps",
        type=inference.positive,
        default=steps,
        metavar="N",
        help=f"of the sampler ({steps})",
    )
    group.add_argument(
        "--scheduler", choices=SAMPLERS, default=scheduler, help=f"sampler ({scheduler})"
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="how far to go beyond what would be drawn from nothing; 1 for no guidance "
        f"({GUIDANCE_SCALE:g}, and {PACKAGED_GUIDANCE_SCALE:g} for the packaged model)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the U-Net, and of a language model (float32)",
    )


def usual_guidance_scale(diffusion: str) -> float:
    """How far to go where nobody says.

    Args:
      diffusion: what `--diffusion` names; '' for the packaged model.
    """
    return GUIDANCE_SCALE if diffusion else PACKAGED_GUIDANCE_SCALE


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say to `StableDiffusion.draw`."""
    guidance_scale = args.guidance_scale
    if guidance_scale is None:
        guidance_scale = usual_guidance_scale(args.diffusion)
    return {
        "steps": args.steps,
        "scheduler": args.scheduler,
        "guidance_scale": guidance_scale,
    }


def open_diffusion(
    args: argparse.Namespace, tokenizer: SeedTokenizer, name: str | Path
) -> StableDiffusion:
    """The diffusion model that the options name, if it draws from this tokenizer's embeddings.

    Args:
      name: what to call the tokenizer.

    Raises:
      UserError: see `StableDiffusion.from_pretrained`; or the two do not fit one another.
    """
    generation = tokenizer.config.generation
    refuse_one_vector(generation, name)
    compute = Compute(PRECISIONS[args.precision])
    diffusion = StableDiffusion.from_pretrained(args.diffusion, compute=compute)
    check_width(generation, name, diffusion.width, diffusion.name)
    return diffusion


def draw_sheet(shown: list[Shown], output: Path) -> None:
    """Draws groups of pictures, all with the same panels, side by side in rows."""
    panels = len(shown[0].panels)
    columns = max(1, SHEET_PANELS // panels)
    rows = -(-len(shown) // columns)
    # Over each picture stand its label and, over the first, a title.
    lines = 2 + max(group.title.count("\n") for group in shown)
    above = lines * LINE_INCHES + GAP_INCHES
    width, height = PANEL_INCHES + GAP_INCHES, PANEL_INCHES + above
    whole_width, whole_height = width * panels * columns, height * rows + GAP_INCHES
    figure = Figure(figsize=(whole_width, whole_height))
    # By hand: to let matplotlib find the places takes as long again as to draw.
    places = {
        "left": GAP_INCHES / whole_width,
        "right": 1,
        "bottom": GAP_INCHES / whole_height,
        "top": 1 - above / whole_height,
        "wspace": GAP_INCHES / PANEL_INCHES,
        "hspace": above / PANEL_INCHES,
    }
    axes = figure.subplots(rows, panels * columns, squeeze=False, gridspec_kw=places)
    for axis in axes.flat:
        axis.set_axis_off()
    for group, row in zip(shown, axes.reshape(-1, panels), strict=False):
        for axis, (label, picture) in zip(row, group.panels.items(), strict=True):
            axis.set_title(label, fontsize=8, loc="left", color="#57606a")
            if picture is not None:
                axis.imshow(picture, interpolation="lanczos")
        # A line above the labels, which a long title would run into.
        row[0].set_title(f"{group.title}\n", fontsize=8, loc="left")
    figure.savefig(output, dpi=100, facecolor="white")

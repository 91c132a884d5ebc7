"""Makes the case `sd_decode`: a small random Stable Diffusion, run by diffusers in PyTorch.

    python tests/golden/make_sd_decode.py FOLDER

The sizes are such that nothing is square, equal by chance, or divided evenly by the downsampling.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

SIZES = {
    "seed": 7,
    "block_out": [8, 12, 16, 16],
    "heads": 2,
    "cross": 12,
    "groups": 4,
    "sample": 8,
    "latent_hw": [6, 10],
    "vae_out": [4, 8, 8, 8],
    "vae_groups": 2,
    "layers": 1,
    "batch": 1,
    "steps": 10,
    "scale": 7.5,
}
# As Stable Diffusion 1.4 has it.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm_leading": (DPMSolverMultistepScheduler, {"timestep_spacing": "leading"}),
}


def main(folder: Path) -> None:
    torch.manual_seed(SIZES["seed"])
    unet, vae = build()
    height, width = SIZES["latent_hw"]
    stride = 2 ** (len(SIZES["vae_out"]) - 1)
    batch, cross = SIZES["batch"], SIZES["cross"]
    inputs = {
        "latents": torch.randn(batch, 4, height, width),
        "cond": torch.randn(batch, 77, cross),
        "uncond": torch.randn(1, 77, cross).expand(batch, -1, -1).contiguous(),
        "unet_sample": torch.randn(3, 4, height, width),
        "unet_timestep": torch.tensor([999, 1, 500]),
        "unet_context": torch.randn(3, 77, cross),
        "vae_latents": torch.randn(batch, 4, height, width),
        "vae_image": torch.rand(batch, 3, height * stride, width * stride) * 2 - 1,
    }
    schedulers = {
        name: kind.from_config({**SCHEDULER, **changes})
        for name, (kind, changes) in SCHEDULERS.items()
    }
    with torch.no_grad():
        outputs = run(unet, vae, schedulers, inputs)
        exact = run(
            copy.deepcopy(unet).double(),
            copy.deepcopy(vae).double(),
            schedulers,
            {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()},
        )

    pipeline = folder / "pipeline"
    shutil.rmtree(pipeline, ignore_errors=True)
    unet.save_pretrained(pipeline / "unet")
    vae.save_pretrained(pipeline / "vae")
    write(pipeline / "scheduler" / "scheduler_config.json", SCHEDULER)
    write(
        folder / "scheduler_configs_resolved.json",
        {
            name: {k: v for k, v in s.config.items() if not k.startswith("_")}
            for name, s in schedulers.items()
        },
    )
    tensors = {f"in/{k}": v for k, v in inputs.items()} | {
        f"out/{k}": v.contiguous() for k, v in outputs.items()
    }
    safetensors.torch.save_file(tensors, folder / "io.safetensors")
    facts = {k: describe(v, exact[k]) for k, v in outputs.items() if k != "alphas_cumprod"}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    write(
        folder / "manifest.json",
        {"case": "sd_decode", "config": SIZES, "produced_with": versions, "outputs": facts},
    )


def build() -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Random models; norms too, which would hide mistakes at ones and zeros."""
    unet = UNet2DConditionModel(
        sample_size=SIZES["sample"],
        block_out_channels=SIZES["block_out"],
        layers_per_block=SIZES["layers"],
        attention_head_dim=SIZES["heads"],
        cross_attention_dim=SIZES["cross"],
        norm_num_groups=SIZES["groups"],
    )
    levels = len(SIZES["vae_out"])
    vae = AutoencoderKL(
        sample_size=SIZES["sample"] * 2 ** (levels - 1),
        block_out_channels=SIZES["vae_out"],
        layers_per_block=SIZES["layers"],
        norm_num_groups=SIZES["vae_groups"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    for name, parameter in [*unet.named_parameters(), *vae.named_parameters()]:
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.normal_(float("norm" in name and name.endswith("weight")), 0.2)
    return unet.eval(), vae.eval()


def run(unet, vae, schedulers, inputs) -> dict[str, torch.Tensor]:
    outputs = unet_parts(unet, inputs)
    outputs["vae_decoded"] = vae.decode(inputs["vae_latents"]).sample
    encoded = vae.encode(inputs["vae_image"]).latent_dist
    outputs |= {"vae_encode_mean": encoded.mean, "vae_encode_logvar": encoded.logvar}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(SIZES["steps"])
        x, latents, noises = inputs["latents"], [], []
        for timestep in scheduler.timesteps:
            states = torch.cat([inputs["uncond"], inputs["cond"]])
            unconditional, own = unet(torch.cat([x, x]), timestep, states).sample.chunk(2)
            noises.append(unconditional + SIZES["scale"] * (own - unconditional))
            x = scheduler.step(noises[-1], timestep, x).prev_sample
            latents.append(x)
        picture = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample
        outputs |= {
            f"{name}/timesteps": scheduler.timesteps.clone(),
            f"{name}/latents": torch.stack(latents),
            f"{name}/guided_eps": torch.stack(noises),
            f"{name}/image": (picture / 2 + 0.5).clamp(0, 1),
        }
    outputs["alphas_cumprod"] = schedulers["ddim"].alphas_cumprod
    return outputs


def unet_parts(unet, inputs) -> dict[str, torch.Tensor]:
    """What comes out of the U-Net and of its parts."""
    parts = {"time_emb": unet.time_embedding, "conv_in": unet.conv_in}
    parts |= {f"down_{i}": block for i, block in enumerate(unet.down_blocks)}
    parts |= {"mid": unet.mid_block}
    parts |= {f"up_{i}": block for i, block in enumerate(unet.up_blocks)}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            outputs[f"unet_act/{name}"] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    call = [inputs[f"unet_{name}"] for name in ("sample", "timestep", "context")]
    outputs["unet_out"] = unet(*call).sample
    for hook in hooks:
        hook.remove()
    return outputs


def describe(value: torch.Tensor, exact: torch.Tensor) -> dict:
    facts = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value.is_floating_point():
        facts["max_abs"] = value.abs().max().item()
        facts["fp64_dev"] = (value.double() - exact).abs().max().item()
    return facts


def write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

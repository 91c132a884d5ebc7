"""Draws pictures from SEED's visual codes with PyTorch and diffusers alone.

    python draw_from_codes.py codes.jsonl pictures/ [--steps 50] [--guidance-scale X]

codes.jsonl has a line like {"image": "cat.png", "codes": [12, 7, ...]} a picture. Beside this file
lie `generation.safetensors`, `generation.json` and `stable_diffusion/`; the second tells sizes and
the guidance scale that suits the model.

Shapes in names: B batch, Q codes a picture, T tokens, D width, G generation embeddings.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).parent


class GenerationEmbeddings:
    """Codes to the embeddings that stand in for a prompt's text states."""

    def __init__(self, folder: Path = HERE):
        self.sizes = json.loads((folder / "generation.json").read_text())
        self.weights = load_file(folder / "generation.safetensors")

    @torch.no_grad()
    def __call__(self, codes_BQ: Tensor) -> Tensor:
        """int64 [B, Q] -> float32 [B, G, D]."""
        x_BQD = F.embedding(codes_BQ, self.weights["quantize.embedding.weight"])
        x_BQD = self._linear("decode_task_layer.0", x_BQD).tanh()
        x_BQD = self._linear("decode_task_layer.2", x_BQD)
        x_BQD = x_BQD + self.weights["pos_embed_text"]
        for i in range(self.sizes["decoder_depth"]):
            x_BQD = self._block(f"blocks_text.{i}", x_BQD)
        y_BGD = self.weights["reverse_tokens"].expand(len(codes_BQ), -1, -1)
        y_BGD = self._norm("Reverse_Qformer.bert.embeddings.LayerNorm", y_BGD)
        for i in range(self.sizes["reverse_depth"]):
            y_BGD = self._reverse_layer(f"Reverse_Qformer.bert.encoder.layer.{i}", y_BGD, x_BQD, i)
        return self._linear("distill_text_proj", y_BGD)

    def _block(self, name: str, x_BTD: Tensor) -> Tensor:
        """A pre-norm transformer block."""
        heads = self.sizes["decoder_heads"]
        h_BTD = self._norm(f"{name}.norm1", x_BTD, 1e-6)
        q, k, v = self._linear(f"{name}.attn.qkv", h_BTD).chunk(3, dim=-1)
        x_BTD = x_BTD + self._linear(f"{name}.attn.proj", attend(q, k, v, heads))
        h_BTD = self._norm(f"{name}.norm2", x_BTD, 1e-6)
        return x_BTD + self._linear(
            f"{name}.mlp.fc2", F.gelu(self._linear(f"{name}.mlp.fc1", h_BTD))
        )

    def _reverse_layer(self, name: str, y_BGD: Tensor, x_BQD: Tensor, number: int) -> Tensor:
        """BERT's layer, some of which also read the codes; normalised after each part."""
        y_BGD = self._attention(f"{name}.attention", y_BGD, y_BGD)
        if number % self.sizes["cross_attention_every"] == 0:
            y_BGD = self._attention(f"{name}.crossattention", y_BGD, x_BQD)
        h_BGD = F.gelu(self._linear(f"{name}.intermediate_query.dense", y_BGD))
        h_BGD = self._linear(f"{name}.output_query.dense", h_BGD)
        return self._norm(f"{name}.output_query.LayerNorm", y_BGD + h_BGD)

    def _attention(self, name: str, y_BTD: Tensor, source_BSD: Tensor) -> Tensor:
        q = self._linear(f"{name}.self.query", y_BTD)
        k, v = (self._linear(f"{name}.self.{part}", source_BSD) for part in ("key", "value"))
        out_BTD = self._linear(f"{name}.output.dense", attend(q, k, v, self.sizes["reverse_heads"]))
        return self._norm(f"{name}.output.LayerNorm", y_BTD + out_BTD)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor, epsilon: float = 1e-12) -> Tensor:
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], scale, shift, epsilon)


def attend(q_BTD: Tensor, k_BSD: Tensor, v_BSD: Tensor, heads: int) -> Tensor:
    """Multi-head attention of all to all, [B, T, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BTD, k_BSD, v_BSD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("codes", type=Path, help="codes.jsonl")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=50)
    embed = GenerationEmbeddings()
    parser.add_argument("--guidance-scale", type=float, default=embed.sizes["guidance_scale"])
    args = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(HERE / "stable_diffusion")
    args.output.mkdir(parents=True, exist_ok=True)
    for line in args.codes.read_text().splitlines():
        entry = json.loads(line)
        picture = pipeline(
            prompt_embeds=embed(torch.tensor([entry["codes"]])),
            negative_prompt="",
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        picture.save(args.output / f"{Path(entry['image']).stem}.png")


if __name__ == "__main__":
    main()

"""Our models against tensors of the original code: by layer and whole, losses and gradients.

    pytest tests/test_parity.py --golden DIR

runs on any directory of the form that tests/golden/README.md describes: every size comes from the
manifests. Tolerances are the data's own and never loosened.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax import losses
from seed_jax.data import transforms
from seed_jax.interop import keys
from seed_jax.interop.state_dict import load
from seed_jax.models import layers
from seed_jax.models.layers import Compute
from seed_jax.models.qformer import QFormerConfig, attention_mask
from seed_jax.models.tokenizer import (
    CausalEncoder,
    EncoderConfig,
    GenerationConfig,
    SeedTokenizer,
    l2_normalize,
)
from seed_jax.models.vit import ViT
from tests.golden_case import Case, matches, read

# The branches of stage 2's training class, both of which lie in its weights.
BRANCHES = {
    "seed1style": ("blocks_text.*", "pos_embed_text", "*_text.bert.*", "*_text", "distill_text_*"),
    "seed2": (
        "blocks_image.*",
        "pos_embed_image",
        "Reverse_Qformer.*",
        "reverse_tokens",
        "distill_image_*",
    ),
}


def numbered(name: str, stacked) -> dict[str, jax.Array]:
    return {f"{name}_{i}": tensor for i, tensor in enumerate(stacked)}


def encode_parts(model: SeedTokenizer, vit_out, case: Case, *, delta_z=0.0, frozen=False):
    """From the ViT's output to the vectors that the decoders read, by the names in the data."""
    image_embeds = model.encoder.ln_vision(vit_out)
    hidden = model.encoder.qformer.hidden_states(image_embeds)
    query_output = jax.lax.stop_gradient(hidden[-1]) if frozen else hidden[-1]
    z = model.code_vectors(query_output) + delta_z
    quant_st, entries, codes = model.codebook.quantize(z)
    vq_loss = losses.vector_quantization(
        z, entries, beta=case.sizes["vq_beta"], legacy=case.sizes["vq_legacy"]
    )
    parts = {
        "vit_out": vit_out,
        "image_embeds": image_embeds,
        "query_output": query_output,
        "z": z,
        "quant_st": quant_st,
        "codes": codes,
        "query_output_up": model.dequantize(quant_st),
    }
    return parts, hidden, entries, vq_loss


def generation_parts(head, x, blocks: str, reverse: str):
    """The generation branch on what the decoders read, by the names in the data."""
    x, outputs = head.decoder(x, outputs=True)
    hidden = head.reverse_qformer.hidden_states(x)
    return {**numbered(blocks, outputs), reverse: hidden[-1]}, hidden


def see(case: Case, encoder: CausalEncoder, image) -> jax.Array:
    """The ViT's output, or the stored one where the ViT was left out."""
    return jnp.asarray(case.io["out/vit_out"]) if image is None else encoder.vit(image)


def test_preprocess(golden):
    folder = golden / "preprocess"
    photos = json.loads((folder / "manifest.json").read_text())["photos"]
    stored = read(folder / "io.safetensors")
    for name, facts in photos.items():
        image = transforms.decode((folder / name).read_bytes())
        sha = hashlib.sha256(image.tobytes()).hexdigest()
        assert sha == facts["sha256_of_decoded_RGB_bytes"], f"{name}: another decoder"
        case = Path(name).stem
        size = stored[f"out/{case}/resized_uint8"].shape[0]
        pixels = transforms.resize(image, size)
        values = jax.jit(transforms.normalize)(pixels[None])[0]
        np.testing.assert_array_equal(pixels, stored[f"out/{case}/resized_uint8"])
        expected = stored[f"out/{case}/pixel_values"].transpose(1, 2, 0)
        limit = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(values, expected, rtol=0, atol=limit)


def test_eva_vit(golden):
    case = Case(golden / "eva_vit")
    config = EncoderConfig(
        vit=case.vit(), qformer=QFormerConfig(queries=1, width=8, depth=1, heads=1)
    )
    table = keys.causal_qformer(config)
    encoder = case.build(CausalEncoder, config, table, zeros=["query_tokens", "Qformer.*"])
    graphdef, params = nnx.split(encoder)

    @jax.jit
    def run(params, image):
        encoder = nnx.merge(graphdef, params)
        vit = encoder.vit

        def branches(x_BTD, block):
            attention = block.attention(block.norm1(x_BTD))
            mlp = block.mlp(block.norm2(x_BTD + attention))
            return x_BTD + attention + mlp, (attention, mlp)

        embed = vit.embed(image)
        _, (attention, mlp) = jax.lax.scan(branches, embed, vit.blocks)
        _, blocks = layers.apply_blocks(vit.blocks, embed, compute=Compute(), outputs=True)
        return {
            "patch_embed": vit.embed_patches(image),
            "embed": embed,
            **{f"{k}_attn": v for k, v in numbered("block", attention).items()},
            **{f"{k}_mlp": v for k, v in numbered("block", mlp).items()},
            **numbered("block", blocks),
            "vit_out": vit(image),
            "ln_vision": encoder.image_states(image),
        }

    grid = case.sizes["interp_grid"]
    other = case.vit(image_size=grid * case.sizes["patch_size"])
    resized = load(
        {k: v for k, v in case.weights.items() if k.startswith("visual_encoder.")},
        keys.eva_vit(other, prefix="visual_encoder."),
        nnx.eval_shape(lambda: ViT(other, compute=Compute(), rngs=nnx.Rngs(0))),
        resize_positions=True,
    )
    positions = {"pos_embed_interpolated": resized.positions[...][None]}
    case.compare(run(params, case.image()), positions)


def test_seed1_tokenizer(golden):
    case = Case(golden / "seed1_tokenizer")
    config = case.tokenizer(
        GenerationConfig(
            queries=case.manifest["num_reverse_token"],
            depth=case.manifest["reverse_layers"],
            output_dim=case.sizes["text_dim"],
        ),
        reconstruction=False,
    )
    table = keys.seed1_tokenizer(config)
    graphdef, params = nnx.split(case.build(SeedTokenizer, config, table))

    def loss(params, delta_z, image, probe):
        model = nnx.merge(graphdef, params)
        vit_out = jax.lax.stop_gradient(see(case, model.encoder, image))
        parts, hidden, entries, vq_loss = encode_parts(model, vit_out, case, delta_z=delta_z)
        x = parts["query_output_up"]
        generated, reverse = generation_parts(model.generation, x, "blocks_text", "reverse_output")
        text_embeds = model.generation.proj(reverse[-1])
        probe_term = jnp.mean(text_embeds * probe)
        total = 5 * vq_loss + 10 * probe_term
        return total, {
            **parts,
            **generated,
            **numbered("qformer_hidden", hidden),
            **numbered("reverse_hidden", reverse),
            "codebook_entry": entries,
            "vq_loss": vq_loss,
            "blocks_text_in": x + model.generation.decoder.positions[...][None],
            "text_embeds": text_embeds,
            "loss_probe_term": probe_term,
            "loss_total": total,
            "vq_loss_nonlegacy": losses.vector_quantization(
                parts["z"], entries, beta=case.sizes["vq_beta"], legacy=False
            ),
        }

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    zeros = jnp.zeros(case.io["out/z"].shape)
    (grads, grad_z), parts = step(params, zeros, case.image(), case.io["in/loss_probe"])
    case.compare(
        parts,
        whole(case, graphdef, params, "text_embeds_from_codes"),
        {"grad/z": grad_z, **case.gradients(grads, table)},
    )


def whole(case: Case, graphdef, params, embeddings: str) -> dict[str, jax.Array]:
    """What users call: pictures to codes, codes to generation embeddings."""

    @jax.jit
    def run(params, image, codes):
        model = nnx.merge(graphdef, params)
        decoded = {embeddings: model.embed(codes)}
        if image is None:
            return decoded
        causal = model.causal_embeddings(image)
        return {"query_output": causal, "codes": model.encode(image), **decoded}

    return run(params, case.image(), case.io["out/codes"])


def test_stage2_training(golden):
    case = Case(golden / "seed2_tokenizer" / "stage2_training")
    computed = []
    for branch in BRANCHES:
        computed += stage2_branch(case, branch, text=branch == "seed1style")
    case.compare(*computed)


def stage2_branch(case: Case, branch: str, *, text: bool) -> list[dict[str, jax.Array]]:
    kind, suffix = ("text", "_text") if text else ("image", "")
    target = case.io["in/clip_text_features" if text else "in/clip_image_embeds"]
    predicted = "text_features_pred" if text else "image_embeds_pred"
    config = case.tokenizer(
        GenerationConfig(
            queries=case.manifest[f"num_reverse_token{suffix}"],
            depth=case.manifest["reverse_layers"],
            output_dim=target.shape[-1],
        )
    )
    table = (keys.seed1_training if text else keys.seed2_tokenizer)(config)
    (other,) = BRANCHES.keys() - {branch}
    weights = {k: v for k, v in case.weights.items() if not matches(k, BRANCHES[other])}
    graphdef, params = nnx.split(case.build(SeedTokenizer, config, table, weights))

    def loss(params, image, target):
        model = nnx.merge(graphdef, params)
        parts, _, _, vq_loss = encode_parts(
            model, see(case, model.encoder, image), case, frozen=True
        )
        x = parts["query_output_up"]
        recon_s, blocks = model.reconstruction(x, outputs=True)
        generated, _ = generation_parts(
            model.generation, x, f"blocks_{kind}", f"reverse_output{suffix}"
        )
        embeds = model.generation(x)
        weighted = {
            "loss_embed": 5 * vq_loss,
            "loss_recon_s": 2 * losses.cosine_reconstruction(recon_s, parts["query_output"]),
            f"loss_distil_{kind}": 0.5 * losses.mean_squared_error(embeds, target),
        }
        total = sum(weighted.values())
        return total, {
            **parts,
            **generated,
            **numbered("blocks", blocks),
            "recon_s": recon_s,
            predicted: embeds,
            **{f"{branch}/{k}": v for k, v in {"loss": total, **weighted}.items()},
        }

    grads, parts = jax.jit(jax.grad(loss, has_aux=True))(params, case.image(), target)
    embeddings = predicted if text else "features_for_decode"
    return [
        parts,
        whole(case, graphdef, params, embeddings),
        case.gradients(grads, table, prefix=f"{branch}/"),
    ]


@pytest.mark.parametrize("name", ["quantizer_image_down", "quantizer_qformer_image"])
def test_seed2_quantizer(golden, name):
    case = Case(golden / "seed2_tokenizer" / name)
    sizes = {"queries": 1, "depth": case.sizes["layers"], "output_dim": case.sizes["image_dim"]}
    if not case.manifest["use_qformer_image"]:
        sizes["kind"] = "image_down"
    config = case.tokenizer(GenerationConfig(**sizes))
    table = keys.seed2_tokenizer(config)
    graphdef, params = nnx.split(case.build(SeedTokenizer, config, table))

    @jax.jit
    def encode(params, image):
        model = nnx.merge(graphdef, params)
        parts, _, _, vq_loss = encode_parts(model, model.encoder.vit(image), case)
        recon_s = model.decode_causal(parts["query_output_up"])
        return {**parts, "vq_loss": vq_loss, "recon_s": recon_s}

    @jax.jit
    def decode(params, codes, random_codes):
        model = nnx.merge(graphdef, params)
        head, x = model.generation, model.dequantize(model.codebook.lookup(codes))
        decoded = {"query_output_up": x, "image_embeds_random_codes": model.embed(random_codes)}
        if head.reverse_qformer is None:
            y, blocks = head.decoder(x, outputs=True)
            decoded |= {**numbered("blocks_image", blocks), "image_down": head.shrink(y)}
        else:
            decoded |= generation_parts(head, x, "blocks_image", "reverse_output")[0]
        return {f"decode/{k}": v for k, v in decoded.items()}

    @jax.jit
    def reconstruct(params, codes):
        return {"recon_s": nnx.merge(graphdef, params).reconstruct_causal(codes)}

    codes = case.io["out/codes"]
    computed = [
        decode(params, codes, case.io["in/random_codes"]),
        whole(case, graphdef, params, "decode/image_embeds"),
    ]
    if case.image() is not None:
        computed += [encode(params, case.image()), reconstruct(params, codes)]
    case.compare(*computed)


def test_stage1_contrastive(golden):
    case = Case(golden / "stage1_contrastive")
    config = case.encoder(contrastive_dim=case.sizes["embed_dim"])
    table = keys.causal_qformer(config)
    graphdef, params = nnx.split(case.build(CausalEncoder, config, table))
    ids, token_mask = case.io["in/input_ids"], case.io["in/attention_mask"].astype(bool)

    def loss(params, gathered, image):
        encoder = nnx.merge(graphdef, params)
        vit_out = jax.lax.stop_gradient(see(case, encoder, image))
        image_embeds = encoder.ln_vision(vit_out)
        image_hidden = encoder.qformer.hidden_states(image_embeds)
        text_hidden = encoder.qformer.hidden_states(text_ids_BT=ids, text_mask_BT=token_mask)
        image_feats = encoder.image_features(image_hidden[-1])
        text_feat = encoder.text_features(ids, token_mask)
        temperature = encoder.temperature[...]
        vision_proj = encoder.vision_proj(image_hidden[-1])
        sim_i2t = image_feats @ text_feat.T / temperature
        if gathered:
            # As across processes in the original: what was gathered from them has no gradient.
            cut = jax.lax.stop_gradient
            i2t, t2i = (
                losses.matching(mine @ cut(theirs).T / temperature, label_smoothing=0.1)
                for mine, theirs in ((image_feats, text_feat), (text_feat, image_feats))
            )
            itc = (i2t + t2i) / 2
        else:
            itc, _ = losses.contrastive(image_feats, text_feat, temperature)
        return itc, {
            "vit_out": vit_out,
            "image_embeds": image_embeds,
            **numbered("image_hidden", image_hidden),
            **numbered("text_hidden", text_hidden),
            "vision_proj": vision_proj,
            "image_feats_all_queries": l2_normalize(vision_proj),
            "image_feats": image_feats[:, None],
            "text_feat": text_feat,
            "sim_i2t": sim_i2t,
            "sim_t2i": sim_i2t.T,
            "loss_itc": itc,
            "multimodal_last_hidden": encoder.qformer(image_embeds, ids, token_mask),
        }

    computed = [masks(case, config.qformer.queries, token_mask)]
    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    for gathered in (False, True):
        grads, parts = step(params, gathered, case.image())
        prefix = "gathered/" if gathered else "full/"
        computed += [parts, case.gradients(grads, table, prefix)]
    case.compare(*computed)


def masks(case: Case, queries: int, token_mask) -> dict[str, np.ndarray]:
    """The masks as the original stores them, 1 where attention may go."""
    prefix = "mask/query_only_"
    alone = [int(name.removeprefix(prefix)) for name in case.manifest["outputs"] if prefix in name]
    allowed = {f"{prefix}{n}": attention_mask(n, None, causal=n == queries) for n in alone}
    allowed["mask/text_only"] = attention_mask(0, token_mask, causal=True)
    allowed["mask/query_and_text"] = attention_mask(queries, token_mask, causal=True)
    return {
        # No mask at all stands for one that allows everything.
        name: np.broadcast_to(True if mask is None else mask, case.io[f"out/{name}"].shape)
        for name, mask in allowed.items()
    }

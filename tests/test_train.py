"""The training loop: both stages end to end, resuming, one compile, and users' mistakes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from flax import nnx
from ml_collections import ConfigDict

from configs import (
    tiny_autoencoder,
    tiny_causal_qformer,
    tiny_codebook,
    tiny_diffusion,
    tiny_text_encoder,
)
from seed_jax import SeedTokenizer, model_dir
from seed_jax.cli import UserError
from seed_jax.diffusion import StableDiffusion
from seed_jax.interop import diffusers_folder
from seed_jax.metrics import MetricsWriter
from seed_jax.models import teacher
from seed_jax.models.stable_diffusion import AutoencoderConfig
from seed_jax.train import parse_flags, train
from tests.pictures import picture

ROOT = Path(__file__).parents[1]
STEPS = 7  # of the shared run


def small(config: ConfigDict, **changes) -> ConfigDict:
    """A recipe cut down to seconds: smaller model, 16 pictures a step."""
    config.unlock()
    config.update(steps=4, batch_size=16, image_size=32, log_every=1, checkpoint_every=100)
    config.unroll = False
    config.data.cache = False
    if "remember" in config:
        config.remember = False  # it takes a pass over the training set
    if "vit" in config.model:
        config.model.vit.update(image_size=32, patch_size=16, width=32, depth=2, mlp_dim=64)
    if "qformer" in config.model:
        config.model.qformer.update(width=32, depth=2, mlp_dim=64, encoder_width=32)
    if "block_out_channels" in config.model:  # of a U-Net or an autoencoder
        channels = config.model.block_out_channels
        config.model.update(block_out_channels=(8,) * len(channels), norm_num_groups=4)
    config.update_from_flattened_dict(changes)
    return config.lock()


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in metrics(workdir)]


# Tests of the run that they share stay together; the others go to any worker.
of_stage1 = pytest.mark.xdist_group("stage1")


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("stage1")
    train(small(tiny_causal_qformer.get_config(), steps=STEPS, checkpoint_every=3), workdir)
    return workdir


def compiles_of(caplog, function: str) -> int:
    return sum(f"Compiling jit({function})" in record.message for record in caplog.records)


@of_stage1
def test_both_stages_and_the_tokenizer_they_make(stage1, tmp_path, caplog):
    first = np.array(losses(stage1))
    assert np.isfinite(first).all()
    assert len(first) == STEPS

    config = small(tiny_codebook.get_config(), init=str(stage1 / "model"), steps=5)
    config.codebook_health.update(kmeans_batches=2, dead_code_threshold=0.05)
    config.remember, config.data.split = True, "style"  # the smallest split
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        train(config, tmp_path)
    assert compiles_of(caplog, "train_step") == 1

    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        parts = [
            row[f"loss_{part}"] for part in ("vq", "reconstruction", "retrieval", "generation")
        ]
        assert all(part > 0 for part in parts)
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert 0 < row["codebook_usage"] <= 1
        assert row["codebook_perplexity"] >= 1
    assert any((tmp_path / "tensorboard").iterdir())

    tokenizer = SeedTokenizer.from_pretrained(tmp_path / "model")
    codes = tokenizer.encode(jnp.zeros((2, 32, 32, 3), jnp.uint8))
    assert codes.shape == (2, 32)
    assert codes.max() < tokenizer.config.codebook.size


def train_until_killed(config: ConfigDict, workdir: Path, at: int) -> None:
    """Trains up to a step whose metrics must be written, and fails there."""

    class Killed(Exception):
        pass

    class Bomb(MetricsWriter):
        def write(self, step, metrics):
            if step == at:
                raise Killed
            super().write(step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seed_jax.train.MetricsWriter", Bomb)
        with pytest.raises(Killed):
            train(config, workdir)


@of_stage1
def test_a_run_killed_in_the_middle_goes_on_bitwise(stage1, tmp_path, caplog):
    config = small(tiny_causal_qformer.get_config(), steps=STEPS, checkpoint_every=3)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        train_until_killed(config, tmp_path, at=5)
        assert compiles_of(caplog, "train_step") == 1
        train(config, tmp_path)
        assert compiles_of(caplog, "train_step") == 2
    assert losses(tmp_path) == losses(stage1)


@of_stage1
def test_a_longer_run_starts_where_a_shorter_one_ended(stage1):
    before = len(losses(stage1))
    train(small(tiny_causal_qformer.get_config(), steps=before + 2), stage1)
    assert [row["step"] for row in metrics(stage1)] == list(range(1, before + 3))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_trains_both_stages(tmp_path, precision):
    first = small(tiny_causal_qformer.get_config(), precision=precision)
    train(first, tmp_path / "1")
    init = str(tmp_path / "1" / "model")
    second = small(tiny_codebook.get_config(), precision=precision, init=init)
    # As published: float16 at its first scale bears no more.
    second.loss.update(reconstruction=2.0, retrieval=0.0)
    second.codebook_health.kmeans_batches = 2
    train(second, tmp_path / "2")
    for workdir in (tmp_path / "1", tmp_path / "2"):
        assert np.isfinite(losses(workdir)).all()
    skipped = [row.get("skipped") for row in metrics(tmp_path / "2")]
    assert skipped == ([0] * 4 if precision == "float16" else [None] * 4)
    check_stored_in(precision, tmp_path / "2/model")


def check_stored_in(precision: str, model: Path) -> None:
    """That the frozen encoder of a tokenizer is stored in this type, and all else in float32."""
    made = SeedTokenizer.from_pretrained(model)
    held = {
        name: array.astype(precision if name.startswith("encoder/") else "float32")
        for name, array in model_dir.flat_params(nnx.state(made, nnx.Param)).items()
    }
    # Of types too.
    assert model_dir.content_hash(held) == model_dir.describe(model)["content_hash"]


def test_the_packaged_stable_diffusion_can_be_trained_again(tmp_path):
    train(small(tiny_text_encoder.get_config()), tmp_path / "text_encoder")
    assert teacher.load_config(str(tmp_path / "text_encoder/model")).hidden_size == 128

    # Of two levels, so that there are 8 x 8 latents, which the U-Net takes, to 16 x 16 pixels.
    levels = {"image_size": 16, "model.block_out_channels": (8, 8)}
    train(small(tiny_autoencoder.get_config(), **levels), tmp_path / "autoencoder")
    autoencoder = str(tmp_path / "autoencoder/model")
    scale = diffusers_folder.read_autoencoder(autoencoder).config.scaling_factor
    assert np.isfinite(scale)
    assert scale not in (1.0, AutoencoderConfig().scaling_factor)

    config = small(
        tiny_diffusion.get_config(),
        autoencoder=autoencoder,
        teacher=str(tmp_path / "text_encoder/model"),
        image_size=16,
    )
    config.remember, config.data.split = True, "style"  # the smallest split
    train(config, tmp_path / "diffusion")
    for stage in ("text_encoder", "autoencoder", "diffusion"):
        assert np.isfinite(losses(tmp_path / stage)).all()
    folder = tmp_path / "diffusion/model"
    check_pytorch_draws_alike(folder, StableDiffusion.from_pretrained(str(folder)))


def check_pytorch_draws_alike(folder: Path, drawer: StableDiffusion) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    side = pipeline.unet.config.sample_size
    assert drawer.size == (side * pipeline.vae_scale_factor,) * 2
    prompts = ["a cat", "a red apple and a green one"]
    states = np.asarray(drawer.text_states(prompts))
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    np.testing.assert_allclose(states, theirs.numpy(), rtol=0, atol=1e-4 * np.abs(states).max())

    latents = np.random.default_rng(0).normal(size=(2, side, side, 4)).astype(np.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompts,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        num_inference_steps=3,
        output_type="np",
    ).images
    ours = np.asarray(drawer.draw(states, steps=3, latents_BHWC=latents))
    assert ours.shape == (2, 16, 16, 3)
    assert ours.dtype == np.uint8
    np.testing.assert_allclose(ours, 255 * drawn, rtol=0, atol=1)


def test_a_config_that_did_not_get_to_train_binds_nobody(tmp_path):
    for seed in (0, 1):
        with pytest.raises(UserError, match="does not fit 8 devices"):
            train(small(tiny_causal_qformer.get_config(), seed=seed, **{"mesh.data": 3}), tmp_path)


@of_stage1
def test_another_config_in_the_same_workdir_is_refused(stage1):
    # What a smaller machine may need is no other config.
    machine = {"data.workers": 3, "data.cache": False, "remat": "full"}
    config = small(tiny_causal_qformer.get_config(), seed=1, **machine)
    with pytest.raises(UserError, match=r"another config .differs in seed."):
        train(config, stage1)
    config = small(tiny_causal_qformer.get_config(), **{"data.flip": False})
    with pytest.raises(UserError, match=r"another config .differs in data."):
        train(config, stage1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "codebok"}, "the stages are causal_qformer, codebook"),
        ({"batch_size": 12}, "can't be split over the mesh's 8 data shards"),
        ({"accumulate": 4}, "8 data shards of 4 microbatches; 32 can"),
        ({"accumulate": 0}, "1 runs the batch at once"),
        ({"log_every": 0}, "config.log_every is 0; it must be 1 or more"),
        ({"batch_size": 0}, "config.batch_size is 0; it must be 1 or more"),
        ({"mesh.tensor": 3}, "does not fit 8 devices"),
        ({"precision": "float8"}, "it can be float32, bfloat16, float16"),
        ({"remat": "some"}, "it can be none, dots, full"),
        ({"train_vit": False}, "config.init must name a model directory"),
        ({"data.split": "nowhere"}, "its splits: concept, style, train"),
        ({"data.path": "nowhere"}, "no such file or folder"),
        ({"model.qformer.vocab_size": 100}, "vocab_size"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, changes, message):
    config = small(tiny_causal_qformer.get_config(), **changes)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "w")


# Training does without PyTorch, and starts twice as fast when transformers leaves it alone. As in
# conftest, XLA compiles quickly what runs shortly.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
ENVIRONMENT = {**os.environ, "USE_TORCH": "0", "XLA_FLAGS": QUICK}


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "seed_jax.train", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def test_an_unknown_key_names_what_exists(tmp_path):
    done = run_cli(
        "--config=configs/tiny_causal_qformer.py", f"--workdir={tmp_path}", "--config.optimzer.b1=1"
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "optimzer" in done.stderr
    assert "optimizer" in done.stderr


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections
def test_a_config_that_is_not_there(tmp_path, monkeypatch):
    command = ["train", "--config=configs/nowhere.py", f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command)
    with (
        flagsaver.flagsaver(),
        pytest.raises(UserError, match=r"configs/nowhere\.py") as error,
    ):
        parse_flags(command)
    assert "\n" not in str(error.value)


def write_captioned(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number, 32))
        (folder / f"{number}.txt").write_text(f"a cat on mat {number}\n")
    return folder


def test_training_on_two_sets(tmp_path):
    sets = [write_captioned(tmp_path / name, count) for name, count in (("a", 20), ("b", 5))]
    done = run_cli(
        f"--workdir={tmp_path / 'w'}",
        "--config=configs/tiny_causal_qformer.py",
        f"--config.data.path={sets[0]},{sets[1]}",
        "--config.data.split=",
        "--config.data.weights=2,1",
        "--config.steps=3",
        "--config.batch_size=9",
        "--config.log_every=1",
        "--config.image_size=32",
        "--config.model.vit.image_size=32",
        "--config.model.vit.depth=1",
        "--config.model.qformer.depth=1",
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "w")] == [1, 2, 3]
    noted = json.loads((tmp_path / "w/config.json").read_text())["data"]
    assert noted["weights"] == [2, 1]


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    arguments = [
        "--config=configs/tiny_causal_qformer.py",
        f"--workdir={tmp_path}",
        "--config.batch_size=8",
        "--config.steps=100000",
        "--config.log_every=1",
        "--config.model.vit.depth=1",
        "--config.model.qformer.depth=1",
    ]
    command = [sys.executable, "-m", "seed_jax.train", *arguments]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    written = tmp_path / "metrics.jsonl"
    while run.poll() is None and not (written.exists() and written.read_text().count("\n") > 2):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGINT
    assert "saved" in out
    stopped = max(row["step"] for row in metrics(tmp_path))
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [stopped]

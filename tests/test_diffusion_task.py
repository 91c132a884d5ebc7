"""What the U-Net learns from: what the frozen parts made of each record, remembered."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from configs import tiny_diffusion
from seed_jax import sharding, state
from seed_jax.data import pipeline, sources
from seed_jax.tasks.autoencoder import to_signed
from seed_jax.tasks.diffusion import Diffusion
from tests.pictures import write_folder
from tests.tiny_diffusion import save_stable_diffusion

RECORDS, BATCH, SIDE = 10, 4, 12


def test_each_record_is_remembered_at_its_own_place(tmp_path):
    folder = str(save_stable_diffusion(tmp_path / "sd"))
    config = tiny_diffusion.get_config().unlock()
    config.update(autoencoder=folder, teacher=folder, batch_size=BATCH, image_size=SIDE)
    config.model.update(block_out_channels=(8, 8), norm_num_groups=4)
    config.data.update(path=str(write_folder(tmp_path / "pictures", RECORDS)), split="")
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    task = Diffusion(config)
    source = sources.open_source(config.data.path, "")
    batches = pipeline.train_pipeline(
        source,
        batch_size=BATCH,
        image_size=SIDE,
        texts=task.text_fields(),
        data=config.data,
        seed=0,
        put=partial(sharding.put_batch, mesh=mesh),
    )
    graphdef, init, _, _ = state.lazily(task, config, mesh)
    current = init()
    model = nnx.merge(graphdef, current.params, current.rest)
    task.prepare(model, batches)
    batches.close()

    whole = pipeline.eval_batches(
        source, batch_size=RECORDS, image_size=SIDE, texts=task.text_fields()
    )
    batch = next(whole)
    whole.close()
    mean, logvar = model.autoencoder.encode(to_signed(batch["image"]))
    states = model.teacher(batch["prompt"]).astype(np.float16)
    assert np.std(mean, axis=0).min() > 1e-3  # no record like another
    known = model.memory.lookup(batch["index"])
    for name, rows in {"mean": mean, "logvar": logvar, "states": states}.items():
        np.testing.assert_allclose(known[name], rows, rtol=2e-3, atol=1e-4)

"""What clusters and disks do to runs, done to them for real; test_hosts has several processes."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny_causal_qformer
from seed_jax.checkpoint import Checkpoints
from seed_jax.cli import UserError
from seed_jax.data import pipeline, sources
from seed_jax.train import train
from tests.test_train import losses, metrics, small


def tree(step: int) -> dict[str, jax.Array]:
    """Stands for a training state: large and small arrays, other ones each step."""
    rng = np.random.default_rng(step)
    big, small = rng.normal(size=(64, 256)), rng.normal(size=3)
    return jax.tree.map(jax.numpy.float32, {"big": big, "small": small, "step": step})


def restore(folder: Path):
    checkpoints = Checkpoints(folder, keep=3)
    like = tree(0)
    try:
        return checkpoints.restore(like, jax.tree.map(lambda a: a.sharding, like))
    finally:
        checkpoints.close()


def assert_is(found, step: int) -> None:
    assert found.step == step
    assert found.data == [{"batch": step}]
    jax.tree.map(np.testing.assert_array_equal, found.state, tree(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints 1, 2 and 3 of a run."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {"batch": step})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("left", [0.5, None], ids=["cut short", "gone"])
def test_no_damage_to_a_checkpoint_goes_unnoticed(saved, tmp_path, capsys, left):
    names = [str(f.relative_to(saved)) for f in sorted((saved / "3").rglob("*")) if f.is_file()]
    needless = {"3/_CHECKPOINT_METADATA", "3/commit_success.txt"}
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(saved, folder)
        if left is None:
            (folder / name).unlink()
        else:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: int(left * len(content))])
        assert_is(restore(folder), 3 if name in needless else 2)
        if name not in needless:
            warning = capsys.readouterr().err
            assert warning.count("\n") == 1, warning
            assert "warning: checkpoint 3 can't be read" in warning
            assert (folder.parent / "damaged_checkpoint_3").is_dir()
            assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_checkpoints_that_are_all_damaged_are_not_taken_for_a_new_run(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for manifest in folder.glob("*/state/manifest.ocdbt"):
        manifest.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint can be read .3: .* move the folder away"):
        restore(folder)
    assert len(list(folder.iterdir())) == 3


def test_a_checkpoint_that_finds_no_room_is_not_taken_for_damaged(saved, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)

    def too_large(self, step, target):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")

    monkeypatch.setattr(Checkpoints, "_read", too_large)
    with pytest.raises(UserError, match=r"checkpoints/3 needs more memory .*config\.mesh\.fsdp"):
        restore(folder)
    monkeypatch.undo()
    assert_is(restore(folder), 3)


def test_what_a_kill_left_half_written_is_no_checkpoint(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    half = folder / "4.orbax-checkpoint-tmp-0"
    shutil.copytree(folder / "3" / "state" / "d", half / "state" / "d")
    assert_is(restore(folder), 3)
    began = time.monotonic()
    while half.exists():  # orbax takes it away in the background
        assert time.monotonic() < began + 60
        time.sleep(0.1)


# In a process of its own: when orbax gives up, it leaves behind writes under way, which fail later.
FULL = """
import resource, sys
from pathlib import Path
from configs import tiny_causal_qformer
from seed_jax.cli import UserError
from seed_jax.train import train
from tests.test_train import small

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
try:
    train(small(tiny_causal_qformer.get_config(), steps=6, checkpoint_every=2), Path(sys.argv[1]))
except UserError as error:
    print(f"told: {error}")
"""


def test_a_full_disk_stops_with_one_line_and_the_last_checkpoint_whole(tmp_path):
    config = small(tiny_causal_qformer.get_config(), steps=3, checkpoint_every=2)
    train(config, tmp_path / "w")
    longer = small(tiny_causal_qformer.get_config(), steps=6, checkpoint_every=2)
    command = [sys.executable, "-c", FULL, str(tmp_path / "w")]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    _, _, told = run.stdout.partition("told: ")
    assert "make room, and the same command goes on from step 3" in told, run.stderr
    assert told.count("\n") == 1
    assert told.endswith("\n")
    assert sorted(path.name for path in (tmp_path / "w/checkpoints").iterdir()) == ["2", "3"]
    train(longer, tmp_path / "w")
    assert len(losses(tmp_path / "w")) == 6


def test_a_loss_that_is_not_a_number_names_step_and_records(tmp_path):
    config = small(tiny_causal_qformer.get_config(), checkpoint_every=1, keep_checkpoints=9)
    config.optimizer.unlock().update(learning_rate=1e30, warmup_from=1e30, clip_norm=0.0)
    with pytest.raises(UserError, match=r"step \d+: .*(nan|inf)") as e:
        train(config, tmp_path)
    file = next(tmp_path.glob("not_finite_*.json"))
    told = json.loads(file.read_text())
    assert f"step {told['step']}: " in str(e.value)
    assert str(file) in str(e.value)

    source = sources.open_source(config.data.path, config.data.split)
    batches = pipeline.train_pipeline(
        source, batch_size=16, image_size=32, texts={}, data=config.data, seed=config.seed
    )
    batch = [next(batches) for _ in range(told["step"])][-1]
    assert told["records"] == [source[index]["id"] for index in batch["index"]]
    assert all(name in str(e.value) for name in told["records"][:3])
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(steps, default=0) == told["step"] - 1
    assert told["step"] > 1
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, told["step"]))
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("elsewhere, process 7", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_workdir_has_one_run_and_a_killed_one_leaves_it(tmp_path):
    config = small(tiny_causal_qformer.get_config(), batch_size=12)  # gets no further than this
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"in use by another run .elsewhere, process 7."):
            train(config, tmp_path)
        assert not (tmp_path / "config.json").exists()
        run.kill()
        run.wait()
    with pytest.raises(UserError, match="can't be split over"):
        train(config, tmp_path)

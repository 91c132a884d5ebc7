"""Several processes: how they find one another, and real ones, stopped, killed and hung."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from configs import tiny_causal_qformer, tiny_codebook, tiny_seed_opt
from seed_jax import SeedTokenizer, hosts
from seed_jax.cli import UserError
from seed_jax.data.batches import state_of_host
from seed_jax.data.sources import open_source, write_array_record
from seed_jax.seed_opt import load_language_model
from seed_jax.train import train
from tests import stages
from tests.test_train import ENVIRONMENT, ROOT, losses, metrics, small

EXPLICIT = {"coordinator": "node001:8476", "num_processes": 4, "process_id": 2}
JOBSET = {
    "JAX_COORDINATOR_ADDRESS": "seed-hosts-0-0.seed:8476",
    "JAX_NUM_PROCESSES": "8",
    "JOB_COMPLETION_INDEX": "5",
}
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("flags", "environ", "found"),
    [
        ({}, {}, None),
        ({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, {"JOB_COMPLETION_INDEX": "3"}, None),  # an indexed job of runs of one process
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (EXPLICIT, {}, ("node001:8476", 4, 2)),
        (EXPLICIT, JOBSET, ("node001:8476", 4, 2)),
        ({"process_id": 0}, JOBSET, ("seed-hosts-0-0.seed:8476", 8, 0)),
        ({}, JOBSET, ("seed-hosts-0-0.seed:8476", 8, 5)),
        ({}, SLURM | {"JAX_COORDINATOR_ADDRESS": "node1:9"}, ("node1:9", 8, 3)),
        ({}, SLURM, ()),
        ({}, {"TPU_WORKER_HOSTNAMES": "t0,t1"}, ()),
        ({"discover": True}, {}, ()),
    ],
)
def test_how_processes_find_one_another(flags, environ, found):
    known = hosts.find(flags, environ)
    if not found:  # by itself, or by what JAX finds out
        assert known == (None if found is None else {})
    else:
        names = ("coordinator_address", "num_processes", "process_id")
        assert tuple(known[name] for name in names) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes and --process_id must be given too"),
        ({"num_processes": 2}, "--coordinator and --process_id must be given too"),
        (EXPLICIT | {"coordinator": "node001"}, "must be HOST:PORT"),
        (EXPLICIT | {"process_id": 4}, "must be from 0 to 3"),
        (EXPLICIT | {"num_processes": "x"}, "not numbers"),
    ],
)
def test_processes_that_cannot_find_one_another(flags, message):
    with pytest.raises(UserError, match=message):
        hosts.find(flags, {})


def test_what_hosts_saw_is_dealt_out_to_another_number_of_them():
    states = [{"batch": 7, "unreadable": [[n, f"picture {n}"]]} for n in range(4)]
    for count in (1, 2, 4, 6):
        dealt = [state_of_host(states, index, count) for index in range(count)]
        assert {state["batch"] for state in dealt} == {7}
        seen = [tuple(picture) for state in dealt for picture in state["unreadable"]]
        assert sorted(seen) == [(n, f"picture {n}") for n in range(4)]
        assert max(len(state["unreadable"]) for state in dealt) == max(4 // count, 1)


def flat(values: dict, above: str = "") -> dict:
    """Values by dotted name."""
    found = {}
    for name, value in values.items():
        inner = flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
        found |= inner
    return found


def changes(config, recipe) -> list[str]:
    """The flags that make a recipe this config."""
    before = flat(recipe.get_config().to_dict())
    return [
        f"--config.{name}={value}"
        for name, value in flat(config.to_dict()).items()
        if before[name] != value
    ]


class Cluster:
    """`launch/local_cluster.sh 2 ...`, two processes of 4 devices each."""

    def __init__(self, workdir: Path, recipe, config, *flags: str, restarts: int = 0):
        name = recipe.__name__.replace(".", "/") + ".py"
        self.workdir = workdir
        command = ["bash", "launch/local_cluster.sh", "2", "--config", name]
        command += ["--workdir", str(workdir), *changes(config, recipe), *flags]
        self._run = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**ENVIRONMENT, "RESTARTS": str(restarts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._run.stdout))
        self._reader.start()

    @property
    def said(self) -> str:
        return "".join(self._lines)

    def processes(self, start: int) -> list[int]:
        """The processes of the launcher's first, second, ... start."""
        lines = re.findall(r"local_cluster: started (\d+) (\d+)", self.said)
        return list(map(int, lines[start]))

    def wait_for_steps(self, count: int) -> None:
        written = self.workdir / "metrics.jsonl"
        while not written.exists() or written.read_text().count("\n") < count:
            assert self._run.poll() is None, self.said
            time.sleep(0.02)

    def wait_for_start(self, start: int) -> None:
        while self.said.count("local_cluster: started") <= start:
            assert self._run.poll() is None, self.said
            time.sleep(0.02)

    def end(self) -> int:
        """The exit status, once the launcher has ended, and all of its processes with it."""
        status = self._run.wait(timeout=300)
        self._reader.join(timeout=300)  # ends when the last process has let go of the output
        assert not self._reader.is_alive()
        self._run.stdout.close()
        return status

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *failure) -> None:
        while self._run.poll() is None:  # told once, it lets them save; told twice, it kills them
            self._run.terminate()
            time.sleep(0.5)
        if not self._run.stdout.closed:
            self.end()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def recipe_of_faults(**more):
    config = small(tiny_causal_qformer.get_config(), steps=24, **more)
    config.model.vit.depth = config.model.qformer.depth = 1
    return config


def test_two_processes_are_stopped_killed_and_hung_and_lose_nothing(tmp_path):
    config, workdir = recipe_of_faults(), tmp_path / "w"
    train(config, tmp_path / "whole")

    with Cluster(workdir, tiny_causal_qformer, config, restarts=1) as cluster:
        cluster.wait_for_steps(2)
        os.kill(cluster.processes(0)[1], signal.SIGTERM)
        cluster.wait_for_start(1)
        stopped = int(re.search(r"stopped at step (\d+) and saved", cluster.said)[1])
        assert [int(path.name) for path in (workdir / "checkpoints").iterdir()] == [stopped]
        assert [row["step"] for row in metrics(workdir)] == list(range(1, stopped + 1))

        cluster.wait_for_steps(stopped + 2)
        os.kill(cluster.processes(1)[1], signal.SIGKILL)
        assert cluster.end() == 128 + signal.SIGKILL
        assert "process 1 ended with status 137; stopping the others" in cluster.said
    before = losses(workdir)
    assert len(before) > stopped

    with Cluster(workdir, tiny_causal_qformer, config, "--heartbeat_seconds=10") as cluster:
        cluster.wait_for_steps(len(before) + 1)
        os.kill(cluster.processes(0)[1], signal.SIGSTOP)
        assert cluster.end() == 128 + signal.SIGABRT
        assert "unhealthy (stopped sending heartbeats)" in cluster.said
        assert "process 0 ended with status 134; stopping the others" in cluster.said
    assert losses(workdir)[: len(before)] == before

    # From here one process goes on, on another mesh.
    train(recipe_of_faults(**{"mesh.data": 2, "mesh.fsdp": 4}), workdir)
    assert [row["step"] for row in metrics(workdir)] == list(range(1, 25))
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "whole"), rtol=1e-5)


def test_two_processes_make_the_model_that_one_makes(tmp_path):
    config = small(tiny_codebook.get_config(), steps=2, init=stages.save_first(tmp_path))
    config.codebook_health.update(kmeans_batches=2, dead_code_threshold=0.05)
    config.remember, config.data.split = True, "style"  # the smallest split

    with Cluster(tmp_path / "two", tiny_codebook, config) as cluster:
        train(config, tmp_path / "one")
        assert cluster.end() == 0, cluster.said
        assert cluster.said.count("the model is in") == 1
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = (SeedTokenizer.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    vectors = [model.code_vectors(model.causal_embeddings(images)) for model in (one, two)]
    np.testing.assert_allclose(*vectors, rtol=1e-4, atol=1e-5)
    # K-means leaves some vectors of the codebook alike but for roundings, which choose among them.
    assert np.mean(one.encode(images) == two.encode(images)) > 0.95


def test_two_processes_train_the_language_model_that_one_trains(tmp_path):
    data = {"data.path": "embedded", "data.split": ""}
    config, _ = stages.make("seed_opt", tmp_path, steps=2, **data)
    with Cluster(tmp_path / "two", tiny_seed_opt, config) as cluster:
        train(config, tmp_path / "one")
        assert cluster.end() == 0, cluster.said
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = (load_language_model(tmp_path / name / "model") for name in ("one", "two"))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, one.config.vocab_size, (2, 9)))
    np.testing.assert_allclose(
        one(ids, jnp.ones_like(ids)), two(ids, jnp.ones_like(ids)), rtol=1e-4, atol=1e-4
    )


ROWS = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method="deactivate")
from seed_jax import sharding
batch = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
counts = []
crossed = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
for devices in (jax.devices(), crossed):
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}):
        mesh = sharding.make_mesh(sizes, devices)
        rows = sharding.local_rows(mesh, 32)
        put = sharding.put_batch({"x": batch[rows]}, mesh)["x"]
        np.testing.assert_array_equal(sharding.on_host(put), batch)
        counts.append(len(rows))
print("rows:", *counts)
"""


def run_two(*command: str, folders: Sequence[Path] = (ROOT, ROOT), **environ: str):
    """Runs a command as processes 0 and 1 in their folders; each one's status, and what they said.

    In the command, {address} is process 0's and {index} the process's own.
    """
    address = f"localhost:{free_port()}"
    runs = [
        subprocess.Popen(
            [word.format(address=address, index=index) for word in command],
            cwd=folder,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, folder in enumerate(folders)
    ]
    try:
        said = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [run.returncode for run in runs], said


def test_each_host_reads_the_rows_that_its_devices_hold(tmp_path):
    file = tmp_path / "rows.py"
    file.write_text(ROWS)
    four = "--xla_force_host_platform_device_count=4"
    statuses, said = run_two(sys.executable, str(file), "{address}", "{index}", XLA_FLAGS=four)
    assert statuses == [0, 0], said
    # With the tensor axis across hosts, some or all rows are on both.
    assert all("rows: 16 16 32 16 32 32" in text for text in said), said


def test_a_shard_missing_on_one_host_is_told_once(tmp_path):
    records = [open_source("embedded", "style")[number] for number in range(20)]
    sizes = {"batch_size": 8, "data.path": "shards", "data.split": ""}
    config = small(tiny_causal_qformer.get_config(), **sizes)
    for host in range(2):
        (tmp_path / str(host) / "shards").mkdir(parents=True)
        for shard in range(2):
            file = tmp_path / str(host) / "shards" / f"{shard}.array_record"
            write_array_record(file, records[10 * shard :][:10])
    (tmp_path / "1/shards/1.array_record").unlink()

    statuses, said = run_two(
        *[sys.executable, "-m", "seed_jax.train"],
        f"--config={ROOT / 'configs/tiny_causal_qformer.py'}",
        f"--workdir={tmp_path / 'w'}",
        *changes(config, tiny_causal_qformer),
        *["--coordinator={address}", "--num_processes=2", "--process_id={index}"],
        folders=[tmp_path / "0", tmp_path / "1"],
    )
    assert statuses == [2, 2], said
    lines = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "process 0 found 20 records in shards, but process 1 found 10 records" in lines[0]


def test_a_mistake_that_all_processes_notice_is_told_once(tmp_path):
    config = small(tiny_causal_qformer.get_config(), **{"mesh.tensor": 3})
    with Cluster(tmp_path / "w", tiny_causal_qformer, config) as cluster:
        assert cluster.end() == 2
        assert cluster.said.count("error: ") == 1
        assert "does not fit 8 devices" in cluster.said


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_launch_scripts_parse(script):
    subprocess.run([shutil.which("bash"), "-n", script], check=True)


def test_the_kubernetes_job_names_a_host_for_each_process():
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    (group,) = job["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    name = job["metadata"]["name"]
    for index in range(spec["completions"]):
        known = hosts.find({}, environ | {"JOB_COMPLETION_INDEX": str(index)})
        assert known["coordinator_address"] == f"{name}-{group['name']}-0-0.{name}:8476"
        assert (known["process_id"], known["num_processes"]) == (index, spec["parallelism"])

"""Kills a run of two processes again and again, and compares what it ends with to an unbroken run.

    python benchmarks/survival.py [--kills 20] [--workdir DIR]

Each time a process drawn at random gets SIGKILL at a moment drawn at random: half of the times
before the first step, while it starts, compiles or restores, else while it trains and saves.
launch/local_cluster.sh takes the other down, and the same command is given again. The last time
nobody is killed. The model must be the unbroken run's bit by bit, and so must every step's loss.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
STEPS = 80
RECIPE = [
    "--config=configs/tiny_causal_qformer.py",
    f"--config.steps={STEPS}",
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.checkpoint_every=3",
    "--config.keep_checkpoints=2",
    "--config.model.vit.depth=1",
    "--config.model.qformer.depth=1",
    "--config.data.cache=False",
]


class Run:
    """The cluster in a workdir; what it says goes to a file beside it."""

    def __init__(self, workdir: Path, devices: int):
        self._workdir, self._log = workdir, workdir.with_suffix(".log")
        with self._log.open("w") as log:
            self.launcher = subprocess.Popen(
                ["bash", "launch/local_cluster.sh", "2", *RECIPE, f"--workdir={workdir}"],
                cwd=ROOT,
                env={**os.environ, "DEVICES": str(devices)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """Waits until they are started."""
        while not (found := re.search(r"started (\d+) (\d+)", self._log.read_text())):
            time.sleep(0.01)
        return [int(found[1]), int(found[2])]

    def wait(self, step: int, seconds: float = math.inf) -> None:
        """Until the step is taken, or for so long."""
        until = time.monotonic() + seconds
        while len(steps_of(self._workdir)) < step and time.monotonic() < until:
            if self.launcher.poll() is not None:
                raise SystemExit(f"the run ended by itself; {self._log} says why")
            time.sleep(0.05)

    def check(self) -> None:
        if self.launcher.wait():
            raise SystemExit(f"the run failed; {self._log} says why")


def steps_of(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, default=4, help="a process (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", type=Path, help="where the runs go (default: a temporary one)")
    args = parser.parse_args()
    folder = args.workdir or Path(tempfile.mkdtemp(prefix="survival_"))
    folder.mkdir(parents=True, exist_ok=True)
    # Programs are compiled in the unbroken run alone, and the broken one starts faster.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

    began = time.monotonic()
    whole, broken = folder / "whole", folder / "broken"
    run = Run(whole, args.devices)
    run.wait(1)
    first_step = time.monotonic() - began
    run.wait(STEPS)
    a_step = (time.monotonic() - began - first_step) / STEPS
    run.check()

    rng = random.Random(args.seed)
    lost, share = 0, STEPS // args.kills
    for number in tqdm(range(args.kills), unit="kill"):
        run = Run(broken, args.devices)
        victim = rng.choice(run.processes())
        # Each in its part of the run, so that no kill comes after its end.
        latest = share * (number + 1) - 2
        if rng.random() < 0.5:
            run.wait(latest, rng.uniform(0, first_step))
        else:
            run.wait(rng.randint(share * number + 1, latest))
            time.sleep(rng.uniform(0, a_step))
        os.kill(victim, signal.SIGKILL)
        if run.launcher.wait() != 128 + signal.SIGKILL:
            raise SystemExit(f"{broken.with_suffix('.log')}: not ended by the kill")
        there = [
            int(path.name) for path in (broken / "checkpoints").glob("*") if path.name.isdigit()
        ]
        lost += len(steps_of(broken)) - max(there, default=0)
    Run(broken, args.devices).check()

    hashes = [
        json.loads((w / "model/config.json").read_text())["content_hash"] for w in (whole, broken)
    ]
    losses = [[(row["step"], row["loss"]) for row in steps_of(w)] for w in (whole, broken)]
    print(f"{args.kills} kills; {lost} of {STEPS} steps were taken again")
    print("the model is the unbroken run's bit by bit:", hashes[0] == hashes[1])
    print(f"and so is the loss of each of {len(losses[0])} steps:", losses[0] == losses[1])
    if hashes[0] != hashes[1] or losses[0] != losses[1]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

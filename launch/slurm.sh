#!/usr/bin/env bash
# Trains on 8 nodes of 8 V100s under SLURM, one process a node:
#
#     sbatch launch/slurm.sh --config configs/causal_qformer.py --workdir DIR [--config.key=value ...]
#
# Submit from the repository's root, after `bash launch/setup.sh requirements-v100.txt`: without the
# name, it installs JAX for processors. The repository, DIR and the data must lie where all nodes see
# them. Other sizes: sbatch --nodes=2 --gpus-per-node=4 launch/slurm.sh ...
#
#SBATCH --job-name=seed_jax
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# Process 0 is on the first node. Jobs that share a node differ in their ports.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 10000))"

# Five minutes before the time is up, or when the job is preempted, all save at the same step.
srun --kill-on-bad-exit=1 .venv/bin/python -m seed_jax.train "$@"
status=$?

# Stopped or killed: goes on where the last checkpoint was. A mistake (2) or a bug (1) would come again.
if [ "$status" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

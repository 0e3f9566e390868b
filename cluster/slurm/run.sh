#!/usr/bin/env bash
# A run on several nodes of a Slurm cluster, one process a node with all of its GPUs:
#
#   sbatch cluster/slurm/run.sh clm gpt2 --data.files '/shared/text/*.jsonl.gz' --run-dir /shared/runs/gpt2
#
# The arguments are those of ./launch.sh. Run directory and checkout must be on a disk that all nodes see; the cache of
# tokens (ESPALIER_CACHE) should be. Sent again, the same command goes on from the last checkpoint.
#SBATCH --job-name=espalier
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Ten minutes before the time is up all processes save at the same step, and the job goes back into the queue.
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this file with sbatch, from the checkout}" || exit 2
[[ -x launch.sh ]] || { echo "error: $PWD has no launch.sh; call sbatch in the checkout" >&2; exit 2; }
./launch.sh setup || exit

# srun, not a plain call: it starts one process a task, and what it sets tells each its place.
# --kill-on-bad-exit: also should one hang before it has met the others.
srun --kill-on-bad-exit=1 --label ./launch.sh "$@"
code=$?
# 143: SIGTERM came and the run was saved.
[[ $code -ne 143 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"

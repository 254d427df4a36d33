#!/usr/bin/env bash
# Trains on GPUs under Slurm, one process per GPU.  First, once and on a node with the network: make install ACCEL=cuda
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 train/launch/slurm.sh MODEL=FOLDER DATA=FOLDER ARGS="parallel=mesh"
# Two minutes before its time is over Slurm sends SIGTERM: the run writes a checkpoint, and the job starts again.
#SBATCH --job-name=sdjax
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
export ACCEL=${ACCEL:-cuda}
srun --kill-on-bad-exit=0 make train-encoder "$@"
status=$?
if [ "$status" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"

#!/bin/bash
# sbatch docker/cluster/slurm.sh studies/cifar10-nfe2.yaml [further options of `bdense-weights launch`]
#SBATCH --job-name=bdense
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the end the launcher puts its trials back into the queue; submit the same command to go on.
#SBATCH --signal=B:TERM@120
set -euo pipefail

: "${OPTUNA_STORAGE:?is the address of PostgreSQL, postgresql://USER@HOST/DATABASE; the password is in ~/.pgpass}"
: "${BDENSE_HOME:?is a folder that all nodes share}"
export BDENSE_HOME

# Whoever knows the token can run code on the nodes: a new one for each job, in the environment alone.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

address=$(hostname):$((20000 + SLURM_JOB_ID % 20000))
node=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)

# Ray's processes inherit the environment, and only the launcher needs the database.
without_database=(env --unset=OPTUNA_STORAGE --unset=PGPASSWORD)

# This script runs on the first node of the job, which becomes Ray's head and runs trials too.
"${without_database[@]}" ray start --head --port="${address##*:}" --include-dashboard=false \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${node[@]}"

others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    "${without_database[@]}" srun --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        ray start --address="$address" --block --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${node[@]}" &
fi

# The launcher takes this process's place, and with it Slurm's signal. When it ends, so does the job with all nodes.
exec bdense-weights launch "$@" --ray-address="$address" --no-dashboard

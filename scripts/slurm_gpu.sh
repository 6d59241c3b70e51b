#!/usr/bin/env bash
# Submits `dss train` to Slurm, one process per GPU.
#
#   scripts/slurm_gpu.sh [OPTION]... -- ARGUMENT_OF_DSS_TRAIN...
#
#   --nodes N            number of nodes (default: 1)
#   --gpus-per-node N    GPUs of each node (default: 1)
#   --cpus-per-task N    CPU cores of each process (default: 4; Slurm's own is 1)
#   --time LIMIT         time limit, such as 24:00:00 (default: the partition's)
#   --partition NAME     partition (default: the cluster's)
#   --account NAME       account to charge
#   --job-name NAME      name of the job (default: dss)
#   --dry-run            print the batch script without submitting it
#
# The environment with `dss` must be active. Details: docs/launching.md

source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

opt_nodes=1 opt_gpus_per_node=1 opt_cpus_per_task=4 opt_job_name=dss
opt_time="" opt_partition="" opt_account="" opt_dry_run=""
read_options "nodes gpus-per-node cpus-per-task time partition account job-name" "dry-run" "$@"
no_other_options
if ((${#words[@]} > 0)); then
  fail "unexpected '${words[0]}'; the arguments of dss train come after --"
fi
for option in nodes gpus-per-node cpus-per-task; do
  value="opt_${option//-/_}"
  [[ "${!value}" =~ ^[1-9][0-9]*$ ]] || fail "--$option is ${!value}; give a whole number above 0"
done
for option in time partition account job-name; do
  value="opt_${option//-/_}"
  [[ "${!value}" != *[[:space:]]* ]] || fail "--$option is '${!value}'; give it without blanks"
done
need_train_arguments

batch_script() {
  echo '#!/usr/bin/env bash'
  echo "#SBATCH --job-name=$opt_job_name"
  [[ -z "$opt_partition" ]] || echo "#SBATCH --partition=$opt_partition"
  [[ -z "$opt_account" ]] || echo "#SBATCH --account=$opt_account"
  [[ -z "$opt_time" ]] || echo "#SBATCH --time=$opt_time"
  cat <<END
#SBATCH --nodes=$opt_nodes
#SBATCH --ntasks-per-node=$opt_gpus_per_node
#SBATCH --gpus-per-node=$opt_gpus_per_node
#SBATCH --cpus-per-task=$opt_cpus_per_task
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120

set -euo pipefail
export PYTHONUNBUFFERED=1

# The processes save on SIGTERM; this shell ignores it and waits for them.
trap : TERM

# NCCL copies directly between the GPUs of a node, so every process must see all of them; JAX uses the
# one of SLURM_LOCALID. --gpus-per-task would hide the others.
status=0
srun --label --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=$opt_cpus_per_task \\
  dss train $(quote "${train[@]}") || status=\$?

# 143 is SIGTERM: the time limit, or preemption. The same command resumes from the checkpoint. A
# cancelled job is no longer RUNNING.
if ((status == 143)) &&
  [[ "\$(squeue --noheader --jobs="\$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
END
}

if [[ -n "$opt_dry_run" ]]; then
  batch_script
  exit
fi
command -v sbatch >/dev/null || fail "no sbatch here; run this where Slurm's commands are"
command -v dss >/dev/null || fail "no dss on PATH; activate the environment that it is installed in"
batch_script | sbatch

#!/usr/bin/env bash
# Runs the same `dss train` on every worker of Cloud TPU VMs.
#
#   scripts/tpu_vm.sh COMMAND... --name NAME --zone ZONE [OPTION]... [-- ARGUMENT_OF_DSS_TRAIN...]
#
#   create     request TPU VMs as a queued resource (--type, --version)
#   install    wait for them, copy HEAD of this checkout to every worker and install it
#   run        start dss train on every worker, detached from this connection
#   wait       wait until it has ended on every worker
#   logs       fetch every worker's log to logs/NAME/NODE-worker-N.log, print the last lines
#   delete     delete the queued resource and its TPU VMs without confirmation
#
# Commands run in the order given, up to the first that fails.
#
#   --project ID           Google Cloud project (default: gcloud's)
#   --type TYPE            accelerator type, such as v4-32; with --topology the version, such as v4
#   --topology TOPOLOGY    chips along each axis, such as 2x2x4
#   --version VERSION      image of the VMs, such as tpu-ubuntu2204-base
#   --slices N             number of slices of this type (default: 1)
#   --internal-ip          connect to the workers at their internal addresses
#   --tunnel-through-iap   connect to the workers through Identity-Aware Proxy
#   --dry-run              print the commands without running them
#
# Other options are passed to `gcloud compute tpus queued-resources create`, each as --OPTION=VALUE:
# --spot, --reserved, --internal-ips, --network=, --subnetwork=, --service-account=, --labels=, ...
#
# Examples: docs/launching.md

source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
COMMANDS="create install run wait logs delete"

opt_name="" opt_zone="" opt_project="" opt_type="" opt_topology="" opt_version="" opt_slices=1
opt_internal_ip="" opt_tunnel_through_iap="" opt_dry_run=""
read_options "name zone project type topology version slices" \
  "internal-ip tunnel-through-iap dry-run" "$@"

((${#words[@]} > 0)) || fail "no command; give one or more of: $COMMANDS"
for command in "${words[@]}"; do
  [[ " $COMMANDS " == *" $command "* ]] ||
    fail "unknown command '$command'; there are: $COMMANDS; gcloud's options are given as --OPTION=VALUE"
done
[[ -n "$opt_name" ]] || fail "--name is missing: give the name of the queued resource"
[[ "$opt_name" =~ ^[a-z][a-z0-9-]*$ ]] ||
  fail "--name is '$opt_name'; give lower-case letters, digits and -, a letter first"
[[ -n "$opt_zone" ]] || fail "--zone is missing: give the TPU VMs' zone, such as us-central2-b"
[[ "$opt_slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices is $opt_slices; give a whole number above 0"
if [[ " ${words[*]} " == *" create "* ]]; then
  [[ -n "$opt_type" ]] || fail "create needs --type, such as v4-32"
  [[ -n "$opt_version" ]] || fail "create needs --version, such as tpu-ubuntu2204-base"
else
  no_other_options
fi
if [[ " ${words[*]} " == *" run "* ]]; then
  need_train_arguments
elif ((${#train[@]} > 0)); then
  fail "arguments after -- are for the command run"
fi

where=(--zone="$opt_zone")
[[ -z "$opt_project" ]] || where+=(--project="$opt_project")
connect=("${where[@]}")
[[ -z "$opt_internal_ip" ]] || connect+=(--internal-ip)
[[ -z "$opt_tunnel_through_iap" ]] || connect+=(--tunnel-through-iap)
everywhere=(--node=all --worker=all "${connect[@]}")

# Each plan_COMMAND prints the shell commands of a command, which are run unless it is a dry run.

# gcloud_tpu GROUP COMMAND ARG...: a gcloud command on queued-resources or tpu-vm.
gcloud_tpu() {
  quote gcloud compute tpus "$@"
  echo
}

on_every_worker() {
  gcloud_tpu queued-resources ssh "$opt_name" --command="$1" "${everywhere[@]}"
}

plan_create() {
  local options=(--runtime-version="$opt_version")
  if [[ -n "$opt_topology" ]]; then
    options+=(--type="$opt_type" --topology="$opt_topology")
  else
    options+=(--accelerator-type="$opt_type")
  fi
  if ((opt_slices > 1)); then
    options+=(--node-count="$opt_slices" --node-prefix="$opt_name")
  else
    options+=(--node-id="$opt_name")
  fi
  options+=("${where[@]}")
  gcloud_tpu queued-resources create "$opt_name" "${options[@]}" ${others[@]+"${others[@]}"}
}

wait_for_resources() {
  local describe
  describe="$(gcloud_tpu queued-resources describe "$opt_name" "${where[@]}" \
    --format='value(state.state)')"
  cat <<END
while true; do
  state="\$($describe)"
  case "\$state" in
    ACTIVE) break ;;
    FAILED | SUSPEND* | DELETING)
      echo "the queued resource $opt_name is \$state: delete it and create it again" >&2
      exit 1
      ;;
  esac
  sleep 30
done
END
}

# The images' Python (Ubuntu 22.04: 3.10) is too old for dss; uv installs a newer one.
plan_install() {
  wait_for_resources
  echo 'archive="$(mktemp)"'
  echo "trap 'rm -f \"\$archive\"' EXIT"
  echo "$(quote git -C "$ROOT" archive --format=tar.gz HEAD) >\"\$archive\""
  echo "$(gcloud_tpu queued-resources scp) \"\$archive\"" \
    "$(quote "$opt_name:dss.tar.gz" "${everywhere[@]}")"
  on_every_worker 'set -e
rm -rf ~/dss/source
mkdir -p ~/dss/source
tar -xzf ~/dss.tar.gz -C ~/dss/source
if [ ! -x ~/dss/venv/bin/pip ]; then
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv venv --quiet --seed --python 3.11 ~/dss/venv
fi
cd ~/dss/source
~/dss/venv/bin/pip install --quiet ".[tpu,gcs]"'
}

# With setsid the run survives a lost connection. train.pid exists until the run has ended and holds the
# process id of dss, to which SIGTERM is sent for save and stop.
plan_run() {
  on_every_worker "cd ~/dss/source || exit 1
pid=\"\$(cat ~/dss/train.pid 2>/dev/null)\"
if kill -0 \"\$pid\" 2>/dev/null; then
  echo \"dss train is running already, process \$pid\" >&2
  exit 1
fi
: >~/dss/train.pid
PYTHONUNBUFFERED=1 setsid bash -c '
  \"\$@\" &
  echo \$! >~/dss/train.pid
  status=0
  wait \$! || status=\$?
  rm ~/dss/train.pid
  echo \"dss train ended with exit status \$status\"
' bash ~/dss/venv/bin/dss train $(quote "${train[@]}") >>~/dss/train.log 2>&1 </dev/null &"
}

plan_wait() {
  echo 'state=running'
  echo 'while [[ "$state" == *running* ]]; do'
  echo '  sleep 60'
  echo "  state=\"\$($(on_every_worker 'if [ -e ~/dss/train.pid ]; then echo running; fi'))\""
  echo 'done'
}

plan_logs() {
  local folder nodes workers copy
  folder="logs/$opt_name"
  nodes="$(gcloud_tpu queued-resources describe "$opt_name" "${where[@]}" \
    --format='value(tpu.nodeSpec[].nodeId)')"
  workers="$(gcloud_tpu tpu-vm describe --format='value(networkEndpoints.len())' "${where[@]}")"
  copy="$(gcloud_tpu queued-resources scp "${connect[@]}" "$opt_name:dss/train.log")"
  cat <<END
mkdir -p $folder
nodes="\$($nodes)"
node=0
for name in \${nodes//;/ }; do
  workers="\$($workers "\$name")"
  for ((worker = 0; worker < workers; worker++)); do
    log="$folder/\$name-worker-\$worker.log"
    $copy "\$log" --node="\$node" --worker="\$worker"
    echo "\$log: \$(tail -n 1 "\$log")"
  done
  node=\$((node + 1))
done
END
}

plan_delete() {
  gcloud_tpu queued-resources delete "$opt_name" --force --quiet "${where[@]}"
}

plan="$(for command in "${words[@]}"; do "plan_$command"; done)"
if [[ -n "$opt_dry_run" ]]; then
  printf '%s\n' "$plan"
  exit
fi
command -v gcloud >/dev/null || fail "no gcloud on PATH; install the Google Cloud SDK"
if [[ " ${words[*]} " == *" install "* && -n "$(git -C "$ROOT" status --porcelain)" ]]; then
  echo "${0##*/}: note: what is not committed is not copied to the workers" >&2
fi
exec bash -euo pipefail -c "$plan"

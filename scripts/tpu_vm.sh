#!/usr/bin/env bash
# Trains on a Cloud TPU VM: the same `dss train` on every worker.
#
#   scripts/tpu_vm.sh VERB... --name NAME --zone ZONE [OPTION]... [-- ARGUMENT_OF_DSS_TRAIN...]
#
#   create     make the TPU VM (--type, --version, --spot)
#   install    copy this checkout as committed to every worker and install it
#   run        start dss train on every worker; it lives on without this connection
#   wait       until it has ended on every worker
#   logs       fetch what every worker printed to logs/NAME/worker-N.log, show the last lines
#   delete     delete the TPU VM without a question
#
# Several verbs are done in the order given, up to the first that fails.
#
#   --project ID         without it gcloud's
#   --type TYPE          accelerator, such as v4-32
#   --version VERSION    the image of the VM, such as tpu-ubuntu2204-base
#   --spot               cheaper, and taken away at any moment
#   --dry-run            print the commands, run none
#
# docs/launching.md has a whole example.

source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VERBS="create install run wait logs delete"

opt_name="" opt_zone="" opt_project="" opt_type="" opt_version="" opt_spot="" opt_dry_run=""
read_options "name zone project type version" "spot dry-run" "$@"

((${#words[@]} > 0)) || fail "what to do? give one or more of: $VERBS"
for verb in "${words[@]}"; do
  [[ " $VERBS " == *" $verb "* ]] || fail "unknown verb '$verb'; there are: $VERBS"
done
[[ -n "$opt_name" ]] || fail "--name is missing: give the TPU VM's name"
[[ "$opt_name" =~ ^[a-z][a-z0-9-]*$ ]] ||
  fail "--name is '$opt_name'; give lower-case letters, digits and -, a letter first"
[[ -n "$opt_zone" ]] || fail "--zone is missing: give the TPU VM's zone, such as us-central2-b"
if [[ " ${words[*]} " == *" create "* ]]; then
  [[ -n "$opt_type" ]] || fail "create needs --type, such as v4-32"
  [[ -n "$opt_version" ]] || fail "create needs --version, such as tpu-ubuntu2204-base"
fi
if [[ " ${words[*]} " == *" run "* ]]; then
  need_train_arguments
elif ((${#train[@]} > 0)); then
  fail "arguments after -- are for the verb run"
fi

where=(--zone="$opt_zone")
[[ -z "$opt_project" ]] || where+=(--project="$opt_project")

# Each plan_VERB prints the commands of a verb. A dry run shows them, any other run runs them.

# gcloud_tpu VERB ARG...: a command on the TPU VMs of the zone.
gcloud_tpu() {
  quote gcloud compute tpus tpu-vm "$@" "${where[@]}"
  echo
}

on_every_worker() {
  gcloud_tpu ssh "$opt_name" --worker=all --command="$1"
}

plan_create() {
  local options=(--accelerator-type="$opt_type" --version="$opt_version")
  [[ -z "$opt_spot" ]] || options+=(--spot)
  gcloud_tpu create "$opt_name" "${options[@]}"
}

# The images are Ubuntu 22.04, whose Python 3.10 is too old for dss, so uv brings a newer one.
plan_install() {
  echo 'archive="$(mktemp)"'
  echo "trap 'rm -f \"\$archive\"' EXIT"
  echo "$(quote git -C "$ROOT" archive --format=tar.gz HEAD) >\"\$archive\""
  echo "$(quote gcloud compute tpus tpu-vm scp) \"\$archive\"" \
    "$(quote "$opt_name:dss.tar.gz" --worker=all "${where[@]}")"
  on_every_worker 'set -e
rm -rf ~/dss/source
mkdir -p ~/dss/source
tar -xzf ~/dss.tar.gz -C ~/dss/source
if [ ! -x ~/dss/venv/bin/pip ]; then
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv venv --quiet --seed --python 3.11 ~/dss/venv
fi
cd ~/dss/source
~/dss/venv/bin/pip install --quiet ".[tpu]"'
}

# setsid: a lost connection does not end it. train.pid is there from now until the end, and holds the
# process id of dss itself, so that it can be told to save and stop.
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
  local folder
  folder="logs/$opt_name"
  echo "mkdir -p $folder"
  echo "workers=\"\$($(gcloud_tpu describe "$opt_name" --format='value(networkEndpoints.len())'))\""
  echo 'for ((worker = 0; worker < workers; worker++)); do'
  echo "  log=$folder/worker-\$worker.log"
  echo "  $(quote gcloud compute tpus tpu-vm scp "$opt_name:dss/train.log") \"\$log\"" \
    "--worker=\$worker $(quote "${where[@]}")"
  echo '  echo "$log: $(tail -n 1 "$log")"'
  echo 'done'
}

plan_delete() {
  gcloud_tpu delete "$opt_name" --quiet
}

plan="$(for verb in "${words[@]}"; do "plan_$verb"; done)"
if [[ -n "$opt_dry_run" ]]; then
  printf '%s\n' "$plan"
  exit
fi
command -v gcloud >/dev/null || fail "no gcloud on PATH; install the Google Cloud SDK"
if [[ " ${words[*]} " == *" install "* && -n "$(git -C "$ROOT" status --porcelain)" ]]; then
  echo "${0##*/}: note: what is not committed is not copied to the workers" >&2
fi
exec bash -euo pipefail -c "$plan"

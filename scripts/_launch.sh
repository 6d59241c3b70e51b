# Command-line parsing and shell quoting; sourced by the launchers.

set -euo pipefail

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Prints the script's header comment.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Prints the arguments as one line of shell words that any POSIX shell parses back unchanged.
quote() {
  local word separator="" apostrophe="'\\''"
  for word in "$@"; do
    if [[ -z "$word" || "$word" == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
      word="'${word//\'/$apostrophe}'"
    fi
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

# read_options "NAMES WITH A VALUE" "SWITCHES" ARG...
#
# Sets opt_NAME for each given option, `others` to the unknown options, `words` to the positional arguments
# before `--`, and `train` to the arguments of `dss train` after it.
read_options() {
  local valued=" $1 " switches=" $2 " name value
  shift 2
  words=()
  others=()
  train=()
  while (($# > 0)); do
    case "$1" in
      --)
        shift
        train=("$@")
        break
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --*)
        name="${1%%=*}"
        name="${name#--}"
        if [[ "$switches" == *" ${1#--} "* ]]; then
          printf -v "opt_${name//-/_}" yes
        elif [[ "$valued" == *" $name "* ]]; then
          [[ "$1" == *=* ]] || set -- "$1=${2:-}" "${@:3}"
          value="${1#*=}"
          if [[ -z "$value" || "$value" == --* ]]; then
            fail "--$name needs a value"
          fi
          printf -v "opt_${name//-/_}" '%s' "$value"
        else
          others+=("$1")
        fi
        ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

# Fails on unknown options.
no_other_options() {
  if ((${#others[@]} > 0)); then
    fail "unknown option ${others[0]}; --help lists them, and those of dss train come after --"
  fi
}

# Fails if there are no arguments for `dss train`.
need_train_arguments() {
  if ((${#train[@]} == 0)); then
    fail "nothing to train: give the arguments of dss train after --, such as" \
      "-- --gin_file=datasets/cqa.gin --gin_file=methods/step_by_step.gin --gin.MODEL_DIR=DIR"
  elif [[ "${train[0]}" != -* ]]; then
    fail "'${train[0]}' after --: give the arguments of dss train only, without 'dss train'"
  fi
}

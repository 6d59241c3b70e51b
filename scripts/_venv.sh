# Sourced by the other scripts: goes to the repository's root and makes .venv, with dss in it.
#
#   ensure_venv EXTRA,EXTRA
#
# Installs only what was not installed before, or what setup.py has changed since.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ensure_venv() {
  local extras="$1" python="${PYTHON:-python3}" stamp
  stamp="$extras $(cat setup.py pyproject.toml | sha256sum | cut -d' ' -f1)"
  if [[ ! -x .venv/bin/python ]]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$0: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2
      exit 2
    fi
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  if ! grep -qsxF "$stamp" .venv/installed; then
    echo "== installing dss[$extras] into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
    echo "$stamp" >>.venv/installed
  else
    echo "== .venv has dss[$extras]; nothing to install"
  fi
}

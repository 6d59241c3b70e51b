# Changes to the repository's root and creates .venv with dss; sourced by the other scripts.
#
#   ensure_venv EXTRA,EXTRA
#   ensure_browser
#
# Installs only if the extras, setup.py or pyproject.toml have changed.

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

# Installs chromium if it can; the browser tests are skipped without it.
ensure_browser() {
  if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    return
  fi
  local as_root=()
  if [[ "$(id -u)" != 0 ]]; then
    as_root=(sudo -n)
  fi
  if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo "== no chromium, and no right to install it; the report's tests in a browser are skipped"
    return
  fi
  echo "== installing chromium and its driver, for the report's tests"
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q chromium chromium-driver)
  "${as_root[@]}" "${install[@]}" >/dev/null 2>&1 ||
    { "${as_root[@]}" apt-get update -q >/dev/null 2>&1 &&
      "${as_root[@]}" "${install[@]}" >/dev/null; } ||
    echo "== apt-get could not install it; the report's tests in a browser are skipped"
}

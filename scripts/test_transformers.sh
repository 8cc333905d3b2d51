#!/usr/bin/env bash
# The tests of the rewards under two versions of transformers: the one that is installed, and the newest that the
# package index serves (or the one named as argument), which is installed into a separate environment.
#
#   scripts/test_transformers.sh [VERSION]
#
#   PYTHON   interpreter of an environment with everything else, by default the one of `make setup`
#   VENV     folder of the second environment, which is rebuilt each time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
VENV=${VENV:-build/newest-transformers}
WANTED=transformers${1:+==$1}
TESTS=(tests/unit/rewards tests/parity/test_rewards_clip.py tests/parity/test_rewards_hpsv3.py
  tests/parity/test_rewards_imagereward.py tests/parity/test_rewards_qwen_vl.py
  tests/parity/test_rewards_deqa.py)

site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
version() { "$1" -c 'from importlib.metadata import version; print(version("transformers"))'; }

rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"
# packages of the second environment come first; the first one provides the rest
site "$PYTHON" >"$(site "$VENV/bin/python")/everything-else.pth"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "$WANTED"

failed=0 results=
for python in "$PYTHON" "$VENV/bin/python"; do
  if PYTHONPATH=$PWD "$python" -m pytest -q "${TESTS[@]}"; then verdict=passed; else verdict=FAILED failed=1; fi
  results+="transformers $(version "$python"): $verdict"$'\n'
done
printf '%s' "$results"
exit $failed

#!/usr/bin/env bash
# Each wheel of a folder in a clean environment, tested from outside the tree: the one for Linux has
# the C++ kernel, the one for machines of every kind says at its first call that it has none.
set -euo pipefail
tests=$(cd "$(dirname "$0")" && pwd)
wheels=$(cd "$1" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r "$tests" "$folder/tests"
cd "$folder"
"$PYTHON" -m venv venv
python=$folder/venv/bin/python
# Every pin but those with extras, which pip takes for no constraint.
grep -hE '^[A-Za-z0-9_.-]+==' "$tests"/../{constraints,requirements-demo,requirements-dev}.txt > pins.txt
$python -m pip install --quiet -c pins.txt "$TORCH"
for wheel in "$wheels"/*.whl; do
  echo "== $(basename "$wheel")"
  $python -m pip uninstall --quiet --yes neftune_kernels
  $python -m pip install --quiet -c pins.txt "${wheel}[test]"
  $python -c "import neftune_kernels as n, sys; assert n.__file__.startswith(sys.prefix), n.__file__"
  case $wheel in
    *-py3-none-any.whl)
      $python -W always -c "import torch, neftune_kernels as n
n.noisy_embedding(torch.zeros(1, 2).long(), torch.zeros(3, 4), 5.0)" 2>&1 | grep "has no C++ kernel here"
      ;;
    *) $python -c "import neftune_kernels as n; assert n.available_backends('cpu')['cpp'] == 'available'"
       export NEFTUNE_REQUIRE_CPP=1 ;;
  esac
  $python -m neftune_kernels --check
  $python -m pytest -q -p no:cacheprovider -o "markers=long: rarer cases" -m "not long" \
    tests/test_golden.py tests/test_backends.py tests/test_generator.py
  unset NEFTUNE_REQUIRE_CPP
done

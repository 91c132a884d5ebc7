#!/usr/bin/env bash
# Sets up, then runs every check: lint, format, types, tests.
#
#     bash launch/test.sh [pytest arguments]     e.g. bash launch/test.sh tests/test_optim.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh requirements-dev.txt

python=.venv/bin/python
echo "lint";  $python -m ruff check .
echo "format"; $python -m ruff format --check .
echo "types"; $python -m mypy

# Two workers, each with one thread: workers that each claim every core slow one another down.
export OMP_NUM_THREADS=1
exec $python -m pytest --numprocesses 2 --dist loadgroup "$@"

#!/bin/sh
# usage: ./install.sh [PYTHON]    makes .venv in this folder from the packages in wheels/, without a network, and examines this machine
set -eu
cd "$(dirname "$0")"
python=${1:-python3}
command -v "$python" >/dev/null || { echo "error: there is no $python here; name one: ./install.sh /usr/bin/python3.12" >&2; exit 2; }
found=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
case " @PYTHONS@ " in
*" $found "*) ;;
*) echo "error: $python is Python $found, and the packages here are for @PYTHONS@; name another: ./install.sh /usr/bin/python3.12" >&2; exit 2 ;;
esac
"$python" -m venv .venv || { echo "error: $python cannot make a virtual environment (Debian: apt install python3-venv); or install with pip: $python -m pip install --no-index --no-deps --find-links wheels --requirement requirements.txt" >&2; exit 2; }
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --require-hashes --find-links wheels --requirement requirements.txt
exec .venv/bin/python -m runtime.doctor artifact

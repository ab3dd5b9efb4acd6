#!/bin/sh
# usage: ./install.sh [PYTHON]
# Makes .venv in this folder from the packages in wheels/, without a network, and examines this machine.
set -eu
python=$(command -v "${1:-python3}") || {
    echo "error: there is no ${1:-python3} here; name another: ./install.sh /usr/bin/python3.12" >&2
    exit 2
}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")"
found=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
case " @PYTHONS@ " in
*" $found "*) ;;
*)
    echo "error: $python is Python $found, and the packages here are for @PYTHONS@;" \
        "name another: ./install.sh /usr/bin/python3.12" >&2
    exit 2
    ;;
esac
"$python" -m venv --clear .venv || {
    echo "error: $python cannot make a virtual environment (Debian: apt install python3-venv); or install with pip:" \
        "$python -m pip install --no-index --no-deps --find-links wheels --requirement requirements.txt" >&2
    exit 2
}
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --require-hashes \
    --find-links wheels --requirement requirements.txt
[ ! -d artifact ] || exec .venv/bin/python -m runtime.doctor artifact

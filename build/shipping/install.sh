#!/bin/sh
# usage: ./install.sh [--public-key FILE] [PYTHON]
# Checks every file of this folder against SHA256SUMS and, with a public key, the signature of that file. Then makes
# .venv from the packages in wheels/, without a network, and examines this machine. Its refusals exit with status 2.
set -eu
usage="usage: ./install.sh [--public-key FILE] [PYTHON]"

refuse() {
    echo "error: $*" >&2
    exit 2
}

key=
case "${1-}" in
--public-key)
    key=${2-}
    [ -n "$key" ] || refuse "--public-key names no file; $usage"
    shift 2
    ;;
--public-key=*)
    key=${1#*=}
    [ -n "$key" ] || refuse "--public-key names no file; $usage"
    shift
    ;;
-*) refuse "$1 is not known here; $usage" ;;
esac
[ $# -le 1 ] || refuse "there are $# arguments, expected at most the name of a Python; $usage"
case "$key" in
"" | /*) ;;
*) key=$(pwd)/$key ;;
esac
python=$(command -v "${1:-python3}") ||
    refuse "there is no ${1:-python3} here; name another: ./install.sh /usr/bin/python3.12"
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")"

for tool in sha256sum find awk; do
    command -v "$tool" >/dev/null || refuse "there is no $tool here, which checks the files before they run; install it"
done
[ -f SHA256SUMS ] || refuse "$(pwd)/SHA256SUMS is missing, which lists the files; unpack the shipped file again"

# 1. The signature, by a tool of this machine: nothing of this folder is used to check this folder.
if [ -n "$key" ]; then
    command -v openssl >/dev/null ||
        refuse "there is no openssl here, which checks the signature that --public-key asks for; install it"
    openssl pkeyutl -help 2>&1 | grep -q -e -rawin ||
        refuse "$(openssl version) cannot check an Ed25519 signature, expected OpenSSL 3.0 or newer;" \
            "check the shipped file on a machine that has it"
    [ -f SHA256SUMS.sig ] ||
        refuse "$(pwd) is not signed, but a signature by $key is required; ship it again with make ship KEY=..."
    { read -r kind encoded rest <"$key"; } 2>/dev/null || [ -n "${kind-}" ] || refuse "$key cannot be read"
    [ "$kind" = ed25519-public-key ] && [ ${#encoded} -eq 44 ] && [ -z "$rest" ] ||
        refuse "$key holds no ed25519-public-key; expected the one line that make keys wrote to signing.pub"
    scratch=$(mktemp -d 2>/dev/null) ||
        refuse "two small files cannot be written to ${TMPDIR:-/tmp}; set TMPDIR to another folder"
    trap 'rm -rf "$scratch"' EXIT
    # the twelve bytes before an Ed25519 key in the form of OpenSSL are sixteen characters of base64
    printf '%s\n' "-----BEGIN PUBLIC KEY-----" "MCowBQYDK2VwAyEA$encoded" "-----END PUBLIC KEY-----" >"$scratch/key.pem"
    sed -n '1s/^ed25519-signature //p' SHA256SUMS.sig | base64 -d >"$scratch/signature" 2>/dev/null || true
    openssl pkeyutl -verify -pubin -inkey "$scratch/key.pem" -rawin -in SHA256SUMS -sigfile "$scratch/signature" \
        >/dev/null 2>&1 ||
        refuse "$(pwd)/SHA256SUMS was changed after it was signed, or was signed by another key than $key;" \
            "do not use these files, and get them again from their maker"
fi

# 2. Every file: it is listed, a file and no link, and has its sum. Python's own caches of code would be run unchecked.
find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
if LC_ALL=C grep -q -v '^[0-9a-f]\{64\}  [A-Za-z0-9_]' SHA256SUMS; then
    refuse "$(pwd)/SHA256SUMS holds a line that is no sum and name; unpack the shipped file again"
fi
strange=$(find . -path ./.venv -type d -prune -o ! -type d ! -type f -print | head -n 1)
[ -z "$strange" ] ||
    refuse "$(pwd)/${strange#./} is neither a file nor a folder; remove it, or unpack the shipped file again"
unlisted=$(find . -path ./.venv -prune -o -type f -print | LC_ALL=C awk '
    NR == FNR { listed["./" substr($0, 67)] = 1; next }
    !($0 in listed) && $0 != "./SHA256SUMS" && $0 != "./SHA256SUMS.sig" { print; exit }' SHA256SUMS -)
[ -z "$unlisted" ] || refuse "$(pwd)/${unlisted#./} is not listed in SHA256SUMS, and might be run; remove it"
sha256sum -c SHA256SUMS >/dev/null 2>&1 || {
    damaged=$(LC_ALL=C sha256sum -c SHA256SUMS 2>/dev/null | grep -v ': OK$' | head -n 1)
    refuse "$(pwd)/${damaged%%: *} is missing or has not the sum in SHA256SUMS; unpack the shipped file again"
}

# 3. The packages. No setting of this machine has a say: neither Python's nor pip's environment, nor a file of pip's.
found=$("$python" -I -c 'import sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null) ||
    refuse "$python is no Python 3; name another: ./install.sh /usr/bin/python3.12"
case " @PYTHONS@ " in
*" $found "*) ;;
*)
    refuse "$python is Python $found, and the packages here are for @PYTHONS@;" \
        "name another: ./install.sh /usr/bin/python3.12"
    ;;
esac
install="pip --isolated install --quiet --disable-pip-version-check --no-index --no-deps --require-hashes"
install="$install --find-links wheels --requirement requirements.txt"
PIP_CONFIG_FILE=/dev/null
export PIP_CONFIG_FILE
"$python" -I -m venv --clear .venv >/dev/null 2>&1 ||
    refuse "$python cannot make a virtual environment in $(pwd) (Debian: apt install python3-venv); or install with" \
        "pip: $python -m $install"
# shellcheck disable=SC2086  # the words of $install are arguments
said=$(.venv/bin/python -I -m $install 2>&1) ||
    refuse "pip could not install the packages in $(pwd)/wheels ($(printf '%s\n' "$said" | tail -n 1));" \
        "check the space on this disk, or name another Python"
[ -d artifact ] || exit 0
[ -z "$key" ] || export RUNTIME_PUBLIC_KEY="$key"
[ -z "${scratch-}" ] || rm -rf "$scratch"
exec .venv/bin/python -E -m runtime.doctor artifact

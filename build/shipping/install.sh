#!/bin/sh
# usage: ./install.sh [--public-key FILE] [--no-doctor] [PYTHON]
# Checks every file of this folder against SHA256SUMS and, with a public key, the signature of that file. Then makes
# .venv from the packages in wheels/, without a network, and examines this machine, unless --no-doctor says that another
# one will run what is installed here. Its refusals exit with status 2.
set -eu
usage="usage: ./install.sh [--public-key FILE] [--no-doctor] [PYTHON]"

refuse() {
    echo "error: $*" >&2
    exit 2
}

# Whether openssl's library, called by this machine's Python, finds the signature good: 0 yes, 1 no, 3 it cannot tell.
good_by_library() {
    "$python" -I - "$encoded" SHA256SUMS "$scratch/signature" <<'END' 2>/dev/null
import base64, ctypes, ctypes.util, sys
library = ctypes.util.find_library("crypto")
if library is None:
    sys.exit(3)
crypto = ctypes.CDLL(library)
for maker in (crypto.EVP_PKEY_new_raw_public_key, crypto.EVP_MD_CTX_new):
    maker.restype = ctypes.c_void_p
ed25519, size, pointer = 1087, ctypes.c_size_t, ctypes.c_void_p
key, data, signature = base64.b64decode(sys.argv[1]), open(sys.argv[2], "rb").read(), open(sys.argv[3], "rb").read()
public = crypto.EVP_PKEY_new_raw_public_key(ed25519, None, key, size(len(key)))
context = pointer(crypto.EVP_MD_CTX_new())
if not public or crypto.EVP_DigestVerifyInit(context, None, None, None, pointer(public)) != 1:
    sys.exit(3)
good = crypto.EVP_DigestVerify(context, signature, size(len(signature)), data, size(len(data))) == 1
sys.exit(0 if good else 1)
END
}

key=
doctor=yes
while [ $# -gt 0 ]; do
    case "$1" in
    --public-key)
        key=${2-}
        [ -n "$key" ] || refuse "--public-key names no file; $usage"
        shift
        ;;
    --public-key=*)
        key=${1#*=}
        [ -n "$key" ] || refuse "--public-key names no file; $usage"
        ;;
    --no-doctor) doctor= ;;
    -*) refuse "$1 is not known here; $usage" ;;
    *) break ;;
    esac
    shift
done
[ $# -le 1 ] || refuse "there are $# arguments, expected at most the name of a Python; $usage"
case "$key" in
"" | /*) ;;
*) key=$(pwd)/$key ;;
esac
python=$(command -v "${1:-python3}") ||
    refuse "there is no ${1:-python3} here; name another: ./install.sh /usr/bin/python3.12"
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")"

for tool in sha256sum find awk grep sed head base64 mktemp; do
    command -v "$tool" >/dev/null || refuse "there is no $tool here, which the check of the files needs; install it"
done
[ -f SHA256SUMS ] || refuse "$(pwd)/SHA256SUMS is missing, which lists the files; unpack the shipped file again"

# 1. The signature, by a tool of this machine: nothing of this folder is used to check this folder.
if [ -n "$key" ]; then
    command -v openssl >/dev/null ||
        refuse "there is no openssl here, which checks the signature that --public-key asks for; install it"
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
    status=0
    if openssl pkeyutl -help 2>&1 | grep -q -e -rawin; then
        openssl pkeyutl -verify -pubin -inkey "$scratch/key.pem" -rawin -in SHA256SUMS -sigfile "$scratch/signature" \
            >/dev/null 2>&1 || status=1
    else # OpenSSL 1.1.1 has Ed25519 in its library alone
        good_by_library || status=$?
    fi
    [ $status -le 1 ] ||
        refuse "$(openssl version) cannot check an Ed25519 signature here, expected OpenSSL 1.1.1 or newer with its" \
            "library; check the shipped file on a machine that has it"
    [ $status -eq 0 ] ||
        refuse "$(pwd)/SHA256SUMS was changed after it was signed, or was signed by another key than $key;" \
            "do not use these files, and get them again from their maker"
fi

# 2. Every file: it is listed, a file and no link, and has its sum. Python's own caches of code would be run unchecked.
find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null ||
    refuse "the folders __pycache__ in $(pwd) cannot be removed; run this as the owner of the folder"
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
    refuse "$(pwd)/${damaged%%: *} is missing or does not have its sum in SHA256SUMS; unpack the shipped file again"
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
install="pip --isolated install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --require-hashes"
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

# 4. Python's caches of code, for what the commands import and nothing else: half of the packages' code is never run.
for command in generate gpucheck server.process; do
    .venv/bin/python -E -c "import runtime.$command" >/dev/null 2>&1 || true
done
[ -d artifact ] && [ -n "$doctor" ] || exit 0
[ -z "$key" ] || export RUNTIME_PUBLIC_KEY="$key"
[ -z "${scratch-}" ] || rm -rf "$scratch"
exec .venv/bin/python -E -m runtime.doctor artifact

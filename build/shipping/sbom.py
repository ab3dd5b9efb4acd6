"""What is in the shipped file, as a CycloneDX bill of materials that tools for licences and vulnerabilities read.

The same contents give the same bytes: there is no time in it, and its serial number is made from its contents.
"""

import hashlib
import json
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from build.shipping.archive import Member
from build.shipping.lock import ROOT, canonical
from runtime.artifact.manifest import Manifest
from runtime.artifact.targets import TARGETS

SBOM_FILE = "sbom.cdx.json"
SPEC_VERSION = "1.5"
OWN_NAME, OWN_LICENCE = "mistral-aot-runtime", [{"license": {"id": "Apache-2.0"}}]
LONGEST_LICENCE = 100  # characters; some packages put a licence's whole text where its name belongs

Component = dict[str, Any]


def bill_of_materials(name: str, members: Mapping[str, Member], manifest: Manifest | None) -> bytes:
    """The bill for an archive's members; `manifest` is that of its artifact, if it has one."""
    components = [*_wheels(members), *_libraries(members), _runtime(members)]
    model = {path: member for path, member in members.items() if path.startswith("artifact/")}
    if manifest is not None:
        components.append(_artifact(manifest, model))
    others = {path: member for path, member in members.items() if path.startswith("checks/")}
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": name,
                "name": name,
                "version": str(0 if manifest is None else manifest.build_number),
            }
        },
        "components": components + [_file(path, member) for path, member in sorted(others.items())],
    }
    serial = uuid5(NAMESPACE_URL, hashlib.sha256(json.dumps(content).encode()).hexdigest())
    return json.dumps({**content, "serialNumber": f"urn:uuid:{serial}"}, indent=1).encode() + b"\n"


def _wheels(members: Mapping[str, Member]) -> Iterator[Component]:
    for path, member in sorted(members.items()):
        if path.startswith("wheels/") and isinstance(member.source, Path):
            fields = _metadata(member.source)
            file = f"?file_name={quote(member.source.name)}"
            yield _package(fields["Name"], fields["Version"], file, path, member, licences(fields))


def _libraries(members: Mapping[str, Member]) -> Iterator[Component]:
    """TVM's runtime and, for CUDA, NVIDIA's, which are single files out of packages of this host."""
    for path, member in sorted(members.items()):
        if path.startswith("runtime/lib/") and ".so" in path and isinstance(member.source, Path):
            package, place = _owner(member.source)
            fields = HeaderParser().parsestr(package.read_text("METADATA") or "")
            yield _package(package.name, package.version, f"#{quote(place)}", path, member, licences(fields))


def _package(name: str, number: str, which: str, path: str, member: Member, found: list[Component]) -> Component:
    """A package, or the file in it that the end of its URL says; it lies in the archive under `path`."""
    purl = f"pkg:pypi/{canonical(name)}@{quote(number, safe='')}{which}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": number,
        "hashes": _hashes(member),
        **({"licenses": found} if found else {}),
        "purl": purl,
        "properties": [{"name": "path", "value": path}],
    }


def _runtime(members: Mapping[str, Member]) -> Component:
    """The project's own code, with every file of it."""
    files = {
        path: member
        for path, member in members.items()
        if path == "install.sh" or (path.startswith("runtime/") and not path.startswith("runtime/lib/"))
    }
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return {
        "type": "application",
        "bom-ref": OWN_NAME,
        "name": OWN_NAME,
        "version": own,
        "licenses": OWN_LICENCE,
        "components": [_file(path, member) for path, member in sorted(files.items())],
    }


def _artifact(manifest: Manifest, files: Mapping[str, Member]) -> Component:
    """The compiled model. The sum is its manifest's, which lists the sums of all its files."""
    return {
        "type": "machine-learning-model",
        "bom-ref": f"artifact:{manifest.name}",
        "name": manifest.name,
        "version": str(manifest.build_number),
        "hashes": _hashes(files["artifact/manifest.json"]),
        "properties": [
            {"name": "build_key", "value": manifest.build_key},
            {"name": "quantization", "value": manifest.quantization.label},
            {"name": "family", "value": manifest.model.family},
            *({"name": f"tool:{tool}", "value": number} for tool, number in sorted(manifest.tools.items())),
        ],
        "components": [_file(path, member) for path, member in sorted(files.items())],
    }


def _file(path: str, member: Member) -> Component:
    return {"type": "file", "bom-ref": path, "name": path, "hashes": _hashes(member)}


def _hashes(member: Member) -> list[Component]:
    return [{"alg": "SHA-256", "content": member.sha256}]


def licences(fields: Message) -> list[Component]:
    """The licence that a package's metadata states, in the newest of the three fields that it fills in."""
    if expression := fields.get("License-Expression"):
        return [{"expression": expression}]
    name = (fields.get("License") or "").strip()
    if name and len(name) <= LONGEST_LICENCE and "\n" not in name and name != "UNKNOWN":
        return [{"license": {"name": name}}]
    stated = [each for each in fields.get_all("Classifier") or () if each.startswith("License :: ")]
    return [{"license": {"name": each.rpartition(" :: ")[2]}} for each in stated]


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA") and each.count("/") == 1)
        return HeaderParser().parsestr(archive.read(name).decode())


def _owner(library: Path) -> tuple[Distribution, str]:
    """The installed package that a library comes from, and its place there."""
    for name in ("apache-tvm", *(package for target in TARGETS.values() for package in target.packages)):
        found = distribution(name)
        for file in found.files or ():
            if file.name == library.name:
                return found, str(file)
    raise AssertionError(f"{library} is in none of the packages that a target names")

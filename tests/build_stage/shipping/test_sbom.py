"""The bill of materials in the shipped form: what CycloneDX 1.5 requires, and every file under its own sum."""

import json
import re
import zipfile
from email.message import Message

import msgspec
import pytest

from build.shipping import ship
from build.shipping.archive import Member
from build.shipping.sbom import SBOM_FILE, bill_of_materials, licences
from runtime.artifact.folder import Artifact
from tests.helpers.shipped import PYTHON

# of the specification's JSON schema, for what we write
TYPES = {"application", "library", "file", "machine-learning-model"}
COMPONENT_FIELDS = {
    *("type", "bom-ref", "name", "version", "hashes", "licenses", "purl", "properties", "components"),
}
SERIAL = r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = tmp_path_factory.mktemp("wheels") / "Some_Thing-1.0+x-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        text = "Metadata-Version: 2.4\nName: Some_Thing\nVersion: 1.0+x\nLicense-Expression: MIT\n\nText\n"
        archive.writestr("Some_Thing-1.0+x.dist-info/METADATA", text)
        archive.writestr("some/vendored.dist-info/METADATA", "Name: other\n")
    return path


@pytest.fixture(scope="module", params=["llvm", "cuda"])
def contents(request, compile_case, wheel):
    """The members of an archive for each target, and its bill."""
    artifact = Artifact.open(compile_case("windowed").artifact)
    target = msgspec.structs.replace(artifact.manifest.target, kind=request.param)
    artifact = Artifact(artifact.folder, msgspec.structs.replace(artifact.manifest, target=target, build_number=17))
    members = ship.members_of(artifact, [wheel], [PYTHON])
    return members, json.loads(members[SBOM_FILE].source)


def every(component):
    yield component
    for part in component.get("components", ()):
        yield from every(part)


def test_it_has_what_the_specification_requires(contents):
    _, bill = contents
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["specVersion"] == "1.5"
    assert bill["version"] == 1
    assert re.fullmatch(SERIAL, bill["serialNumber"])
    assert bill["metadata"]["component"] == {
        "type": "application",
        "bom-ref": "windowed",
        "name": "windowed",
        "version": "17",
    }
    components = [part for component in bill["components"] for part in every(component)]
    references = [part["bom-ref"] for part in components]
    assert len(set(references)) == len(references)
    for part in components:
        assert part.keys() <= COMPONENT_FIELDS
        assert part["type"] in TYPES
        assert part["name"]
        assert all(each["alg"] == "SHA-256" for each in part.get("hashes", ()))
        assert all(each.keys() in ({"license"}, {"expression"}) for each in part.get("licenses", ()))


def test_every_file_is_in_it_with_its_sum(contents):
    members, bill = contents
    components = [part for component in bill["components"] for part in every(component)]
    told = {
        next((field["value"] for field in part.get("properties", ()) if field["name"] == "path"), part["name"]): part
        for part in components
    }
    texts = {"requirements.txt", SBOM_FILE}  # made of what the bill lists
    files = {path for path in members if path not in texts and not path.startswith("runtime/lib/LICENSE")}
    assert files <= told.keys()
    for path in files:
        assert told[path]["hashes"] == [{"alg": "SHA-256", "content": members[path].sha256}]


def test_packages_have_a_purl_a_version_and_a_licence(contents):
    members, bill = contents
    packages = {part["name"]: part for part in bill["components"] if part["type"] == "library"}
    thing = packages["Some_Thing"]
    assert thing["purl"] == "pkg:pypi/some-thing@1.0%2Bx?file_name=Some_Thing-1.0%2Bx-py3-none-any.whl"
    assert thing["version"] == "1.0+x"
    assert thing["licenses"] == [{"expression": "MIT"}]
    assert re.fullmatch(r"pkg:pypi/apache-tvm@[\w.]+#[\w./]*/libtvm_runtime\w*\.so", packages["apache-tvm"]["purl"])
    assert packages["apache-tvm"]["licenses"]
    assert ("nvidia-cuda-runtime" in packages) == ("runtime/lib/libcudart.so.13" in members)


def test_the_artifact_is_a_model(contents):
    members, bill = contents
    (model,) = (part for part in bill["components"] if part["type"] == "machine-learning-model")
    assert (model["name"], model["version"]) == ("windowed", "17")
    assert model["hashes"][0]["content"] == members["artifact/manifest.json"].sha256
    assert {part["name"] for part in model["components"]} >= {"artifact/library.so", "artifact/weights.safetensors"}


def test_the_same_contents_give_the_same_bytes_and_others_another_serial_number():
    one = bill_of_materials("x", {"install.sh": Member(b"a", "runtime")}, None)
    assert one == bill_of_materials("x", {"install.sh": Member(b"a", "runtime")}, None)
    two = bill_of_materials("x", {"install.sh": Member(b"b", "runtime")}, None)
    assert json.loads(one)["serialNumber"] != json.loads(two)["serialNumber"]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ([("License-Expression", "MIT OR Apache-2.0"), ("License", "x")], [{"expression": "MIT OR Apache-2.0"}]),
        (
            [("License", "BSD"), ("Classifier", "License :: OSI Approved :: MIT License")],
            [{"license": {"name": "BSD"}}],
        ),
        (
            [("License", "A whole text\nof a licence"), ("Classifier", "License :: OSI Approved :: MIT License")],
            [{"license": {"name": "MIT License"}}],
        ),
        ([("License", "UNKNOWN"), ("Classifier", "Topic :: x")], []),
    ],
)
def test_a_licence_is_taken_from_the_newest_field(fields, found):
    message = Message()
    for name, value in fields:
        message[name] = value
    assert licences(message) == found

"""The official clients for JavaScript, in Node.js: `npm/clients.mjs` asserts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.server.settings import Keys
from tests.helpers.scripted_service import scripted
from tests.helpers.serving import NAME, running

NPM = Path(__file__).parent / "npm"
KEY = "secret"
REPLIES = 9  # more than the script asks for


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with exactly the packages of package-lock.json, whose scripts are not run."""
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(NPM / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder


def test_the_clients_get_what_the_server_says(packages):
    with running(scripted(*["Bonjour, ça va ?"] * REPLIES), keys=Keys((KEY.encode(),))) as server:
        command = ["node", NPM / "clients.mjs", server.address, NAME, KEY, packages]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout + found.stderr

"""The image under an OCI engine: what is in it, and its entry point under a stranger's id."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from built import Built
from micro_job import MicroRun, write_recipe
from tools import Tools

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STRANGER = 23456  # a user id that the image does not know
_NAME = f"critic-test-{os.getpid()}"  # tests of another checkout may run too
_RECIPE = "/opt/critic/configs/pretrain/arithmetic.yaml"
_LOCKED = ("--rm", "--read-only", "--network", "none", "--user", f"{STRANGER}:{STRANGER}")


def _inside(tools: Tools, image: str, program: str, *arguments: str) -> str:
    command = ["podman", "run", *_LOCKED, "--entrypoint", program, image, *arguments]
    return tools.output(*command)


@contextmanager
def _started(tools: Tools, image: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The image's default command, for the length of the body."""
    command = ["podman", "run", *_LOCKED, "--name", _NAME, *options, image]
    environment = dict(tools.environment)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            tools.run("podman", "rm", "--force", "--time", "0", _NAME)


def _wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < limit, "nothing for a quarter of an hour"
        time.sleep(0.1)


# What is in it


_EXTENSION = """
import pathlib, subprocess, sys, sysconfig, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
source = folder / "launcher.c"
source.write_text(
    "#include <Python.h>\\n"
    "static struct PyModuleDef m = {PyModuleDef_HEAD_INIT, \\"launcher\\"};"
    "PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&m); }"
)
include = sysconfig.get_path("include")
library = folder / "launcher.so"
flags = ["-shared", "-fPIC", f"-I{include}"]
subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
sys.path.insert(0, str(folder))
import launcher
print("built", launcher.__name__)
"""


def test_what_torch_compile_builds_at_run_time_can_be_built(tools: Tools, image: str) -> None:
    """An extension of Python in C, as Triton makes one for each kernel."""
    assert _inside(tools, image, "python", "-c", _EXTENSION).strip() == "built launcher"


# The entry point


def test_without_arguments_the_main_job_trains_and_a_signal_saves_it(
    tools: Tools, image: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    run = MicroRun(tmp_path / "runs/local/n0")
    recipe = tmp_path / "arithmetic.yaml"
    write_recipe(recipe, ["out=runs/local/trunk"])
    here = ["--volume", f"{tmp_path}:/data", "--workdir", "/data"]
    here += ["--volume", f"{recipe}:{_RECIPE}:ro"]
    # one thread: two that wait for each other take minutes on a machine that has other work
    here += ["--env", "OMP_NUM_THREADS=1"]
    with _started(tools, image, *here) as process:  # it pre-trains its trunk first
        _wait_until(lambda: run.step >= 3, process)
        tools.output("podman", "kill", "--signal", "TERM", _NAME)
        assert process.wait(60) == 75
    assert run.status["state"] == "stopped"
    assert run.checkpoints
    assert run.path.stat().st_uid == STRANGER
    assert not (tmp_path / "runs/local/n2").exists()


def test_where_the_working_folder_is_read_only_it_says_where_the_runs_go(
    tools: Tools, image: str
) -> None:
    with _started(tools, image) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
    assert "its runs go to /tmp/critic-run-" in said


def test_an_unknown_command_names_those_that_there_are(tools: Tools, image: str) -> None:
    done = tools.run("podman", "run", *_LOCKED, image, "trian", "--config", "x.yaml")
    assert done.returncode == 78
    assert "no command 'trian'" in done.stderr
    known = done.stderr.split("there are:")[1].split("(")[0].split()
    folders = (file.parent.name for file in (ROOT / "job").glob("*/__main__.py"))
    alone = (file.stem for file in (ROOT / "job").glob("*.py") if file.stem != "__init__")
    assert sorted(known) == sorted((*folders, *alone))


def test_a_configuration_that_does_not_exist_ends_with_the_code_for_wrong_input(
    tools: Tools, image: str
) -> None:
    done = tools.run("podman", "run", *_LOCKED, image, "train", "--config", "x.yaml")
    assert done.returncode == 78
    assert "x.yaml" in done.stderr


# What is in it


def test_its_settings_leave_nccl_to_the_job_and_homes_and_checkouts_outside(
    tools: Tools, image: str
) -> None:
    (config,) = json.loads(tools.output("podman", "image", "inspect", image))
    variables = dict(line.split("=", 1) for line in config["Config"]["Env"])
    assert not [name for name in variables if name.startswith("NCCL")]
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert variables["PYTHONNOUSERSITE"] == variables["PYTHONSAFEPATH"] == "1"
    assert not [name for name in variables if name.startswith(("PIP_", "TORCH"))]
    assert int(config["Config"]["User"].partition(":")[0]) > 0


def test_its_labels_and_its_files_name_the_same_commit_and_version(
    tools: Tools, image: str, built: Built
) -> None:
    (config,) = json.loads(tools.output("podman", "image", "inspect", image))
    labels = config["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == built.facts["commit"]
    assert labels["org.opencontainers.image.version"] == built.facts["version"]
    assert _inside(tools, image, "cat", "/opt/critic/COMMIT").strip() == built.facts["commit"]
    python = "import job; print(job.__version__)"
    assert _inside(tools, image, "python", "-c", python).strip() == built.facts["version"]


def test_nothing_in_it_makes_anybody_root_and_nothing_lies_in_roots_home(
    tools: Tools, image: str
) -> None:
    search = r"find / -xdev -type f '(' -perm /6000 -o -path '/root/*' ')' -printf '%P\n'"
    as_root = ["podman", "run", "--rm", "--user", "0:0", "--entrypoint", "sh", image]
    found = tools.output(*as_root, "-c", search).split()
    assert set(found) <= {"root/.bashrc", "root/.profile"}  # Debian's own


def test_the_bill_of_materials_lists_every_package_of_the_image(
    tools: Tools, image: str, built: Built
) -> None:
    listed = json.loads(_inside(tools, image, "pip", "--no-cache-dir", "list", "--format", "json"))
    installed = {f"{p['name']}=={p['version']}" for p in listed if p["name"] != "critic-job"}
    parts = built.contents["components"]
    python = {f"{p['name']}=={p['version']}" for p in parts if p["purl"].startswith("pkg:pypi/")}
    assert python == installed
    debian = {p["name"] for p in parts if p["purl"].startswith("pkg:deb/debian/")}
    assert {"libc6", "python3.11"} <= debian


def test_every_package_has_the_version_that_the_checkout_pins(built: Built) -> None:
    files = ("constraints.txt", "containers/cuda13.txt")
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    pins = {name.lower(): version for name, _, version in (x.partition("==") for x in lines)}
    parts = [p for p in built.contents["components"] if p["purl"].startswith("pkg:pypi/")]
    # a build of torch adds its suffix; pip is the one that Debian's venv has
    found = {p["name"].lower(): p["version"].partition("+")[0] for p in parts if p["name"] != "pip"}
    assert found == {name: pins.get(name) for name in found}


@pytest.mark.skipif("SOAK" not in os.environ, reason="minutes: `make soak` builds twice")
def test_two_builds_of_a_commit_have_the_same_packages(built: Built, built_again: Built) -> None:
    assert built_again.facts["packages_sha256"] == built.facts["packages_sha256"]
    assert built_again.contents["components"] == built.contents["components"]

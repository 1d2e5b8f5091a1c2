"""A Python that is too old, or without the project's packages, is told the way out in one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from job.common.packages import require

ROOT = Path(__file__).parents[2]
BAD_INPUT = 78
READ_BY_ANY_PYTHON = ("job/__init__.py", "slurm/submit.py", "slurm/nightly.py")
# Syntax that Python 2.7 has not, beyond what `feature_version` knows.
NEWER = (
    ast.JoinedStr,
    ast.AnnAssign,
    ast.Starred,
    ast.Nonlocal,
    ast.YieldFrom,
    ast.AsyncFunctionDef,
)
COMMANDS = ("train", "score", "report", "memory", "preflight", "pretrain", "compare", "export")


def _old(version: tuple[int, ...], *command: str) -> subprocess.CompletedProcess[str]:
    """A command in this Python, which says of itself to be an older one."""
    code = (
        f"import runpy, sys; sys.version_info = {version}; sys.argv = {list(command)}; "
        f"runpy.run_path(sys.argv[0], run_name='__main__') if sys.argv[0].endswith('.py') "
        "else runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    line = [sys.executable, "-c", code]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 15), (3, 10, 14)])
@pytest.mark.parametrize("command", ["slurm/submit.py", "slurm/nightly.py", "job.train"])
def test_a_python_that_is_too_old_is_told_so_in_one_line(
    command: str, version: tuple[int, ...]
) -> None:
    ended = _old(version, command, "--help")
    assert (ended.returncode, ended.stdout) == (BAD_INPUT, "")
    (said,) = ended.stderr.splitlines()
    assert "Python 3.11 or newer is needed" in said
    assert f"{sys.executable} is Python {'.'.join(map(str, version))}:" in said


@pytest.mark.parametrize("name", READ_BY_ANY_PYTHON)
def test_what_says_that_a_python_is_too_old_can_be_read_by_it(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text("ascii"), feature_version=(3, 4))
    for node in ast.walk(tree):
        assert not isinstance(node, NEWER), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__"
        if isinstance(node, ast.arguments):
            assert node.posonlyargs + node.kwonlyargs == []
            assert not any(argument.annotation for argument in node.args)
        assert getattr(node, "returns", None) is None


@pytest.mark.parametrize("name", READ_BY_ANY_PYTHON)
def test_the_version_is_looked_at_before_anything_newer_is_imported(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    imported = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        for alias in getattr(node, "names", ())
    ]
    expected = {"job/__init__.py": ["sys", "job.common.packages"]}
    assert imported == expected.get(name, ["os", "sys", "job"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_is_missing_and_what_to_do_in_one_line(command: str) -> None:
    # -S: without any installed package; -P and -E: nothing of the caller's either
    line = [sys.executable, "-S", "-E", "-m", f"job.{command}"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == BAD_INPUT
    (said,) = ended.stderr.splitlines()
    assert "no module named 'omegaconf'" in said
    assert "`make run` puts them into .venv" in said
    assert ".venv/bin/python -m job.train" in said


def test_a_package_that_is_missing_is_the_same_on_each_node(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        require("no_such_package")
    assert ended.value.code == BAD_INPUT
    assert "no module named 'no_such_package'" in capsys.readouterr().err

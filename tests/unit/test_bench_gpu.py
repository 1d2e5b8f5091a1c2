"""The GPU benchmark: few packages, and sections that stand alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

from job.common.schema import CriticConfig
from job.distributed.world import World

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import gpu_training  # noqa: E402
from gpu_training import covered, kind_of  # noqa: E402

_BLOCKED = "rich mlflow matplotlib pyarrow tokenizers transformers sentencepiece scipy psutil"
_IMPORT = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED.split()}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(BENCH)!r})
import gpu
"""
ON_CPU = ("--device", "cpu", "--shape", "micro")


def _options(**changes: Any) -> argparse.Namespace:
    given = {"shape": "micro", "device": "cpu", "seed": 0, "scratch": None, "budget": 600.0}
    return argparse.Namespace(**given | {"out": None, "only": None} | changes)


def _run(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / "gpu.py"), *ON_CPU, "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(out.read_text()))


@pytest.mark.slow
def test_the_benchmark_needs_none_of_the_large_packages() -> None:
    subprocess.run([sys.executable, "-c", _IMPORT], check=True, timeout=120)


@pytest.mark.slow
def test_what_fails_or_lasts_too_long_takes_only_its_own_section() -> None:
    broken = gpu.Section("of no name that it would find", gpu.machine, 60)
    slow = gpu.Section("machine", gpu.machine, 0.01)
    assert "ValueError" in gpu._answer(broken, 600, _options())["failed"]
    assert gpu._answer(slow, 600, _options())["failed"].startswith("not done after")


SILENT = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
TALKATIVE = "print('[1, 2]'); print('a warning of some library')"
SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def _is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which has an empty command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _answer_of(script: str, tmp_path: Path, patch: pytest.MonkeyPatch, seconds: float) -> Any:
    file = tmp_path / "section.py"
    file.write_text(script)
    patch.setattr(gpu, "__file__", str(file))
    return gpu._in_a_process(gpu.Section("one", gpu.machine, 60), seconds, _options())


def test_a_section_that_ends_without_a_word_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _answer_of(SILENT, tmp_path, monkeypatch, 60)
    assert found == {"failed": "exit code -9", "exit_code": -9}
    assert "one: FAILED: exit code -9" in gpu.page({"one": found})
    assert _answer_of("", tmp_path, monkeypatch, 60)["failed"] == "exit code 0"
    assert _answer_of(TALKATIVE, tmp_path, monkeypatch, 60) == {"found": [1, 2]}


@pytest.mark.slow
def test_a_section_that_lasts_too_long_ends_with_its_processes_and_keeps_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = _answer_of(SLOW, tmp_path, monkeypatch, 6)
    assert answer["failed"] == "not done after 6 s"
    wait_for(lambda: not _is_alive(answer["found"]))
    page = gpu.page({"one": answer})
    assert f"one: {answer['found']}" in page
    assert "one: FAILED: not done after 6 s" in page


def test_no_section_begins_when_the_time_is_over() -> None:
    section = gpu.Section("machine", gpu.machine, 60)
    assert gpu._answer(section, 3.0, _options()) == {"left_out": "3 of 600 seconds were left"}


def test_results_are_there_before_the_next_section_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "results.json", []

    def answer(section: gpu.Section, left: float, options: argparse.Namespace) -> dict[str, Any]:
        seen.append([*json.loads(out.read_text())["sections"]] if out.exists() else [])
        return {"failed": "an error"} if section.name == "machine" else {"found": {}}

    monkeypatch.setattr(gpu, "_answer", answer)
    record = gpu._run(_options(out=out, only=["machine", "matrix", "attention"]))
    assert seen == [[], ["machine"], ["machine", "matrix products"]]
    assert json.loads(out.read_text())["sections"] == record["sections"]
    assert "machine: FAILED: an error" in out.with_suffix(".md").read_text()


def test_sections_have_names_of_their_own_and_the_first_fit_the_ten_minutes() -> None:
    sections = gpu.sections("7b")
    assert len({section.name for section in sections}) == len(sections)
    most_wanted = sections[: [s.name for s in sections].index("main job") + 1]
    assert sum(section.seconds for section in most_wanted) < 1.3 * gpu.BUDGET


def test_what_one_gpu_does_by_default_is_measured_before_the_main_job() -> None:
    names = [section.name for section in gpu.sections("7b")]
    default = names.index("training, N=4, compiled, REPLICATE_FROZEN")
    assert default < names.index("main job")
    compiled = {name.split(", ")[1] for name in names if name.endswith(", compiled")}
    assert compiled == {"N=0", "N=2", "N=4", "N=8"}


def test_sections_have_the_workspaces_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != workspace})
    look = gpu.Section("look", lambda _: os.environ.get(workspace), 60)
    monkeypatch.setattr(gpu, "sections", lambda shape: [look])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--section", "look"])
    monkeypatch.setattr(gpu, "run_and_leave", lambda answer: sys.exit(answer()))
    with pytest.raises(SystemExit):
        gpu.main()
    assert capsys.readouterr().out == '":4096:8"\n'


def test_kernels_are_compiled_as_those_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(config: CriticConfig, world: World) -> None:
        asked.append((config.training.compile, config.training.deterministic))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_training, "set_up_torch", lambda config: None)
    monkeypatch.setattr(gpu_training, "choose_compilation", note)
    for compiled in (True, False):
        with pytest.raises(KeyboardInterrupt):
            gpu_training.measure(gpu_training.Case(0, compiled=compiled), "micro", 0, None)
    assert asked == [(True, True), (False, True)]


def test_kernels_by_kind() -> None:
    names = {
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn": "matrix products",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matrix products",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
        "at::native::vectorized_layer_norm_kernel<float, float, true>": "norms",
        "triton_poi_fused_mul_silu_0": "compiled",
        "Memcpy DtoD (Device -> Device)": "copies",
        "at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "at::native::vectorized_elementwise_kernel<4, MulFunctor>": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def test_time_in_which_something_ran_counts_once() -> None:
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
    assert covered([]) == 0


@pytest.mark.slow
def test_a_case_runs_to_its_record_and_page(tmp_path: Path) -> None:
    record = _run(tmp_path / "micro.json", "--only", "products", "of 300", "--budget", "3000")
    assert record["sections"].keys() == {"matrix products", "training, N=4, sequences of 300"}
    found = record["sections"]["training, N=4, sequences of 300"]["found"]
    assert found["stages"].keys() == {"before", "loaded", "backward", "update", "peak"}
    assert len(found["seconds_per_step"]) == 5
    assert found["tokens_per_second"] > 0
    page = (tmp_path / "micro.md").read_text()
    assert "| N=4, sequences of 300 |" in page


@pytest.mark.all
def test_everything_runs_at_micro_shape(tmp_path: Path) -> None:
    record = _run(tmp_path / "micro.json", "--budget", "6000")
    names = [section.name for section in gpu.sections("micro")]
    assert [*record["sections"]] == names
    found = {name: record["sections"][name]["found"] for name in names}
    saving = found["training, N=4"]["saving"]
    # float32 masters and two moments of four blocks: 12 bytes a parameter
    trained = found["training, N=4"]["predicted"]["after_backward"]["masters"] / 4
    assert saving["bytes"] == pytest.approx(12 * trained, rel=0.1)
    assert all(row["bfloat16"][0] < 0.02 for row in found["attention"])
    assert found["same bits"]["deterministic"]["run again"]
    assert found["same bits"]["deterministic"]["resumed"]
    assert found["main job"]["status"] == "finished"

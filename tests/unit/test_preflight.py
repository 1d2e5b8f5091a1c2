"""Preflight: each fault is found, named, and told apart: this node's, or the input's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import running
from micro_job import write_job

from job.common import places
from job.common.config import load_config
from job.common.errors import Exit, StorageError
from job.common.schema import CriticConfig
from job.distributed import links
from job.training import fitness
from job.training.fitness import Finding, raise_worst, unfit

GOOD, UNFIT, WRONG = Exit.FINISHED, Exit.UNFIT_NODE, Exit.BAD_INPUT


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CriticConfig:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    return load_config(CriticConfig, "critic.yaml")


def _found(
    config: CriticConfig, *, gpus: int = 0, scratch: Path | None = None
) -> dict[str, Finding]:
    return {one.name: one for one in fitness.of_this_node(config, gpus, scratch)}


def test_a_node_without_fault_has_none(config: CriticConfig, tmp_path: Path) -> None:
    found = _found(config, scratch=tmp_path / "scratch")
    assert [one.name for one in found.values() if one.fault is not GOOD] == []
    assert str(found["scratch"]).startswith(f"ok  scratch: {tmp_path}/scratch: ")
    assert found["packages"].seen.startswith(f"torch {torch.__version__} from ")


def test_too_few_gpus(config: CriticConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    found = _found(config, gpus=4)["GPUs"]
    assert (found.fault, found.seen) == (
        UNFIT,
        "3 visible of 4 asked for (CUDA_VISIBLE_DEVICES: 0,1,2)",
    )
    assert _found(config, gpus=3)["GPUs"].fault is GOOD


Driver = Callable[[str, int], None]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Pretends a driver, at the library's boundary, under a torch built with CUDA 13.0."""

    def install(version: str, cuda: int) -> None:
        answers = SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlSystemGetDriverVersion=lambda: version,
            nvmlSystemGetCudaDriverVersion=lambda: cuda,
        )
        monkeypatch.setitem(__import__("sys").modules, "pynvml", answers)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return install


def test_a_driver_older_than_torch_s_cuda(config: CriticConfig, driver: Driver) -> None:
    driver("570.86.15", 12080)
    found = _found(config, gpus=1)["driver"]
    assert found.fault is UNFIT
    assert found.seen == "570.86.15, up to CUDA 12.8; torch is built with CUDA 13.0"


def test_a_driver_that_is_new_enough(config: CriticConfig, driver: Driver) -> None:
    driver("580.65.06", 13000)
    assert _found(config, gpus=1)["driver"].fault is GOOD


def test_no_driver_is_a_fault_only_where_gpus_are_needed(
    config: CriticConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # the real NVML library is not here
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a driver")
    assert _found(config, gpus=1)["driver"].fault is UNFIT
    assert _found(config)["driver"].fault is GOOD


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({}, GOOD),
        ({"APPTAINER_CONTAINER": "/a.sif"}, WRONG),
        ({"SINGULARITY_CONTAINER": ""}, WRONG),
    ],
)
def test_packages_of_the_home_directory_are_wrong_in_an_image_alone(
    config: CriticConfig,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    fault: Exit,
) -> None:
    home = str(Path(torch.__file__).parents[1])
    monkeypatch.setattr(fitness.site, "getusersitepackages", lambda: home)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = _found(config)["packages"]
    assert found.fault is fault  # the same on each node: none is unfit
    assert ("PYTHONNOUSERSITE" in found.advice) == bool(variables)


def test_a_scratch_folder_that_cannot_be_made(config: CriticConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = _found(config, scratch=tmp_path / "file" / "scratch")["scratch"]
    assert (found.fault, found.seen) == (
        UNFIT,
        f"cannot write in {tmp_path}/file/scratch: Not a directory",
    )


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full")
def test_a_full_disk(config: CriticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115, PTH123
    found = _found(config)["run.dir"]
    assert found.fault is Exit.IO_FAILED  # on each node: none is to be avoided for it
    assert "No space left on device (disk /" in found.seen
    with pytest.raises(StorageError, match="cannot write in"):
        raise_worst([found, unfit("scratch", "full", "")])


def test_little_space_in_scratch(
    config: CriticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        places.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 1 << 29)
    )
    assert _found(config, scratch=tmp_path)["scratch"].fault is UNFIT


def test_little_shared_memory(config: CriticConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(9, 9, 1 << 20)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda folder: usage)
    found = _found(config)["shared memory"]
    assert (found.fault, found.seen) == (UNFIT, "1 MB free in /dev/shm")


def test_files_that_are_not_there_are_this_node_s_fault(
    config: CriticConfig, tmp_path: Path
) -> None:
    config.model.recipe = None
    config.model.path = str(tmp_path / "absent")
    config.data.train = config.data.validation = str(tmp_path / "absent.jsonl")
    found = _found(config)
    names = ("weights", "data.train", "data.validation")
    assert [found[name].fault for name in names] == [UNFIT] * 3
    assert found["weights"].seen == f"cannot read {tmp_path}/absent"


def test_weights_that_are_wrong_are_wrong_everywhere(config: CriticConfig, tmp_path: Path) -> None:
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk/params.json").write_text("{}")
    config.model.recipe = None
    found = _found(config)["weights"]
    assert found.fault is WRONG
    assert "params.json" in found.seen


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_each_pair_meets_once_and_nobody_twice_in_a_round(size: int) -> None:
    rounds = links._rounds(size)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(i, j) for i in range(size) for j in range(i + 1, size)]
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))


# As a command


def _command(folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
    return ["-m", "job.preflight", "--config", "critic.yaml", *options, "--override", *overrides]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "override", "code"),
    [
        (("--gpus", "1"), "training.seed=0", 71),
        (("--scratch", "critic.yaml/x"), "training.seed=0", 71),
        ((), "training.num_unfrozen_layers=-1", 78),
        ((), "training.seed=0", 0),
    ],
)
def test_exit_codes_tell_whose_fault_it_is(
    tmp_path: Path, options: tuple[str, ...], override: str, code: int
) -> None:
    write_job(tmp_path)
    with running(_command(tmp_path, override, options=options), 1, tmp_path) as ranks:
        assert ranks.wait(60) == [code], ranks.log()


@pytest.mark.slow
def test_three_ranks_measure_every_pair(tmp_path: Path) -> None:
    write_job(tmp_path)
    with running(_command(tmp_path, "training.seed=0"), 3, tmp_path) as ranks:
        assert ranks.wait(90) == [0, 0, 0], ranks.log()
        found = ranks.logs[0].read_text()
    assert "ok  network: 3 pair(s) of ranks, median " in found
    assert "gloo over lo" in found


@pytest.mark.slow
def test_a_rank_that_never_answers_is_named(tmp_path: Path) -> None:
    write_job(tmp_path)
    command = _command(tmp_path, "distributed.start_timeout_seconds=8")
    with running(command, 3, tmp_path) as ranks:
        ranks.processes[1].kill()
        codes = ranks.wait(60)
        assert codes[0] == codes[2] == 1
        assert "rank(s) 1 of 3 did not come" in ranks.logs[0].read_text()

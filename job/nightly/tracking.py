"""A night in MLflow: one parent run, a child an entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from job.nightly.matrix import Kind
from job.nightly.record import Night, Result
from job.run.mlflow_sync import connect, database_lock, experiment_id, sync_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "critic-nightly"
_PARENT = "mlflow.parentRunId"
_AWKWARD = r"[^\w/.-]"  # in a filter; there _ stands for any sign


def track(night: Night, folder: Path, uri: str) -> str:
    """Send a night to MLflow; the parent run's id, which stays when it is judged again.

    The trainings of an entry are sent as any run is, and become children; an entry without any is
    a run of its own.

    Raises:
        mlflow.exceptions.MlflowException: MLflow did not take it.
    """
    client = connect(uri)
    with database_lock(uri):
        experiment = experiment_id(client, EXPERIMENT, uri)
        began, plan = round(1000 * night.plan.began), night.plan
        name = f"{plan.matrix}-night-{night.number}"
        found = client.search_runs([experiment], _like(folder))
        known = [run for run in found if run.data.tags.get("night") == str(folder)]
        made = (
            known[0]
            if known
            else client.create_run(experiment, began, {"night": str(folder)}, name)
        )
        parent = str(made.info.run_id)
        client.set_tag(parent, "verdict", night.verdict.value)
        client.set_tag(parent, "commit", str(plan.commit))
        for result in night.results.values():
            _log(client, parent, result, f"{result.entry}/")
    for result in night.results.values():
        if not (children := [*_trainings(night, result)]) and not known:
            children = [_made(client, uri, experiment, result)]
        for child in children:
            with database_lock(uri):
                client.set_tag(child, _PARENT, parent)
                client.set_tag(child, "entry", result.entry)
                client.set_tag(child, "incomplete", result.reason or "")
                _log(client, child, result, "nightly/")
    with database_lock(uri):
        client.set_terminated(parent)
    return parent


def _like(folder: Path) -> str:
    """A filter for runs of a folder, and perhaps of others: MLflow's strings have no escapes."""
    return f"tags.night LIKE '{re.sub(_AWKWARD, '_', str(folder))}'"


def _trainings(night: Night, result: Result) -> Iterator[str]:
    """The entry's runs as MLflow knows them."""
    if night.plan.entries[result.entry].kind is not Kind.train:
        return
    for run in night.plan.runs:
        if run.entry == result.entry and (Path(run.path) / "config.yaml").exists():
            yield sync_run(Path(run.path)).run_id


def _made(client: MlflowClient, uri: str, experiment: str, result: Result) -> str:
    with database_lock(uri):
        run_id = str(client.create_run(experiment, run_name=result.entry).info.run_id)
        client.set_terminated(run_id, "FINISHED" if result.complete else "FAILED")
    return run_id


def _log(client: MlflowClient, run_id: str, result: Result, prefix: str) -> None:
    for name, value in result.figures.items():
        if isinstance(value, int | float):
            client.log_metric(run_id, f"{prefix}{name}", float(value))

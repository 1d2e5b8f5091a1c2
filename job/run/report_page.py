"""The page on one run, or a comparison of several: HTML that needs nothing but itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from job.common.errors import InputError, file_error
from job.common.files import write_atomic
from job.common.nested import flatten
from job.model.parameters import bytes_text
from job.run.alarm import is_constant
from job.run.evaluations import Evaluation, evaluation_section, evaluations
from job.run.figure import run_colour
from job.run.html import Html, document, fold, images, join, section, table, tag
from job.run.plots import draw_plots, save_plots
from job.run.reader import Snapshot, snapshots

_PAGE = "report.html"
_FILES = ("config.yaml", "status.json", "metrics.jsonl", "parameters.json", "train.log")
_LOG_LINES = 40
_NONE = "\N{EN DASH}"


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        runs: run directories; two or more make a comparison.
        out: the page. Default: report.html in the one run, together with the plots as files, or
            in the closest folder that holds all of several runs.

    Raises:
        InputError: a path is no run directory, a file in it is damaged, or the page cannot be
            written.
    """
    for run in runs:
        _refuse_other_folder(run)
    read = snapshots(runs)
    plots = draw_plots(read)
    path = out or _default_page(runs)
    try:
        write_atomic(path, _page(read, plots))
        if out is None and len(runs) == 1:
            save_plots(plots, runs[0] / "plots")
    except OSError as error:
        raise file_error(error, f"{path}: cannot write the report: {error.strerror}") from None
    return path


def verdict(metrics: Mapping[str, float]) -> str:
    """One line in plain language on an evaluation's metrics, named without their prefix."""
    if not metrics:
        return "no evaluation yet"
    if "r2" not in metrics:
        return "cannot be judged: all validation labels are equal"
    r2, std = metrics["r2"], metrics["std_prediction"]
    if is_constant(metrics):
        return f"predicts almost a constant (std {std:.2f}, R² {r2:z.2f})"
    if r2 <= 0:
        return f"is no better than a constant, though it varies (std {std:.2f}, R² {r2:z.2f})"
    if "achievable_share" in metrics:
        share = metrics["achievable_share"]
        return f"explains {100 * share:z.0f} % of the achievable variance (R² {r2:z.2f})"
    return f"explains {100 * r2:.0f} % of the variance (R² {r2:z.2f})"


def is_run(path: Path) -> bool:
    return any((path / name).exists() for name in _FILES)


def _refuse_other_folder(run: Path) -> None:
    if not is_run(run):
        reason = "is no run directory" if run.is_dir() else "does not exist"
        raise InputError(f"{run}: {reason}; give a folder that job.train has written (run.dir)")


def _unfrozen(run: Snapshot) -> object:
    configured = run.config.get("training", {}).get("num_unfrozen_layers", _NONE)
    return run.parameters.get("model_num_unfrozen_layers", configured)


def _default_page(runs: Sequence[Path]) -> Path:
    if len(runs) == 1:
        return runs[0] / _PAGE
    return Path(os.path.commonpath([run.resolve().parent for run in runs])) / _PAGE


def _page(runs: Sequence[Snapshot], plots: Mapping[str, bytes]) -> str:
    several = len(runs) > 1
    title = f"Comparison of {len(runs)} runs" if several else runs[0].name
    body = join(
        [
            tag("h1", title),
            *(_headline(i, run, several) for i, run in enumerate(runs)),
            *(_failure(run, several) for run in runs if run.failed),
            _validation(runs),
            _plots(plots, _calibration(runs[0]) if len(runs) == 1 else Html()),
            *(evaluation_section(one) for run in runs for one in _evaluations(run, several)),
            _parameters(runs),
            _origin(runs),
            _configuration(runs),
            tag("footer", "written ", _moment(time.time()), " by python -m job.report"),
        ]
    )
    return document(title, body)


# --- headline --------------------------------------------------------------------------------


def _headline(index: int, run: Snapshot, several: bool) -> Html:
    """Verdict, state and size of a run, and its alarm."""
    facts = [tag("span", fact) for fact in _facts(run)]
    state = tag("span", run.state, class_="state bad" if run.failed else "state")
    parts = [
        tag("p", verdict(run.final), class_="verdict"),
        tag("p", state, *facts, class_="facts"),
    ]
    if several:
        parts.insert(0, tag("h3", _swatch(index), run.name))
    for key, title in (("alarm", "Alarm: "), ("checkpoint_error", "Not saved: ")):
        if text := run.status.get(key):
            parts.append(tag("p", tag("strong", title), text, class_="alarm", role="alert"))
    return tag("section", *parts, class_="run")


def _swatch(index: int) -> Html:
    return tag("i", style=f"background:{run_colour(index)}", class_="swatch")


def _facts(run: Snapshot) -> Iterator[str]:
    layers = run.parameters.get("model_num_layers")
    yield f"N = {_unfrozen(run)} unfrozen blocks" + (f" of {layers}" if layers else "")
    if "step" in run.status:
        yield f"step {run.status['step']:,} of {run.status.get('max_steps', 0):,}"
    if run.status.get("attempt", 1) > 1:
        yield f"attempt {run.status['attempt']}"
    if "checkpoint" in run.status:
        yield f"checkpoint of step {run.status['checkpoint']:,}"
    if "model_trainable_params" in run.parameters:
        yield f"{run.parameters['model_trainable_params']:,} trainable parameters"
    speeds = sorted(run.series("tokens_per_second")[1])
    if speeds:
        yield f"{speeds[len(speeds) // 2]:,.0f} tokens/s"
    memory = run.series("memory_bytes")[1]
    if memory:
        yield f"{bytes_text(max(memory))} peak memory"
    if "updated" in run.status:
        yield f"updated {_moment(run.status['updated'])}"


def _failure(run: Snapshot, several: bool) -> Html:
    lines = run.stored.log_tail(_LOG_LINES)
    error = run.status.get("error") or "no error was recorded"
    opened = {} if several else {"open": ""}
    log = fold(f"last {len(lines)} log lines", "\n".join(lines), **opened)
    return section(
        f"Failed: {run.name}",
        tag("p", error, class_="alarm"),
        log if lines else tag("p", "There is no train.log."),
    )


# --- validation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    key: str
    label: str
    format: str
    meaning: str
    count: str = ""  # the figure that says how many stand behind this one

    def show(self, metrics: Mapping[str, float]) -> str:
        if self.key not in metrics:
            return _NONE
        shown = self.format.format(metrics[self.key]).replace("%", " %")
        return f"{shown} of {metrics[self.count]:,.0f}" if self.count in metrics else shown


_METRICS = (
    _Metric("mse", "MSE", "{:z.4f}", "mean squared error over all response tokens"),
    _Metric("r2", "R²", "{:z.3f}", "explained share of the labels' variance"),
    _Metric("achievable_share", "achievable share", "{:z.1%}", "of what the optimum explains"),
    _Metric("std_prediction", "std", "{:z.3f}", "spread of the predictions; near 0 is a constant"),
    _Metric("mean_prediction", "mean", "{:z.3f}", "mean prediction"),
    _Metric("ece", "ECE", "{:z.3f}", "expected calibration error; 0 is calibrated"),
    _Metric("last_token_mse", "last-token MSE", "{:z.4f}", "squared error at the last token"),
    _Metric("last_token_auc", "last-token AUC", "{:z.3f}", "ranks right above wrong; chance 0.5"),
    _Metric(
        "pairwise_accuracy",
        "pairwise accuracy",
        "{:z.1%}",
        "by the mean of a response's values, of so many pairs of answers to one problem",
        count="pairwise_pairs",
    ),
    _Metric(
        "r2_between_problems", "R² between problems", "{:z.3f}", "of problems' means: difficulty"
    ),
    _Metric(
        "r2_within_problems", "R² within problems", "{:z.3f}", "of what a solution adds to that"
    ),
    _Metric("prompt/mse", "V₀ MSE", "{:z.4f}", "squared error before the first token"),
    _Metric("prompt/r2", "V₀ R²", "{:z.3f}", "explained share of the labels' variance there"),
    _Metric("prompt/auc", "V₀ AUC", "{:z.3f}", "ranks problems solved above others; chance 0.5"),
    _Metric("prompt/first_step", "V₁ - V₀", "{:z.3f}", "mean; 0 where values are right"),
    _Metric(
        "prompt/distance_to_optimal",
        "V₀ to optimum",
        "{:z.4f}",
        "root of the mean squared distance",
    ),
    _Metric(
        "prompt/next_distance_to_optimal", "V₁ to optimum", "{:z.4f}", "the same after one token"
    ),
    _Metric(
        "length_correlation", "length correlation", "{:z.3f}", "of prediction and response length"
    ),
    _Metric("length_auc", "length AUC", "{:z.3f}", "what ranking by shortness alone would reach"),
)


def _validation(runs: Sequence[Snapshot]) -> Html:
    """Final metrics beside those of the best constant and of the optimal predictor."""
    judged = [(i, run) for i, run in enumerate(runs) if run.final]
    if not judged:
        return section("Validation", tag("p", "There is no evaluation yet."))
    references = list(_references([run for _, run in judged]))
    if len(runs) == 1:
        table = _single_table(runs[0], references)
    else:
        table = _comparison_table(judged, references)
    return section("Validation", table, *(tag("p", note) for note in _notes(runs)))


def _single_table(run: Snapshot, references: Sequence[tuple[str, dict[str, float]]]) -> Html:
    """One row per metric."""
    columns = [run.final, *(metrics for _, metrics in references)]
    head = ["metric", "this run", *(name for name, _ in references), "meaning"]
    return table(
        head,
        (
            [metric.label, *(metric.show(column) for column in columns), metric.meaning]
            for metric in _METRICS
            if metric.key in run.final
        ),
        "explained",
    )


def _comparison_table(
    judged: Sequence[tuple[int, Snapshot]], references: Sequence[tuple[str, dict[str, float]]]
) -> Html:
    """One row per run."""
    shown = [metric for metric in _METRICS if any(metric.key in run.final for _, run in judged)]
    rows: list[list[object]] = []
    for i, run in judged:
        name, step = join([_swatch(i), run.name]), run.validation()[0]
        rows.append([name, _unfrozen(run), f"{step:,}", *(m.show(run.final) for m in shown)])
    for reference, metrics in references:
        rows.append([reference, _NONE, _NONE, *(m.show(metrics) for m in shown)])
    head = ["run", "N", "step", *(tag("span", m.label, title=m.meaning) for m in shown)]
    return table(head, rows)


def _references(runs: Sequence[Snapshot]) -> Iterator[tuple[str, dict[str, float]]]:
    """Best constant and optimal predictor, once per distinct set of validation labels."""
    distinct = {_labels(run): run for run in reversed(runs)}
    for run in reversed(distinct.values()):
        of = f" for {run.name}" if len(distinct) > 1 else ""
        yield f"best constant{of}", _best_constant(run.final)
        if "mse_optimal" in run.final:
            yield f"optimal predictor{of}", _optimal_predictor(run.final)


def _labels(run: Snapshot) -> tuple[float, ...]:
    """What tells validation sets apart, up to rounding."""
    keys = ("mean_target", "mse_constant", "mse_optimal")
    return tuple(round(run.final.get(key, -1.0), 6) for key in keys)


def _best_constant(final: Mapping[str, float]) -> dict[str, float]:
    known = {"r2": 0.0, "std_prediction": 0.0, "ece": 0.0}
    known |= {"last_token_auc": 0.5, "pairwise_accuracy": 0.5, "achievable_share": 0.0}
    known |= {"prompt/r2": 0.0, "prompt/auc": 0.5, "prompt/first_step": 0.0}
    same = {
        "mse": "mse_constant",
        "mean_prediction": "mean_target",
        "prompt/mse": "prompt/mse_constant",
    }
    return known | {key: final[name] for key, name in same.items() if name in final}


def _optimal_predictor(final: Mapping[str, float]) -> dict[str, float]:
    same = {
        "mse": "mse_optimal",
        "std_prediction": "std_optimal",
        "r2": "r2_optimal",
        "prompt/mse": "prompt/mse_optimal",
    }
    known = {"achievable_share": 1.0}
    known |= {"prompt/distance_to_optimal": 0.0, "prompt/next_distance_to_optimal": 0.0}
    return known | {key: final[name] for key, name in same.items() if name in final}


def _notes(runs: Sequence[Snapshot]) -> Iterator[str]:
    judged = [run for run in runs if run.final]
    if len({_labels(run) for run in judged}) > 1:
        yield "The runs were validated on different labels: compare R², not MSE."
    else:
        step, final = judged[0].validation()
        at = f"At step {step:,}. " if len(runs) == 1 else ""
        if "std_target" in final:
            yield f"{at}Labels: mean {final['mean_target']:.3f}, std {final['std_target']:.3f}."
    for run in runs:
        if not run.final:
            yield f"{run.name}: no evaluation yet."


def _evaluations(run: Snapshot, several: bool) -> Iterator[Evaluation]:
    """What job.evaluate has written of a run, under its name where there are several."""
    for found in evaluations(run.stored.path):
        yield replace(found, name=f"{run.name}, {found.name}") if several else found


# --- plots, parameters, configuration --------------------------------------------------------


def _calibration(run: Snapshot) -> Html:
    """The calibration's bins in numbers, with how many tokens stand behind each."""
    keys = ("bin_mean_prediction", "bin_mean_label", "bin_count")
    bins = list(zip(*(run.reliability.get(key, []) for key in keys), strict=True))
    rows = [
        (
            f"{k / len(bins):.2f} to {(k + 1) / len(bins):.2f}",
            *(f"{value:.3f}" for value in means),
            f"{count:,.0f}",
        )
        for k, (*means, count) in enumerate(bins)
        if count
    ]
    if not rows:
        return Html()
    head = ["predicted value", "mean prediction", "mean observed reward", "tokens"]
    return tag("details", tag("summary", "calibration in numbers"), table(head, rows))


def _plots(plots: Mapping[str, bytes], calibration: Html) -> Html:
    if not plots:
        return section("Curves", tag("p", "There is nothing to plot yet."), calibration)
    return section("Curves", images(plots), calibration)


def _parameters(runs: Sequence[Snapshot]) -> Html:
    parts: list[Html] = []
    for i, run in enumerate(runs):
        if len(runs) > 1:
            parts.append(tag("h3", _swatch(i), run.name))
        components = run.parameters.get("components")
        missing = tag("p", "There is no parameter report yet.")
        parts.append(_component_table(components) if components else missing)
    return section("Parameters", *parts)


def _component_table(components: Sequence[Mapping[str, Any]]) -> Html:
    counts = ("total", "trainable", "weight_bytes", "gradient_bytes", "optimizer_bytes")
    sums = {key: sum(part[key] for part in components) for key in counts}
    head = ["component", "parameters", "trainable", "share", "weights", "gradients", "optimizer"]
    return table(
        [*head, "together"],
        [
            _component_row(str(part["name"]).replace("_", " "), part)
            for part in [*components, {"name": "total", **sums}]
        ],
        "sum",
    )


def _component_row(name: str, part: Mapping[str, Any]) -> list[str]:
    sizes = [part[key] for key in ("weight_bytes", "gradient_bytes", "optimizer_bytes")]
    share = part["trainable"] / max(part["total"], 1)
    return [
        name,
        f"{part['total']:,}",
        f"{part['trainable']:,}",
        f"{100 * share:.2f} %",
        *map(bytes_text, [*sizes, sum(sizes)]),
    ]


def _origin(runs: Sequence[Snapshot]) -> Html:
    """What it takes to do a run again: code, trunk, data, seed, versions."""
    columns = [_origins(run) for run in runs]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return section("Origin", table(["", *(run.name for run in runs)], rows, "texts"))


def _origins(run: Snapshot) -> dict[str, object]:
    noted, config = run.stored.attempt(), flatten(run.config)
    commit = noted.get("commit")
    code = [noted.get("version"), f"commit {commit[:12]}" if commit else None]
    device = [noted.get("device"), noted.get("instructions")]
    return {
        "code": _known(code),
        "trunk": config.get("model.path", _NONE),
        "training data": config.get("data.train", _NONE),
        "validation data": config.get("data.validation", _NONE),
        "seed": config.get("training.seed", _NONE),
        "torch": noted.get("torch", _NONE),
        "device": _known(device),
        "ranks": noted.get("world_size", _NONE),
        "image, by its packages": noted.get("image", _NONE),
        "started in": noted.get("cwd", _NONE),
    }


def _known(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values if value is not None) or _NONE


def _configuration(runs: Sequence[Snapshot]) -> Html:
    full = [
        fold(f"full configuration of {run.name}", _yaml(run.config)) for run in runs if run.config
    ]
    return section(
        "Configuration",
        *([_differing_keys(runs)] * (len(runs) > 1)),
        *(full or [tag("p", "There is no config.yaml.")]),
    )


def _differing_keys(runs: Sequence[Snapshot]) -> Html:
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = [(key, *(config.get(key, _NONE) for config in flat)) for key in keys]
    differing = [row for row in rows if any(value != row[1] for value in row[2:])]
    if not differing:
        return tag("p", "The configurations are equal.")
    return table(["differing key", *(run.name for run in runs)], differing, "texts")


def _yaml(config: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))

"""The table that closes a comparison."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from job.run.comparison import comparison_table


def row(n: int, share: float, half: int | None) -> dict[str, Any]:
    return {
        "num_unfrozen_layers": n,
        "mse": 0.2463 - 0.1339 * share,
        "std": 0.3607,
        "r2": 0.5432 * share,
        "achievable_share": share,
        "mse_constant": 0.2463,
        "mse_optimal": 0.1125,
        "std_optimal": 0.3622,
        "last_token_auc": 0.9612,
        "prompt_mse": 0.2461,
        "prompt_mse_constant": 0.2459,
        "prompt_mse_optimal": 0.2458,
        "steps_to_half": half,
        "seconds": 12345.6,
    }


def test_the_closing_table_fits_80_columns_with_every_figure_whole() -> None:
    out = io.StringIO()
    rows = [row(0, -0.0312, None), row(28, 0.9512, 10400)]
    Console(file=out, width=80).print(comparison_table(rows))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for figure in ("share", "-0.0312", "0.9512", "10400", "0.3607", "constant"):
        assert figure in text
    assert [line.split("│")[6].strip() for line in text.splitlines() if "│" in line] == [
        *("0.2459", "0.2461", "0.2461", "0.2458")
    ]


def test_a_critic_without_values_before_responses_has_a_gap_in_the_table() -> None:
    out = io.StringIO()
    names = ("prompt_mse", "prompt_mse_constant", "prompt_mse_optimal")
    Console(file=out, width=80).print(comparison_table([row(2, 0.5, 1) | dict.fromkeys(names)]))
    cells = [line.split("│")[6].strip() for line in out.getvalue().splitlines() if "│" in line]
    assert set(cells) == {"-"}

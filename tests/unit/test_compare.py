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
    for figure in ("share", "seconds", "-0.0312", "0.9512", "10400", "12346", "constant"):
        assert figure in text

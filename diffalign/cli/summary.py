"""The end of a run as the terminal shows it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rich.console import Console

from diffalign.cli.processes import is_first_process


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Before and after, with intervals; then where the pictures and the result are."""
    if not is_first_process():
        return
    console = Console()
    table = importlib.import_module("diffalign_eval.table")
    rows = table.change_rows(summary["results"])
    if rows:
        console.print(table.before_after_table(rows, "same prompts, same seeds, before and after"))
        console.print(f"pictures   {folder / 'samples' / 'before-after.png'}", highlight=False)
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    console.print(f"result     {folder / 'final'}", highlight=False)
    console.print(
        f"cost       {minutes} min {seconds} s, {summary['counts'].get('sampled_pictures', 0):,} pictures sampled, "
        f"{summary['peak_memory_bytes'] / 1e9:.1f} GB peak memory",
        highlight=False,
    )

"""Every method's run file for the bundled world, run as it is shipped: one table of what each gained and what it cost.

    python benchmarks/methods.py [--output-dir runs/methods] [--processes 2] [--seed 0] [NAME ...]

A few minutes a method on two cores. What was interrupted goes on by the same command, and what is finished is not run
again. What NPO trains is judged as it is used: as the negative of the bundled checkpoint, both guided. The table is
printed after every run, and written to methods.md in the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffalign.assets import list_configs
from diffalign.config_file import load_config

GOLD = "shapes_accuracy"
NEGATIVES = ("npo",)
"""Run files whose result is to be guided away from."""
COLUMNS = (
    "run file", "exact pictures in-domain", "out of domain", "what it optimises, in-domain", "time",
    "pictures sampled", "pictures trained on", "reward queries", "labels", "captions",
)  # fmt: skip


def names() -> list[str]:
    """Shipped run files of the bundled world that train something."""
    return [name.removeprefix("tiny/") for name in list_configs() if name.startswith("tiny/")]


def points(change: dict[str, float]) -> str:
    """A change of an accuracy, in percentage points with its 95 % interval."""
    return f"{100 * change['mean']:+.1f} [{100 * change['low']:.1f}, {100 * change['high']:.1f}]"


def run(*words: str) -> None:
    """A command of diffalign; ends the benchmark where it fails."""
    ended = subprocess.run([sys.executable, "-m", "diffalign", *words], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def changes(folder: Path, summary: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Set -> reward -> change with its interval: of the policy, or of what it is the negative of."""
    guided = folder / "guided" / "comparison.json"
    if not guided.is_file():
        return {
            name: {label: figures["change"] for label, figures in rewards.items()}
            for name, rewards in summary["results"].items()
        }
    results = json.loads(guided.read_text())["results"]
    return {
        name: {entry["label"]: entry["pairs"][0]["difference"] for entry in entries}
        for name, entries in results.items()
    }


def row(name: str, folder: Path, trained: str) -> str:
    """One line of the table.

    Args:
        trained: label of the first reward with a weight: what the method saw, or what its data were judged by.
    """
    summary = json.loads((folder / "summary.json").read_text())
    found = changes(folder, summary)
    inside, outside = found["in-domain"], found["out-of-domain"]
    change = inside[trained]
    own = f"{trained} {change['mean']:+.3f} [{change['low']:.3f}, {change['high']:.3f}]"
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    counts = [
        f"{summary['counts'][name]:,}"
        for name in (
            "sampled_pictures",
            "training_pictures",
            "reward_queries",
            "preference_labels",
            "captions",
        )
    ]
    cells = [
        f"`tiny/{name}`", points(inside[GOLD]), points(outside[GOLD]), own,
        f"{minutes} min {seconds} s", *counts,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="run files in configs/tiny, without .yaml (default: all)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of training; evaluation keeps its own")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(names()))
    if unknown:
        parser.error(f"no such run file: {', '.join(unknown)} (there are {', '.join(names())})")
    for name in args.names or names():
        folder = args.output_dir / name
        processes = ("--processes", str(args.processes))
        run("train", f"tiny/{name}", "--output-dir", str(folder), "--seed", str(args.seed), *processes)
        if name in NEGATIVES:
            pair = ("base=bundled:tiny-sd", f"guided=bundled:tiny-sd+negative:{folder}")
            options = ("--guidance-scale", "2", "--output-dir", str(folder / "guided"), *processes)
            run("compare", *pair, *options)
        table = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
        for done in names():
            if (args.output_dir / done / "summary.json").is_file():
                rewards = load_config(args.output_dir / done / "config.yaml").rewards
                trained = [reward.label or reward.name for reward in rewards if reward.weight]
                table += "\n" + row(done, args.output_dir / done, trained[0])
        (args.output_dir / "methods.md").write_text(table + "\n")
        print(table)


if __name__ == "__main__":
    main()

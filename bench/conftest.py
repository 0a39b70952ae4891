"""How `pytest bench --benchmark-only` shows its figures: medians first, each over F.embedding's."""

from typing import Any

import pytest

COLUMNS = ["median", "iqr", "min", "max", "rounds"]


def pytest_configure(config: pytest.Config) -> None:
    """Unless the command line says otherwise."""
    if getattr(config.option, "benchmark_sort", None) in (None, "min"):
        config.option.benchmark_sort = "median"
    given = config.invocation_params.args
    if not any(str(one).startswith("--benchmark-columns") for one in given):
        config.option.benchmark_columns = COLUMNS


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    medians: dict[str, dict[str, float]] = {}
    for one in getattr(session, "benchmarks", []):
        if one and one.group:
            medians.setdefault(one.group, {})[one.name] = one["median"]
    if not any("plain" in group for group in medians.values()):
        return
    terminalreporter.section("medians over F.embedding's (plain)")
    for name, group in medians.items():
        if "plain" not in group:
            continue
        words = (f"{short} {median / group['plain']:.2f}" for short, median in group.items())
        terminalreporter.write_line(f"{name}: {', '.join(words)}")

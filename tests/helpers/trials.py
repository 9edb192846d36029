"""What trial runners share: options that are whole numbers, and tables of outcomes."""

import argparse
from collections import Counter
from collections.abc import Collection, Mapping


def parse(
    description: str | None, kinds: Collection[str] = (), **defaults: int
) -> argparse.Namespace:
    """Read ``--trials 100`` and the like, each with its default; of kinds one must be named."""
    parser = argparse.ArgumentParser(description=description)
    if kinds:
        parser.add_argument("kinds", nargs="+", choices=kinds)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser.parse_args()


def print_tables(tables: Mapping[str, Counter[str]]) -> None:
    for name, counts in tables.items():
        print(f"{name:40}", dict(counts))

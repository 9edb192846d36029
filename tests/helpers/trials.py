"""What trial runners share: options that are whole numbers, and tables of outcomes."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping


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


def report(outcomes: Mapping[str, int], bad: tuple[str, ...], start: str = "") -> int:
    """Print how often each outcome came up; return 1 if one of them begins as bad ones do."""
    for outcome, count in sorted(outcomes.items()):
        print(f"{start}{count:6d} {outcome}", flush=True)
    return int(any(outcome.startswith(bad) for outcome in outcomes))


def tabulate(results: Iterable[tuple[str, str]], bad: Collection[str]) -> int:
    """Print how often each outcome of each kind came up; return 1 if one of them is bad."""
    tables: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, outcome in results:
        tables[kind][outcome] += 1
    for kind, counts in tables.items():
        print(f"{kind:40}", dict(counts))
    total = sum(tables.values(), Counter[str]())
    print(f"{total.total()} in all", dict(total))
    return int(any(total[one] for one in bad))

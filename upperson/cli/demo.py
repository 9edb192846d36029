"""``upperson demo``: one frozen base at two sites, from drawn people to searches."""

from pathlib import Path
from typing import Annotated

import typer

from upperson.cli.demo_folder import require_own_folder
from upperson.cli.options import require_extra
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import new_table, print_json, print_line, print_table


@grouped
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny version for tests; its accuracy means nothing.")
    ] = False,
    *,
    report: Output,
) -> None:
    """Fine-tune a small base for two sites it has not seen, export, index, and search.

    Needs no download. The sites have cameras, garments, bags and words of their own, and 300 people
    each to learn from. Writes the base's bundle and a gallery of street people, a run, a bundle and
    a gallery for each site, report.html and summary.json; earlier results in the folder are
    replaced at the very end.

    Example: `upperson demo --output demo`
    """
    require_extra("train", "the demo")
    require_extra("export", "the demo")
    require_own_folder(output)
    from upperson.cli.demo_run import FULL, QUICK, run_demo
    from upperson.cli.progress import Display
    from upperson.demo_page import site_rows, street_rows
    from upperson_rt.score_calibration import SCORES_FILE

    with Display() as display:
        summary = run_demo(output, QUICK if quick else FULL, display)
    if report.as_json:
        print_json(summary)
        return
    for title, (head, *rows) in {
        **{f"{name}, unseen people": site_rows(site) for name, site in summary["sites"].items()},
        "street, which the base knows": street_rows(summary["street"]),
    }.items():
        table = new_table(title, *head, right=tuple(head))
        for row in rows:
            table.add_row(*row)
        print_table(table)
    print_line("in brackets: points gained over the frozen base, with a 95 % interval")
    if quick:
        print_line("a quick demo: these numbers mean nothing")
    seconds = summary["seconds"]
    print_line("seconds: " + ", ".join(f"{stage} {seconds[stage]:.0f}" for stage in seconds))
    print_line(f"open {output / 'report.html'} and {output / 'sites.png'}; search more:")
    print_line(f'  upperson-rt query -b {output}/bundle -g {output}/gallery "woman in green coat"')
    for name, site in summary["sites"].items():
        folder = output / "sites" / name
        print_line(
            f'  upperson-rt query -b {folder}/bundle -g {folder}/gallery "{site["question"]}"'
        )
        if not (folder / "bundle" / SCORES_FILE).exists():
            print_line(
                f"    (no likelihoods: those of the few people of {name} would not be reliable)"
            )
    print_line(
        f"or search in a browser:  upperson-rt serve -b {output}/bundle -g {output}/gallery --open"
    )

"""`upperson-rt apply` and `upperson-rt info`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, default_bundle, require_no_empty_trust
from upperson_rt.cli.output import new_table, print_line, print_result, print_table, show_progress
from upperson_rt.errors import UsageError

if TYPE_CHECKING:
    from upperson_rt.manifest import Manifest

_BASE_HELP = "Base bundle, from `upperson export --base`; it stays as it is."


@grouped
def apply(
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="SITE.adapter",
            help="Adapter file, from `upperson export RUN --adapter-for BUNDLE`.",
            show_default=False,
        ),
    ] = None,
    *,
    base: Annotated[Path, typer.Option("--bundle", "-b", help=_BASE_HELP)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Bundle to write; an earlier one of the same site is replaced."
        ),
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="Also replace the bundle of another site or base."),
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Without SITE.adapter: put the base itself there.")
    ] = False,
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust",
            envvar="UPPERSON_TRUST",
            callback=require_no_empty_trust,
            help="Public key (PEM) that must have signed the adapter, or with --remove the base.",
            metavar="KEY",
        ),
    ] = None,
    printed: Output,
) -> None:
    """Make a site's bundle from its adapter and a base bundle, on this machine, without torch.

    Every file must come out as it was exported, and every variant must compute its golden samples.
    Only then does the bundle appear at the output. Pictures that were indexed with another bundle
    must be indexed again.

    Example: `upperson-rt apply platform.adapter -b base -o bundle`
    """
    from upperson_adapter.apply import apply_adapter, restore_base

    if (adapter is None) != remove:
        raise UsageError(
            "name either an adapter file or --remove",
            code="adapter_missing" if adapter is None else "adapter_and_remove",
        )
    with show_progress() as progress:
        if adapter is None:
            restore_base(base, output, trust, progress, force=force)
        else:
            apply_adapter(adapter, base, output, trust, progress, force=force)
    print_result(_described(output), printed.as_json, _print_info)


@grouped
def info(
    bundle: Annotated[
        Path, typer.Option("--bundle", "-b", envvar="UPPERSON_BUNDLE", help="Bundle to describe.")
    ] = default_bundle,
    *,
    printed: Output,
) -> None:
    """Show what a bundle is: base, adapter, accuracy of its variants, and who signed it.

    Its files are not checked: that is `upperson-rt doctor`.

    Example: `upperson-rt info -b bundle`
    """
    print_result(_described(bundle), printed.as_json, _print_info)


def _described(folder: Path) -> dict[str, Any]:
    from upperson_rt.bundle import read_manifest
    from upperson_rt.manifest import NO_ADAPTER
    from upperson_signature.signature import named_key

    manifest: Manifest = read_manifest(folder)
    model = manifest.model
    adapted = model.adapter_sha256 != NO_ADAPTER
    return {
        "bundle": str(folder),
        "name": model.name,
        "base": model.base,
        "base_sha256": model.base_sha256,
        "adapter_sha256": model.adapter_sha256 if adapted else None,
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "generator": manifest.generator,
        "image": asdict(manifest.image),
        "default_variant": manifest.default_variant,
        "variants": {
            name: {
                "size_bytes": variant.image.size_bytes + variant.text.size_bytes,
                "metrics": variant.metrics,
            }
            for name, variant in manifest.variants.items()
        },
        "scores_calibrated": manifest.scores is not None,
        "signed_by": named_key(folder),
    }


def _print_info(found: dict[str, Any]) -> None:
    adapter = found["adapter_sha256"]
    signed = "no"
    if (key := found["signed_by"]) is not None:
        signed = f"by the key {key[:12]}..., not verified: --trust KEY does that where it is used"
    print_line(
        f"{found['bundle']}, exported {found['created']}",
        f"site     {'none' if adapter is None else found['name']}",
        f"base     {found['base']}, weights {found['base_sha256'][:12]}",
        f"adapter  {'none' if adapter is None else adapter[:12]}",
        f"signed   {signed}",
    )
    measures = {name for row in found["variants"].values() for name in row["metrics"] or ()}
    shown = [name for name in ("R@1", "R@5", "R@10", "mAP") if name in measures]
    table = new_table("variant", "MB", *shown, right=("MB", *shown))
    for name, row in found["variants"].items():
        mark = " (default)" if name == found["default_variant"] else ""
        metrics = row["metrics"] or {}
        figures = (f"{metrics[key]:.2f}" if key in metrics else "" for key in shown)
        table.add_row(name + mark, f"{row['size_bytes'] / 1e6:.0f}", *figures)
    print_table(table)
    if not found["scores_calibrated"]:
        print_line("scores are not calibrated: searches have no verdict")

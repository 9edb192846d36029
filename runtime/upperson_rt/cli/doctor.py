"""`upperson-rt doctor`."""

from dataclasses import asdict
from pathlib import Path

import typer

from upperson_rt.cli.options import (
    BackendOption,
    Debug,
    DeviceOption,
    Json,
    OptionalBundleOption,
    OptionalGalleryOption,
    VariantOption,
    default_bundle,
    default_gallery,
)
from upperson_rt.cli.output import new_table, print_json, print_note, print_table

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    bundle: OptionalBundleOption = None,
    gallery: OptionalGalleryOption = None,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the installation, the bundle and the gallery, and say how to fix what is wrong.

    Example: `upperson-rt doctor -b bundle -g gallery`
    """
    from upperson_rt.doctor import diagnose

    if bundle is None and default_bundle.exists():
        bundle = default_bundle
    if gallery is None and Path(default_gallery).exists():
        gallery = default_gallery
    for name, given in {"bundle": bundle, "gallery": gallery}.items():
        if given is None:
            print_note(f"no {name} here to check: name one with  --{name} FOLDER")
    checks = diagnose(bundle, gallery, variant, backend, device)
    failed = [check for check in checks if check.status == "fail"]
    if as_json:
        rows = [asdict(check) for check in checks]
        for row in rows:
            del row["exit_code"]
        print_json({"ok": not failed, "checks": rows})
    else:
        table = new_table("check", "", "found")
        for check in checks:
            detail = f"{check.detail} -> {check.fix}" if check.fix else check.detail
            table.add_row(check.name, (check.status, _STYLES[check.status]), detail)
        print_table(table)
    if failed:
        raise typer.Exit(failed[0].exit_code)

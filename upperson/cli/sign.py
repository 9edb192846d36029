"""``upperson sign``."""

from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json, print_line


def sign(
    bundle: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="Folder of the exported model.", show_default=False),
    ],
    key: Annotated[
        Path, typer.Argument(metavar="KEY", help="Private key (PEM).", show_default=False)
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sign a bundle that is there already, or sign it again with another key.

    All its files are checked first; all that lies in the folder is signed. A key is made by
    `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, and its public part by
    `openssl pkey -in key.pem -pubout -out key.pub`.

    Example: `upperson sign bundle key.pem`
    """
    from upperson_rt.bundle import Bundle, read_manifest
    from upperson_rt.signature import SIGNATURE_FILE, read_private_key, sign_folder

    private_key = read_private_key(key)
    manifest = read_manifest(bundle)
    for variant in manifest.variants:
        Bundle.open(bundle, variant).check_files()
    fingerprint = sign_folder(bundle, private_key, manifest.model.name)
    if as_json:
        print_json(
            {"bundle": str(bundle), "key": fingerprint, "file": str(bundle / SIGNATURE_FILE)}
        )
        return
    print_line(
        f"signed {bundle} with the key sha256:{fingerprint}; where it runs:  upperson-rt ... "
        "--trust key.pub"
    )

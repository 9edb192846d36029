"""What is done with finished bundles: ``upperson serving`` and ``upperson sign``."""

from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.options import Debug, Json, TrustOption
from upperson_rt.cli.output import print_json, print_line
from upperson_rt.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from upperson_export.serving import ServingFolder

_NEXT = {
    "triton": "tritonserver --model-repository={folder}",
    "deepstream": "see {folder}/README.md",
}


def serving(
    bundle: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="Folder of the exported model.", show_default=False),
    ],
    triton: Annotated[
        Path | None, typer.Option(help="Write a Triton model repository into this folder.")
    ] = None,
    deepstream: Annotated[
        Path | None,
        typer.Option(help="Write a secondary nvinfer for DeepStream into this folder."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Precision to serve.", show_default="fp16, else fp32"),
    ] = None,
    trust: TrustOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what Triton or DeepStream need to serve a bundle; constants come from its manifest.

    Each folder holds a README with the next steps. An earlier result there is replaced if it was
    not changed and nothing was put beside it.

    Example: `upperson serving bundle --triton models --deepstream deepstream`
    """
    if triton is None and deepstream is None:
        raise UsageError("nothing to write: name a folder with  --triton  or  --deepstream")
    if triton is not None and deepstream is not None and triton.resolve() == deepstream.resolve():
        raise UsageError(f"--triton and --deepstream are both {triton}: name two folders")
    for package in ("onnx", "onnx_ir", "jinja2"):
        if find_spec(package) is None:
            raise missing_extra(package, "export", "serving")
    from upperson_export.serving import write_deepstream, write_triton

    wanted: list[
        tuple[Path | None, Callable[[Path, Path, str | None, Path | None], ServingFolder]]
    ] = [
        (triton, write_triton),
        (deepstream, write_deepstream),
    ]
    written = [
        write(bundle, folder, variant, trust) for folder, write in wanted if folder is not None
    ]
    if as_json:
        described = {
            item.format: asdict(item) | {"folder": str(item.folder), "files": list(item.files)}
            for item in written
        }
        print_json({"bundle": str(bundle)} | described)
        return
    for item in written:
        following = _NEXT[item.format].format(folder=item.folder)
        print_line(f"{item.format} {item.folder} ({item.variant}); next:  {following}")


# --- ``upperson sign``


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

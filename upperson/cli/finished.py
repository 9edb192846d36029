"""Commands for finished bundles: ``upperson serving`` and ``upperson sign``."""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output, TrustOption
from upperson_rt.cli.output import print_json, print_line
from upperson_rt.errors import UsageError, missing_extra

BundleArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder of the exported model.", show_default=False)
]

_NEXT = {
    "triton": "tritonserver --model-repository={folder}",
    "deepstream": "see {folder}/README.md",
}


@dataclass(frozen=True)
class Served(OptionGroup, panel="What is written"):
    """The folders to write, and the variant in them."""

    triton: Path | None = option(None, "Write a Triton model repository into this folder.")
    deepstream: Path | None = option(
        None, "Write a secondary nvinfer for DeepStream into this folder."
    )
    variant: str | None = option(
        None, "Precision variant to serve.", show_default="fp16, else fp32"
    )
    trust: TrustOption = None


@grouped
def serving(bundle: BundleArgument, *, served: Served, output: Output) -> None:
    """Write a Triton or DeepStream folder that serves a bundle, with constants of its manifest.

    Each folder holds a README with the next steps. An earlier result there is replaced if none of
    its files was changed and none was added.

    Example: `upperson serving bundle --triton models --deepstream deepstream`
    """
    triton, deepstream = served.triton, served.deepstream
    if triton is None and deepstream is None:
        raise UsageError(
            "nothing to write: name a folder with  --triton  or  --deepstream",
            code="nothing_to_write",
        )
    if triton is not None and deepstream is not None and triton.resolve() == deepstream.resolve():
        raise UsageError(
            f"--triton and --deepstream are both {triton}: name two folders",
            code="folders_nested",
            path=triton,
        )
    for package in ("onnx", "onnx_ir", "jinja2"):
        if find_spec(package) is None:
            raise missing_extra(package, "export", "serving")
    from upperson_export.serving import write_deepstream, write_triton

    written = [
        write(bundle, folder, served.variant, served.trust)
        for folder, write in ((triton, write_triton), (deepstream, write_deepstream))
        if folder is not None
    ]
    if output.as_json:
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


@grouped
def sign(
    bundle: BundleArgument,
    key: Annotated[
        Path, typer.Argument(metavar="KEY", help="Private key (PEM).", show_default=False)
    ],
    *,
    output: Output,
) -> None:
    """Sign an existing bundle, or sign it again with another key.

    All its files are checked first; all files of the folder are signed. A key is made by
    `openssl ecparam -name prime256v1 -genkey -noout -out signing.pem`, and its public part by
    `openssl pkey -in signing.pem -pubout -out signing.pub`.

    Example: `upperson sign bundle signing.pem`
    """
    from upperson_rt.bundle import Bundle, read_manifest
    from upperson_rt.manifest import SIGNATURE_FILE
    from upperson_signature.signature import read_private_key, sign_folder

    private_key = read_private_key(key)
    manifest = read_manifest(bundle)
    for variant in manifest.variants:
        Bundle.open(bundle, variant).check_files()
    fingerprint = sign_folder(bundle, private_key, manifest.model.name)
    if output.as_json:
        print_json(
            {"bundle": str(bundle), "key": fingerprint, "file": str(bundle / SIGNATURE_FILE)}
        )
        return
    print_line(
        f"signed {bundle} with the key sha256:{fingerprint}; where it runs:  upperson-rt ... "
        "--trust signing.pub"
    )

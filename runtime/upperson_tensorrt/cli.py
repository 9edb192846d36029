"""`upperson-rt compile`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.groups import OptionGroup, grouped
from upperson_rt.cli.options import Output, TrustOption, default_bundle
from upperson_rt.cli.output import new_progress, new_table, print_json, print_note, print_table


@dataclass(frozen=True)
class Build(OptionGroup, panel="Engines"):
    """What is built, and where it is kept."""

    variant: Annotated[
        str, typer.Option("--variant", help="Precision to build: fp16, int8-fp16, fp32 or int8.")
    ] = "fp16"
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Largest batch; larger inputs are split.")
    ] = 32
    workspace_mib: Annotated[
        int, typer.Option("--workspace-mib", min=1, help="Largest scratch memory of a layer.")
    ] = 1024
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            envvar="UPPERSON_CACHE",
            help="Folder for engines.",
            show_default="~/.cache/upperson",
        ),
    ] = None
    device: Annotated[str, typer.Option("--device", help="cuda or cuda:N.")] = "cuda"


@grouped
def compile_engines(
    build: Build,
    output: Output,
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE", envvar="UPPERSON_BUNDLE", help="Folder of the exported model."
        ),
    ] = default_bundle,
    trust: TrustOption = None,
) -> None:
    """Build TensorRT engines for the GPU of this machine, and compare them with ONNX Runtime.

    An engine that computes something else is refused (exit code 6). Engines fit this GPU and this
    TensorRT only; after an update of either, compile again.

    Example: `upperson-rt compile bundle --variant fp16`
    """
    from upperson_tensorrt.compile import compile_bundle

    with new_progress() as bar:
        task = bar.add_task("starting", total=None)
        compiled = compile_bundle(
            bundle,
            build.variant,
            build.device,
            trust=trust,
            max_batch=build.max_batch,
            workspace_mib=build.workspace_mib,
            cache=build.cache,
            note=print_note,
            progress=lambda phase, step, steps: bar.update(
                task, description=phase, completed=step, total=steps
            ),
        )
    if output.as_json:
        print_json(
            {
                "bundle": str(bundle),
                "variant": compiled.variant,
                "device": build.device,
                "target": asdict(compiled.target),
                "towers": [
                    {
                        "tower": tower.tower,
                        "engine": str(tower.path),
                        "reused": tower.reused,
                        "size_bytes": tower.record.size_bytes,
                        "build_seconds": tower.record.build_seconds,
                        "min_cosine_allowed": tower.record.min_cosine,
                        "comparisons": [asdict(c) for c in tower.record.comparisons],
                    }
                    for tower in compiled.towers
                ],
            }
        )
        return
    table = new_table("tower", "batch", "inputs", "lowest cosine", "MiB", "built in", "engine")
    for tower in compiled.towers:
        comparisons, record = tower.record.comparisons, tower.record
        table.add_row(
            tower.tower,
            ", ".join(dict.fromkeys(str(c.batch_size) for c in comparisons)),
            ", ".join(dict.fromkeys(c.inputs for c in comparisons)),
            f"{min(c.min_cosine for c in comparisons):.6f}",
            f"{record.size_bytes / 2**20:.1f}",
            "there already" if tower.reused else f"{record.build_seconds:.1f} s",
            tower.path.name,
        )
    print_table(table)
    print_note(
        f"run it with  --backend tensorrt --device {build.device} --variant {compiled.variant}"
        + ("" if build.cache is None else f"  and  UPPERSON_CACHE={build.cache}")
    )

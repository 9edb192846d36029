"""What TensorRT fuses of ViT-B/16 on this card: no less than TensorRT for RTX does."""

from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from tests.helpers.engine_layers import inspect_plan, read_layers
from tests.helpers.toy_graphs import TOWERS
from tests.helpers.vit_b16 import PROFILES, export_vit_b16, int8_gemms, vit_b16_variant
from upperson_calibration.graph import TowerGraph
from upperson_rt.tensorrt import builder
from upperson_rt.tensorrt.cuda import Cuda
from upperson_rt.towers import Tower

LAYERS = 12

pytestmark = pytest.mark.timeout(1200)  # Two exports of ViT-B/16, four builds.


@pytest.fixture(scope="module")
def graphs(
    card: None, trt: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[Tower, TowerGraph]:
    return export_vit_b16(tmp_path_factory.mktemp("vit_b16"), LAYERS)


@pytest.fixture
def in_detail(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines built by which the inspector knows types and ONNX nodes."""
    add_profile = builder._add_profile

    def add(built_by: Any, config: Any, *rest: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        add_profile(built_by, config, *rest)

    monkeypatch.setattr(builder, "_add_profile", add)


@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_attention_is_fused_and_int8_stays_int8(
    graphs: dict[Tower, TowerGraph],
    trt: ModuleType,
    cuda: Cuda,
    in_detail: None,
    tower: Tower,
    variant: Any,
    tmp_path: Path,
) -> None:
    file = tmp_path / "tower.onnx"
    ir.save(vit_b16_variant(graphs[tower], variant), file)
    with cuda.current():
        built = builder.build_engine(
            trt, file, PROFILES[tower], workspace_bytes=builder.DEFAULT_WORKSPACE_MIB << 20
        )
        text = inspect_plan(trt, built.plan)
    engine = read_layers(text, trt.__version__)
    attentions, gemms = len(engine.fused_attentions()), len(engine.int8_gemms())
    print(f"{tower} {variant}: {attentions} fused attentions, {gemms} int8 GEMMs", text)
    # That of the last block has one query row; for RTX there is no kernel for it.
    assert LAYERS - 1 <= attentions <= LAYERS
    assert gemms == (int8_gemms(LAYERS) if variant == "int8-fp16" else 0)

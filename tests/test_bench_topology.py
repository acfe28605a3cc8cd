"""Programs for TPUs that are not there: what their text says, names, refusals, and a real compilation."""

import importlib.util
import io
import json

import jax
import pytest
from rich.console import Console
from runs import run_with_tpu_compiler

from selconv_jax._bench import tpu
from selconv_jax._bench.hlo import CostedOperation, entry_costs
from selconv_jax._bench.picture import bar_picture
from selconv_jax._bench.run import TopologyResult
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._bench.tpu import CompiledProgram, topology_devices
from selconv_jax._bench.tpu_report import costs_table, cycles_panel, largest_table, topology_report
from selconv_jax.errors import ConfigError

# Shortened and simplified from what the compiler writes.
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused_computation (p: f32[8]) -> f32[8] {
  ROOT %exp = f32[8] exponential(%p), backend_config={"estimated_cycles":"999"}
}

%body (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8] fusion(%p), backend_config={"estimated_cycles":"888"}
}

ENTRY %main.7 (x.1: f32[8], w: f32[8]) -> (f32[8], f32[8]) {
  %x.1 = f32[8]{0:T(128)} parameter(0), sharding={replicated}, metadata={op_name="x"}
  %fusion.2 = f32[8] fusion(%x.1), calls=%fused_computation, metadata={op_name="jit(step)/conv1/exp" \
stack_frame_id=3}, backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"120"}}
  %copy-start = (f32[8], f32[8]) copy-start(%x.1), backend_config={"dma_priority":1}
  %while-loop.1 = f32[8] while(%fusion.2), body=%body
  dot = f32[8] fusion(%x.1), backend_config={"estimated_cycles":"3000"}
  ROOT %tuple = (f32[8], f32[8]) tuple(%fusion.2, %dot), backend_config={"estimated_cycles":"5"}
}
"""


def test_only_the_entry_computation_counts():
    assert entry_costs(TEXT) == [
        CostedOperation("fusion.2", 120, "jit(step)/conv1/exp"),
        CostedOperation("dot", 3000, ""),
        CostedOperation("tuple", 5, ""),
    ]
    assert entry_costs("HloModule empty") == []


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:2by2",
        "v5e:",
        "v5e:2x",
        "v5e:0x1",
        "v5e:1x0",
        "v4:0x0x0",
        "v5e:-1x2",
        "v5e:1",
        "v5e:1x1x1x1",
        "v5e:9999x9999",
        "v5e:99999999999x1",
        "v5e:01x1",
    ],
)
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match="must be of the form v5e:1x1"):
        BenchSettings(topology=name)
    with pytest.raises(ConfigError, match="must be of the form v5e:1x1"):
        topology_devices(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install libtpu"):
        topology_devices("v5e:1x1")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "another process holds"),
        (
            "INVALID_ARGUMENT: Invalid TPU external name: TPU v99\nmore",
            "Invalid TPU external name: TPU v99 Names",
        ),
    ],
)
def test_refusals_of_the_compiler(monkeypatch, message, said):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tpu.topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=said):
        topology_devices("v99:1x1")


def test_reports():
    memory = {"total": 2_000_000, "temporary": 1_500_000}
    largest = [CostedOperation("fusion.1", 4000, "jit(step)/[x]"), CostedOperation("dot", 1000, "")]
    steps = [
        CompiledProgram("plain", memory, True, [], 5000, 0.0, 3.0, largest),
        CompiledProgram("selective, capacity 0.5", None, None, [], 7500, 0.0, 4.0, largest[:1]),
    ]
    result = TopologyResult("densenet40", 4, steps, complete=True)
    text = io.StringIO()
    console = Console(file=text, width=120)
    console.print(costs_table(result, "costs"))
    console.print(largest_table(result, "largest"))
    lines = text.getvalue().splitlines()
    assert [line.split() for line in lines if line.startswith(" plain  ")] == [
        ["plain", "5", "1.00", "2.0", "1.5", "1.00"],
        ["plain", "4.0", "fusion.1", "jit(step)/[x]"],
    ]
    panel = cycles_panel(result, "v5e:2x2")
    assert [bar.text for bar in panel.bars] == ["5", "8   1.50 x plain"]
    assert len(bar_picture([panel], "title", "caption").axes) == 1
    plain, selective = json.loads(json.dumps(topology_report(result)))["steps"]
    assert selective["largest"][0]["cycles"] == 4000
    assert (plain["ratio"], plain["memory_ratio"]) == (1.0, 1.0)
    assert (selective["ratio"], selective["memory_ratio"]) == (1.5, None)


@pytest.mark.slow
def test_compiles_for_chips_that_are_not_there(tmp_path):
    options = ["--image", "8x8x3", "--batch", "8", "--capacity", "0.25", "--output", tmp_path / "out"]
    run_with_tpu_compiler("bench", "densenet40", "blocks=[1]", "growth=4", "--topology", "v5e:2x2", *options)
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    plain, selective, *_ = report["topology"][0]["steps"]
    assert report["topology"][0]["chips"] == 4
    assert 0 < plain["cycles"] < selective["cycles"]
    assert plain["memory"]["total"] > 0
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5_000

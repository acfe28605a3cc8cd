"""Programs for chips that are not there: what their text says, names, refusals, and real compilations."""

import importlib.util
import io
import json

import jax
import pytest
from rich.console import Console

from runs import run_with_compiler
from selconv_jax._bench import ahead
from selconv_jax._bench.ahead import CompiledProgram, prepare_compiler, topology_devices
from selconv_jax._bench.ahead_report import largest_table, steps_table
from selconv_jax._bench.hlo import CostedOperation, entry_cycles, entry_kernels
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
    assert entry_cycles(TEXT) == [
        CostedOperation("fusion.2", 120, "jit(step)/conv1/exp"),
        CostedOperation("dot", 3000, ""),
        CostedOperation("tuple", 5, ""),
    ]
    assert entry_cycles("HloModule empty") == []


# Likewise for a GPU: a kernel with two results, a call of cuDNN, a copy that is started and ended.
GPU_TEXT = """\
%fused (p: f32[4,8]) -> f32[4,8] {
  ROOT %exp = f32[4,8]{1,0} exponential(%p)
}

ENTRY %main.7 (x.1: f32[4,8], w: bf16[8]) -> (f32[4,8], pred[4,8]) {
  %x.1 = f32[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %w = bf16[8]{0} parameter(1)
  %c = s32[] constant(7)
  %loop_fusion = (f32[4,8]{1,0}, /*index=1*/pred[4,8]{1,0}) fusion(%x.1, %w), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/conv1/exp"}
  %first = f32[4,8]{1,0} get-tuple-element(%loop_fusion), index=0
  %second = pred[4,8]{1,0} get-tuple-element(%loop_fusion), index=1
  %flat = f32[32]{0} bitcast(%first)
  %copy-start = (f32[32]{0}, f32[32]{0}) copy-start(%flat)
  %copy-done = f32[32]{0} copy-done(%copy-start)
  %cudnn-conv = (f32[4,8]{1,0}, u8[0]{0}) custom-call(%first, %w), custom_call_target="__cudnn$convForward"
  ROOT %tuple = (f32[4,8]{1,0}, pred[4,8]{1,0}) tuple(%first, %second)
}
"""


def test_kernels_of_a_gpu_and_their_bytes():
    assert entry_kernels(GPU_TEXT) == [
        CostedOperation("loop_fusion", (128 + 16) + (128 + 32), "jit(step)/conv1/exp"),
        CostedOperation("copy-start", 128 + 2 * 128, ""),
        CostedOperation("cudnn-conv", (128 + 16) + 128, ""),
    ]
    assert entry_kernels("HloModule empty") == []


@pytest.mark.parametrize(
    "name",
    [
        "h100:",
        "h100:0",
        "h100:2x2",
        "h10",
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
    with pytest.raises(ConfigError, match=f"--topology is '{name}'.*It must be a GPU .a100, h100, h200"):
        prepare_compiler(name)


@pytest.mark.parametrize(
    ("name", "said"), [("v5e:1x1", "pip install libtpu"), ("h100:2", "jax-cuda13-pjrt==")]
)
def test_without_the_compiler(monkeypatch, name, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        prepare_compiler(name)


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

    monkeypatch.setattr(ahead.topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=said):
        topology_devices("v99:1x1")


def printed(*tables):
    text = io.StringIO()
    console = Console(file=text, width=120)
    for table in tables:
        console.print(table)
    return [line.split() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("kernels", [None, 40])
def test_tables_of_steps(kernels):
    memory = {"total": 2_000_000, "temporary": 1_500_000}
    unit = 10**3 if kernels is None else 10**6
    largest = [CostedOperation("fusion.1", 4 * unit, "jit(step)/[x]"), CostedOperation("dot", unit, "")]
    more = kernels and kernels + 10
    steps = [
        CompiledProgram("plain", memory, True, [], 5 * unit, kernels, 0.0, 3.0, largest),
        CompiledProgram("selective, capacity 0.5", None, None, [], 7 * unit, more, 0.0, 4.0, largest[:1]),
    ]
    rows = printed(steps_table(steps, "costs"), largest_table(steps, "largest"))
    launched = [] if kernels is None else [["40", "1.00"], ["50", "1.25"]]
    first, second = launched or ([], [])
    assert ["plain", *first, "5", "1.00", "2.0", "1.5", "1.00"] in rows
    assert ["selective,", "capacity", "0.5", *second, "7", "1.40"] in rows
    assert ["plain", "4.0", "fusion.1", "jit(step)/[x]"] in rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "chips", "packages"), [("v5e:2x2", 4, ["libtpu"]), ("h100", 1, ["jax_plugins.xla_cuda13"])]
)
def test_compiles_for_chips_that_are_not_there(tmp_path, topology, chips, packages):
    file = tmp_path / "run.toml"
    file.write_text("batch_size = 8\n[model]\noptions = { blocks = [1], growth = 4 }\n")
    output = tmp_path / "steps.json"
    arguments = ["compile", file, "--topology", topology, "--compare", "--output", output]
    run_with_compiler(*arguments, packages=packages)
    report = json.loads(output.read_text())
    names = [step["name"].partition(",")[0] for step in report["steps"]]
    assert names == ["plain", "selective", "selective", "frozen", "compact"]
    plain, _, selective, *_ = report["steps"]
    assert report["chips"] == chips
    assert 0 < plain["cost"] < selective["cost"]
    assert plain["memory"]["total"] > 0
    if topology == "h100":
        assert 20 < plain["kernels"] < selective["kernels"]

"""Runs compiled for chips that are not there: messages in a program's text, estimates, refusals."""

import dataclasses
import io
import json
from unittest import mock

import jax
import pytest
from rich.console import Console

from runs import ALL_IMAGES, run_with_compiler, tiny_config
from selconv_jax._bench import run_ahead
from selconv_jax._bench.ahead import CompiledProgram, Messages, message_seconds
from selconv_jax._bench.ahead_report import messages_table, plan_table, scaling_line
from selconv_jax._bench.chips import chip_of
from selconv_jax._bench.hlo import message_sizes
from selconv_jax._bench.run_ahead import RunPlan, compile_run, largest_batch
from selconv_jax._cli import compile as compile_module
from selconv_jax._cli.main import main
from selconv_jax.data._abstract import abstract_data
from selconv_jax.data._loading import open_data
from selconv_jax.data._stream import StreamedData
from selconv_jax.errors import ConfigError, DataError

# Shortened from what compilers write.
TEXT = """\
  %all-reduce.1 = f32[8,4]{1,0:T(8,128)} all-reduce(%x), channel_id=1, metadata={op_name="jit(step)/psum"}
  %ar-start = (f32[8]{0}, f32[2]{0}) all-reduce-start(%a, %b), channel_id=2
  %ar-done = (f32[8]{0}, f32[2]{0}) all-reduce-done(%ar-start)
  %ag = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%y), dimensions={0}
  ROOT %cp = pred[16]{0} collective-permute(%z), source_target_pairs={{0,1}}
  %fusion = f32[100]{0} fusion(%all-reduce.1), calls=%all-reduce-computation
"""


def test_messages_of_a_program():
    assert message_sizes(TEXT) == {"all-reduce": [128, 40], "all-gather": [64], "collective-permute": [16]}
    assert message_sizes("") == {}


def test_rates_of_chips():
    v5e = chip_of("v5e:16x16")
    assert v5e.memory == 16 * 2**30
    assert v5e.link_bytes == 200e9
    assert v5e.clock == pytest.approx(1.5e9, rel=0.01)
    assert chip_of("v99:1x1") is None
    h100 = chip_of("h100:8")
    assert (h100.memory, h100.link_bytes) == (80 * 10**9, None)


@pytest.mark.parametrize("name", ["fashion_mnist_sample", "cifar10", "imagenet2012"])
def test_data_without_images_has_the_facts_of_the_real_one(name):
    data = abstract_data(name)
    assert isinstance(data, StreamedData) == (name == "imagenet2012")
    assert len(data.train) > len(data.test) > 0
    if name == "fashion_mnist_sample":
        real = open_data(name)
        assert (len(data.train), len(data.test)) == (len(real.train), len(real.test))
        assert dataclasses.replace(data.info, class_names=None) == dataclasses.replace(
            real.info, class_names=None
        )
    else:
        assert isinstance(abstract_data(name, streaming=True), StreamedData)
    if isinstance(data, StreamedData):
        with pytest.raises(DataError, match="image 3 cannot be read"):
            data.train[3]


def test_data_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(DataError, match="no_such_set"):
        abstract_data("no_such_set", str(tmp_path))


@pytest.fixture(scope="module")
def plan():
    """A run compiled for eight devices that are there: this machine's."""
    config = tiny_config(batch_size=128, devices=0, data=ALL_IMAGES)
    return compile_run(config, "v5e:2x4", jax.devices(), capacity=0.25)


def test_programs_and_messages_of_a_run(plan):
    step, evaluation = plan.programs
    assert (step.name, evaluation.name) == ("training step", "evaluation")
    assert plan.chips == 8
    assert step.fits
    assert step.memory["total"] > plan.gradient_bytes > 0
    by_kind = {messages.kind: messages for messages in step.messages}
    # Gradients and counts are summed, the statistics of every layer gathered.
    assert set(by_kind) == {"all-reduce", "all-gather"}
    assert by_kind["all-reduce"].bytes > plan.gradient_bytes
    assert sum(messages.bytes for messages in evaluation.messages) < 100
    assert step.message_seconds > 0


@pytest.mark.parametrize(("variant", "asked", "told"), [("selective", 0.3, 0.5), ("plain", 0.25, 0.0)])
def test_the_capacity_is_that_of_the_program(monkeypatch, variant, asked, told):
    monkeypatch.setattr(run_ahead, "compile_ahead", lambda name, lower, topology: name)
    config = tiny_config(batch_size=128, devices=0, data=ALL_IMAGES, model={"variant": variant})
    assert compile_run(config, "v5e:2x4", jax.devices(), capacity=asked).capacity == told


def test_per_device_has_one_message_for_the_gradient():
    config = tiny_config(batch_size=128, devices=0, data=ALL_IMAGES, batch_norm="per_device")
    plan = compile_run(config, "v5e:2x4", jax.devices(), evaluation=False)
    (messages,) = plan.programs[0].messages
    assert messages.kind == "all-reduce"
    assert messages.count <= 2
    assert plan.gradient_bytes <= messages.largest <= 1.05 * plan.gradient_bytes or messages.count == 1


def test_tables_and_estimate():
    gigabyte = {"total": 2**30}
    step = CompiledProgram(
        "training step",
        gigabyte,
        True,
        [Messages("all-reduce", 2, 3_000_000, 2_900_000)],
        1_500_000,
        None,
        0.001,
        9.0,
    )
    evaluation = CompiledProgram("evaluation", gigabyte, False, [], 100_000, None, 0.0, 3.0)
    plan = RunPlan("v5e:2x4", 8, 512, 1, 0.25, 2_900_000, 16 * 2**30, 1.5e9, [step, evaluation])
    text = io.StringIO()
    console = Console(file=text, width=120)
    console.print(plan_table(plan, "a run"))
    console.print(messages_table(plan))
    rows = [line.split() for line in text.getvalue().splitlines()]
    assert ["training", "step", "1,073.7", "yes", "1,500", "9.0"] in rows
    assert ["evaluation", "1,073.7", "no", "100", "3.0"] in rows
    assert ["training", "step", "all-reduce", "2", "3.000", "2.900"] in rows
    assert "1.00 ms computing, 1.00 ms in messages that nothing else overlaps, so 50% of it" in scaling_line(
        plan
    )
    assert "not known" in scaling_line(dataclasses.replace(plan, clock=None))
    assert "micro-batches" in scaling_line(dataclasses.replace(plan, micro_batches=2))


def test_time_of_messages_by_hand():
    """Twice the bytes but for each chip's own part, over the links; 2 + 1 hops there and back, 1 us each."""
    seconds = message_seconds([2_000_000], chip_of("v5e:4x2"), "v5e:4x2")
    assert seconds == pytest.approx(2 * 2e6 * 7 / 8 / 200e9 + 6e-6)
    assert message_seconds([10], chip_of("v5e:1x1"), "v5e:1x1") == 0.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 100}, "batch_size is 100, which does not divide over the 8 chips of v5e:2x4. .*=96"),
        ({"batch_size": 4}, "such as batch_size=8"),
        ({"batch_size": 24, "micro_batches": 2}, "in 2 micro-batches. Choose a multiple of 16"),
        (
            {"batch_size": 8, "parameter_shards": 3},
            "parameter_shards is 3, which does not divide the 8 chips",
        ),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(ConfigError, match=said):
        compile_run(tiny_config(**changes), "v5e:2x4", jax.devices())


def plan_that_fits(most):
    """Stands for the compiler: batches up to a size fit."""

    def compile_run(config, topology, devices, **_):
        if config.batch_size > 2 * most:
            raise ConfigError("the training step does not fit in the memory")
        fits = config.batch_size <= most
        program = CompiledProgram("training step", None, fits, [], 1, None, 0.0, 1.0)
        return RunPlan(topology, len(devices), config.batch_size, 1, 0.25, 1, 1, 1.0, [program])

    return compile_run


@pytest.mark.parametrize(("most", "found"), [(700, 512), (2000, 1024), (10**6, 1024), (40, 32), (7, None)])
def test_search_for_the_largest_batch(monkeypatch, most, found):
    """Not above the number of images, 2,000; a compiler that gives up counts as no."""
    monkeypatch.setattr(run_ahead, "compile_run", plan_that_fits(most))
    result = largest_batch(tiny_config(batch_size=256, data=ALL_IMAGES), "v5e:2x4", jax.devices())
    assert (result and result.batch_size) == found


@pytest.mark.slow
def test_compiles_for_a_pod(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'batch_size = 64\nbatch_norm = "per_device"\n[model]\noptions = { blocks = [1], growth = 8 }\n'
    )
    run_with_compiler(
        *("compile", file, "--topology", "v5e:2x4", "--output", tmp_path / "plan.json"), packages=["libtpu"]
    )
    plan = json.loads((tmp_path / "plan.json").read_text())
    (messages,) = plan["programs"][0]["messages"]
    assert messages["kind"] == "all-reduce"
    assert messages["count"] <= 2
    assert plan["programs"][0]["cost"] > 0
    assert plan["programs"][0]["fits"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--capacity", "2"], "--capacity is 2.0"),
        (["--batch", "most"], "--batch is 'most'; it must be a number of images, or search"),
        (["--output", "."], ". is a folder. Choose the name of a file."),
        (["--output", "run.toml"], "run.toml: there is a file already"),
        (["--output", "nowhere/plan.json"], "there is no folder nowhere; make it first"),
        (["--compare", "--batch", "search"], "do not go together"),
    ],
)
def test_command_lines_that_make_no_sense(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("epochs = 1\n")
    assert main(["compile", "run.toml", "--topology", "v5e:1x1", *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_the_compared_steps_leave_out_is_said(tmp_path, monkeypatch, capsys, micro_batches):
    monkeypatch.setattr(compile_module, "prepare_compiler", lambda topology: None)
    monkeypatch.setattr(compile_module, "topology_devices", lambda topology: [None])
    monkeypatch.setattr(compile_module, "compile_steps", mock.Mock(side_effect=ConfigError("no compiler")))
    (tmp_path / "run.toml").write_text(f"micro_batches = {micro_batches}\n")
    assert main(["compile", str(tmp_path / "run.toml"), "--topology", "v5e:1x1", "--compare"]) == 1
    said = "micro_batches of the configuration: not used in the benchmark's steps" in capsys.readouterr().out
    assert said == (micro_batches > 1)

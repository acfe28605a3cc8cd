"""What `selconv show` counts of a run, with and without checkpoints, allocations and data."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from runs import compiled_once, final_arrays, quiet_console, tiny_config
from selconv_jax import SelectiveConv
from selconv_jax._cli.main import main
from selconv_jax._cli.pictures import _forward, print_run
from selconv_jax.models import create_model
from selconv_jax.train import _loop as loop
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._evaluation import compact_run


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


def trained(folder, **changes):
    config = tiny_config(**{"allocation": {"threshold": 0.6}, "epochs": 2, **changes})
    assert loop.train_run(config, folder, quiet_console()[0]) == 0
    return folder


@pytest.fixture
def workdir(reallocated_run):
    return reallocated_run


def shown(workdir):
    console, text = quiet_console()
    print_run(workdir, console)
    return text.getvalue()


def total(output):
    return [line.split()[1:] for line in output.splitlines() if line.split()[:1] == ["total"]][-1]


def renamed(workdir, folder, data):
    """A copy of the run with another data set in its configuration."""
    shutil.copytree(workdir, folder)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('"fashion_mnist_sample"', f'"{data}"'))
    assert data in config.read_text()
    return folder


def test_show_prints_the_sizes_that_compaction_tells(workdir, capsys, tmp_path):
    sizes = compact_run(workdir).sizes
    _, arrays = final_arrays(workdir)
    assert (arrays["selectivity/block1_layer1/conv1/source"] >= 0).any()
    assert main(["show", str(workdir), "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "per image of 28x28x1; selective: as compiled for copies in up to" in " ".join(output.split())
    plain, selective, small, *multiply_adds = total(output)
    assert (selective, small) == tuple(f"{count:,}" for count in sizes["parameters"])
    shifts = arrays["params/block1_layer1/conv1/shift"].size
    assert plain == f"{sizes['parameters'][0] - shifts:,}"
    whole, least = (f"{count / 1e6:.3f}" for count in sizes["multiply-adds"])
    assert multiply_adds[1:] == [whole, least]
    assert float(multiply_adds[0]) < float(whole)


def test_no_data_is_needed(workdir, tmp_path, monkeypatch):
    expected = total(shown(workdir))

    def refuse(*arguments, **options):
        raise AssertionError("the data was opened")

    monkeypatch.setattr(run_setup, "open_data", refuse)
    other = renamed(workdir, tmp_path / "other", "fashion_mnist:3.0.1")
    assert total(shown(other)) == expected


def test_images_of_unknown_size(workdir, tmp_path):
    output = shown(renamed(workdir, tmp_path / "other", "beans"))
    assert "not counted, as the size of the images of beans is in none of the run's files" in output
    assert "block1_layer1/conv2" in output


def test_no_checkpoint(workdir, tmp_path):
    folder = renamed(workdir, tmp_path / "other", "fashion_mnist_sample")
    shutil.rmtree(folder / "checkpoints")
    assert "not counted, as there is no checkpoint" in shown(folder)


@pytest.mark.slow
def test_a_plain_run_and_one_that_only_closes(tmp_path):
    plain = shown(trained(tmp_path / "plain", epochs=1, model={"variant": "plain"}))
    closing = shown(trained(tmp_path / "closing", model={"variant": "gate_only"}))
    assert "selective" not in plain
    assert "as compiled for no copies" in " ".join(closing.split())
    parameters, multiply_adds = total(plain)
    counts = total(closing)
    assert counts[:2] == [parameters, parameters]
    assert counts[3:5] == [multiply_adds, multiply_adds]
    assert float(counts[5]) < float(multiply_adds)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("densenet_bc190", {"blocks": [1, 11, 1], "growth": 2}),
        ("preresnet164", {"blocks": [1, 2]}),
        ("condensenet182", {"blocks": [2, 1], "growth": [4, 8]}),
    ],
)
def test_layers_are_in_the_order_of_their_calls(name, options):
    network = create_model(name, 10, variant="selective", **options)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    called = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, SelectiveConv) and context.method_name == "__call__":
            called.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(lambda image: network.init(jax.random.key(0), image, train=False), image)
    assert sorted(called, key=_forward) == called

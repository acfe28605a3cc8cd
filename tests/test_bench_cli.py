"""``selconv bench``: what it leaves, and what it refuses before anything is computed."""

import importlib.util
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

import selconv_jax
from selconv_jax._bench.compilation import compile_program, without_compilation_cache
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._cli import bench as bench_command
from selconv_jax._cli.main import main
from selconv_jax.errors import ConfigError
from selconv_jax.train._signals import StopRequest

TINY = ["densenet40", "blocks=[1]", "growth=4", "--image", "8x8x3", "--batch", "4", "--repeats", "3"]


def bench(*arguments):
    return main(["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a whole benchmark."""
    output = tmp_path_factory.mktemp("bench") / "out"
    what = "step,frozen,compact,reallocate,eval,input,memory"
    assert bench(*TINY, "--capacity", "0,0.5", "--what", what, "--output", output) == 0
    return output


def test_leaves_every_number_and_a_picture(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["bench.json", "bench.png"]
    assert (finished / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads((finished / "bench.json").read_text())
    settings = report["settings"]
    assert (settings["batch"], settings["image"], settings["seed"]) == (4, [8, 8, 3], 0)
    assert settings["options"] == {"blocks": [1], "growth": 4}
    environment = report["environment"]
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["cores"] >= 1
    assert environment["device"]
    (network,) = report["networks"]
    assert network["complete"] is True
    cases = {case["name"]: case for case in network["cases"]}
    names = ["plain", "selective, capacity 0", "selective, capacity 0.5", "one round, whole network"]
    names += ["eval plain", "eval selective, capacity 0.25", "gather and augment"]
    names[3:3] = ["frozen, 0.25 re-allocated", "compact, 0.25 closed"]
    assert network["notes"] == []
    assert list(cases) == names
    for name, case in cases.items():
        assert len(case["seconds"]) == case["summary"]["count"] == 3, name
        assert min(case["seconds"]) == case["summary"]["minimum"] > 0
    assert all(sorted(seconds) == sorted(names) for seconds in network["rounds"])
    assert cases["selective, capacity 0"]["ratio"]["to"] == "plain"
    assert cases["eval selective, capacity 0.25"]["ratio"]["to"] == "eval plain"
    assert cases["gather and augment"]["images_per_second"] > 0
    memory = cases["plain"]["memory"]
    total = memory["arguments"] + memory["outputs"] + memory["temporary"] - memory["in_place"]
    assert memory["total"] == total > 0


def test_seeds_together_beside_one_after_the_other(tmp_path, capsys):
    arguments = ["--capacity", "0.5", "--what", "step,memory", "--repeats", "1", "--together", "3"]
    assert bench(*TINY, *arguments, "--output", tmp_path / "out") == 0
    (network,) = json.loads((tmp_path / "out" / "bench.json").read_text())["networks"]
    cases, text = {case["name"]: case for case in network["cases"]}, capsys.readouterr().out
    assert list(cases) == [
        "plain",
        "plain, 3 seeds",
        "selective, capacity 0.5",
        "selective, capacity 0.5, 3 seeds",
    ]
    for name in ("plain", "selective, capacity 0.5"):
        alone, together = cases[name], cases[f"{name}, 3 seeds"]
        assert (alone["seeds"], together["seeds"], together["base"]) == (1, 3, name)
        # Of one step of one seed.
        (seconds,) = together["seconds"]
        assert together["images_per_second"] == pytest.approx(4 / seconds)
        gain = f"3 seeds together make {alone['seconds'][0] / seconds:.2f} times as many steps per second"
        assert f"{gain} as one after the other ({name})" in text
        assert 2 < together["memory"]["arguments"] / alone["memory"]["arguments"] < 3.1


def test_is_never_written_over(finished, capsys):
    before = (finished / "bench.json").read_bytes()
    assert bench(*TINY, "--output", finished) == 1
    assert "is not empty (it holds 'bench.json')" in capsys.readouterr().err
    assert (finished / "bench.json").read_bytes() == before


def test_stopped_with_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: True)
    monkeypatch.setattr(StopRequest, "exit_code", 130)
    assert bench(*TINY, "--output", tmp_path / "out") == 130
    assert "stopped" in capsys.readouterr().out
    (network,) = json.loads((tmp_path / "out" / "bench.json").read_text())["networks"]
    assert network["complete"] is False
    assert not (tmp_path / "out" / "bench.png").exists()


def test_caption_counts_the_rounds_that_were_taken(tmp_path, monkeypatch):
    captions, asked = [], itertools.count()
    monkeypatch.setattr(bench_command, "bar_picture", lambda *texts: captions.append(texts[-1]))
    monkeypatch.setattr(bench_command, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(bench_command, "load_average", lambda: None)
    # Asked once for each program that is compiled and each that is timed.
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: next(asked) >= 7)
    output = tmp_path / "out"
    bench(*TINY, "--capacity", "0", "--what", "step", "--repeats", "9", "--output", output)
    (network,) = json.loads((output / "bench.json").read_text())["networks"]
    counts = sorted({case["summary"]["count"] for case in network["cases"]})
    assert counts[-1] < 9
    assert captions[0].startswith(f"medians and quartiles of {' to '.join(map(str, counts))} round")
    assert captions[0].endswith("before, not known after")


@pytest.mark.slow
def test_against_torch(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "out"
    assert bench(*TINY, "--capacity", "0.5", "--what", "step", "--torch", "--output", output) == 0
    (network,) = json.loads((output / "bench.json").read_text())["networks"]
    cases = {case["name"]: case for case in network["cases"]}
    assert "augmented" in network["notes"][0]
    assert cases["plain"]["torch_ratio"]["to"] == "torch plain"
    assert cases["selective, capacity 0.5"]["torch_ratio"]["to"] == "torch selective, 0.5 re-allocated"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["densnet40"], "Did you mean 'densenet40'?"),
        (["densenet40", "growht=3"], "Did you mean 'growth'?"),
        (["densenet40", "variant=plain"], "variant cannot be set"),
        (["densenet40", "blocks=[]"], "blocks is ()"),
        (["--what", "step,evla"], "Did you mean 'eval'?"),
        (["--capacity", "0,2"], "2.0 is not one"),
        (["--capacity", "a"], "--capacity is 'a'; it must be of the form 0,0.25."),
        (["--share", "-0.5"], "-0.5 is not one"),
        (["--image", "32"], "--image is (32,)"),
        (["--image", "32xx3"], "--image is '32xx3'; it must be of the form 32x32x3."),
        (["--batch", "0"], "--batch is 0; it must be at least 1."),
        (["--repeats", "0"], "--repeats is 0"),
        (["--steps", "-1"], "--steps is -1"),
        (["--dtype", "float16"], "--dtype is 'float16'; it must be one of float32, bfloat16."),
        (["--seed", "-1"], "--seed is -1"),
        (["--together", "1"], "--together is 1; it must be at least 2 seeds"),
    ],
)
def test_refusals(arguments, said, tmp_path, capsys):
    assert bench(*arguments, "--output", tmp_path / "out") == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_leaves_no_empty_directory(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise ConfigError("the images are too small.")

    monkeypatch.setattr(bench_command, "bench_network", fail)
    assert bench(*TINY, "--output", tmp_path / "out") == 1
    assert "too small" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert bench(*TINY, "--output", tmp_path) == 1
    assert tmp_path.is_dir()  # as it was there before
    (tmp_path / "file").touch()
    assert bench(*TINY, "--output", tmp_path / "file") == 1
    assert "Choose another --output" in capsys.readouterr().err


def test_torch_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install torch"):
        BenchSettings(torch=True)


def test_compilation_is_timed_without_the_cache():
    ticks = iter([10.0, 11.0, 14.0])
    with without_compilation_cache():
        assert not jax.config.jax_enable_compilation_cache
        program = compile_program(lambda: jax.jit(lambda x: 2 * x).lower(jnp.arange(3)), lambda: next(ticks))
    assert jax.config.jax_enable_compilation_cache
    assert (program.lower_seconds, program.compile_seconds) == (1.0, 3.0)
    assert program.run(jnp.arange(3)).tolist() == [0, 2, 4]
    assert program.memory is None or program.memory["arguments"] == 12


def test_torch_without_a_checkout(monkeypatch, tmp_path):
    """An installed package lies beside no experiments."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selconv_jax, "__file__", str(tmp_path / "selconv_jax" / "__init__.py"))
    with pytest.raises(ConfigError, match="Run it in a checkout of the project"):
        BenchSettings(torch=True)

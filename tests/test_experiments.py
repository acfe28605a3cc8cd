"""The configurations: their values, the table that lists them, and the commands of studies that name them."""

import dataclasses
import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
from configuration_table import configuration_table, main, write_configuration_table
from flax import traverse_util

from selconv_jax import ConfigError
from selconv_jax.models import MODELS
from selconv_jax.train._config import load_config, parse_config

ROOT = Path(__file__).resolve().parent.parent / "experiments"
CONFIGS = {file.relative_to(ROOT).as_posix(): load_config(file) for file in sorted(ROOT.rglob("*.toml"))}

# The published runs: epochs and batch size by data set, and where copies are limited to 32.
EPOCHS_AND_BATCH = {
    "cifar10": (300, 64),
    "cifar100": (300, 64),
    "fashion_mnist": (300, 128),
    "tiny_imagenet": (200, 128),
}
AT_MOST_32_COPIES = [
    ("cifar10", "densenet100"),
    ("tiny_imagenet", "densenet100"),
    ("cifar10", "resnext29"),
    ("cifar100", "resnext29"),
    ("tiny_imagenet", "resnext29"),
]


def published():
    """What each published file has to say, by its path."""
    trees = {}
    for (data, (epochs, batch_size)), model, variant in itertools.product(
        EPOCHS_AND_BATCH.items(),
        ("densenet40", "densenet100", "preresnet164", "resnext29"),
        ("plain", "selective"),
    ):
        limited = variant == "selective" and (data, model) in AT_MOST_32_COPIES
        trees[f"{data}/{model}_{variant}.toml"] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "model": {"name": model, "variant": variant},
            "data": {"name": data},
            "allocation": {"threshold": 1e-3, "top_k": 3, "max_copies": 32 if limited else None},
        }
    trees["cifar10/condensenet182_gate_only.toml"] = {
        "epochs": 600,
        "batch_size": 64,
        "model": {"name": "condensenet182", "variant": "gate_only"},
        "data": {"name": "cifar10"},
        "allocation": {"threshold": 1e-3, "top_k": 0},
    }
    return trees


def test_there_are_33_published_configurations():
    assert len(published()) == 33
    named = {path for path, config in CONFIGS.items() if "the published configuration" in config.description}
    assert named == set(published())


@pytest.mark.parametrize("path", published())
def test_published_configuration_has_the_published_values(path):
    # All other values are the defaults, which test_train_config holds to the published ones.
    expected = parse_config(published()[path])
    assert dataclasses.replace(CONFIGS[path], description="") == expected


def test_every_ablation_differs_from_the_published_configuration_in_what_its_name_says():
    base = CONFIGS["cifar10/densenet40_selective.toml"]
    changes = {
        "no_reallocation": {"model.variant": "gate_only", "allocation.top_k": 0},
        "random_sources": {"allocation.random_sources": True},
        "frozen_shift": {"optimizer.train_shift": False},
        "no_shift": {"optimizer.train_shift": False, "allocation.shift_range": 0.0},
        **{f"threshold_1e-{n}": {"allocation.threshold": 10.0**-n} for n in (1, 2, 4)},
        **{f"top_k_{k}": {"allocation.top_k": k} for k in (1, 2, 5, 8)},
        **{f"max_copies_{n}": {"allocation.max_copies": n} for n in (8, 32)},
    }
    ablations = {path: config for path, config in CONFIGS.items() if path.startswith("ablations/")}
    assert set(ablations) == {f"ablations/{name}.toml" for name in changes}
    for name, change in changes.items():
        config = dataclasses.replace(ablations[f"ablations/{name}.toml"], description=base.description)
        for key, value in change.items():
            section, field = key.split(".")
            assert getattr(getattr(config, section), field) == value, name
            restored = {field: getattr(getattr(base, section), field)}
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **restored)}
            )
        assert config == base, name


def test_random_sources_reach_the_transform():
    assert CONFIGS["ablations/random_sources.toml"].allocation.rule.random_sources
    assert not CONFIGS["cifar10/densenet40_selective.toml"].allocation.rule.random_sources


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_densenet_bc190_trains_with_mixup(data):
    assert CONFIGS[f"{data}/densenet_bc190_plain.toml"].data.mixup == 1.0
    assert CONFIGS[f"{data}/densenet_bc190_selective.toml"].data.mixup == 1.0
    assert all(not config.data.mixup for path, config in CONFIGS.items() if "bc190" not in path)


def test_every_network_of_the_registry_has_an_experiment():
    assert {config.model.name for config in CONFIGS.values()} == set(MODELS)


def test_the_readme_holds_the_current_table():
    text = (ROOT / "README.md").read_text()
    assert configuration_table(ROOT) in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and ".toml" in line]
    assert len(rows) == len(CONFIGS)
    row = next(row for row in rows if row.startswith("| densenet100_selective.toml") and " cifar10 " in row)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "densenet100_selective.toml",
        "densenet100",
        "selective",
        "cifar10",
        "300",
        "64",
        "0.001",
        "3",
        "32",
        "Selective DenseNet-100 on CIFAR-10, the published configuration",
    ]


def test_writing_the_table(tmp_path):
    (tmp_path / "a.toml").write_text('description = "this | that"\n[model]\nvariant = "plain"\n')
    with pytest.raises(ConfigError, match=r"README\.md needs the lines"):
        write_configuration_table(tmp_path)
    readme = tmp_path / "README.md"
    begin, end = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("<!--"))
    readme.write_text(f"before\n{begin}\nof before\n{end}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        assert write_configuration_table(tmp_path) == readme
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "of before" not in text
        assert text.count("a.toml") == 1
        assert "| - " in text
        assert "this \\| that" in text
    (tmp_path / "b.toml").write_text("epoch = 3\n")
    with pytest.raises(ConfigError, match=r"b\.toml: unknown configuration key 'epoch'"):
        configuration_table(tmp_path)
    with pytest.raises(ConfigError, match="there is no configuration"):
        configuration_table(tmp_path / "nowhere")


def test_the_table_as_a_script(tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text("epochs = 4\n")
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].startswith("| file")
    assert "| tiny.toml | densenet40 | selective | fashion_mnist_sample | 4 " in table
    assert main([str(tmp_path), "--write"]) == 1
    assert "README.md needs the lines" in capsys.readouterr().err


STUDIES = ROOT / "studies"


def test_configurations_of_a_study_differ_in_what_their_names_say():
    def differences(study, base, other):
        old, new = (
            traverse_util.flatten_dict(dataclasses.asdict(CONFIGS[f"studies/{study}/{name}.toml"]), sep=".")
            for name in (base, other)
        )
        keys = {key for key in old | new if old.get(key) != new.get(key)}
        return keys - {"description"}

    variant = {"model.variant"}
    assert differences("small_densenet", "selective", "plain") - {"allocation.threshold"} == variant
    assert differences("small_densenet", "selective", "gate_only") == variant | {"allocation.top_k"}
    assert differences("small_densenet", "selective", "no_shift") == {
        "allocation.shift_range",
        "optimizer.train_shift",
    }
    assert differences("fashion", "selective", "plain") - {"allocation.threshold"} == variant
    networks = [repr(CONFIGS[f"studies/{study}/plain.toml"].model) for study in ("small_densenet", "fashion")]
    assert networks[0] == networks[1]


def test_commands_of_studies_name_configurations_that_exist():
    readmes = sorted(STUDIES.glob("*/README.md"))
    assert {"small_densenet", "fashion", "published"} <= {readme.parent.name for readme in readmes}
    for readme in readmes:
        (command,) = re.findall(r"^    (?:selconv|python) .*", readme.read_text(), flags=re.MULTILINE)
        files = [word for word in command.split() if word.startswith("experiments/")]
        assert files, readme
        for file in files:
            assert list(ROOT.parent.glob(file)), (readme, file)


def study_script(name):
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDIES / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_densenet_compares_with_the_threshold_that_validation_chose(tmp_path, monkeypatch):
    script, calls = study_script("small_densenet"), []

    def sweep(arguments):
        calls.append(arguments)
        workdir = Path(arguments[arguments.index("--workdir") + 1])
        workdir.mkdir(parents=True, exist_ok=True)
        scores = {1e-3: 0.5, 1e-2: 0.75, 5e-2: 0.75}
        report = [
            {
                "resolved": {"allocation": {"threshold": threshold}},
                "summary": {"validation_accuracy": {"mean": score}},
            }
            for threshold, score in scores.items()
        ]
        (workdir / "sweep.json").write_text(json.dumps({"configurations": report}))
        return 0

    monkeypatch.setattr(script, "selconv", sweep)
    assert script.main(["--workdir", str(tmp_path), "--jobs", "2"]) == 0
    choice, comparison = calls
    assert choice[choice.index("--vary") + 1] == "allocation.threshold=1e-3,1e-2,5e-2"
    assert choice[choice.index("--seeds") + 1] == "100"
    assert "allocation.threshold=0.01" in comparison
    assert comparison[comparison.index("--seeds") + 1] == "0,1,2,3,4"
    assert [word.rpartition("/")[2] for word in comparison[1:5]] == [
        "plain.toml",
        "selective.toml",
        "gate_only.toml@0,1,2",
        "no_shift.toml@0,1,2",
    ]
    assert all(call[-2:] == ["--jobs", "2"] for call in calls)
    monkeypatch.setattr(script, "selconv", lambda arguments: calls.append(arguments) or 143)
    assert script.main(["--workdir", str(tmp_path)]) == 143
    assert len(calls) == 3  # stopped while choosing: nothing is compared

"""The study of criteria: its rankings, and the gates that follow from them."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from selconv_jax.analysis import count_multiply_adds, count_parameters
from selconv_jax.models import create_model
from selconv_jax.transforms._layer_tree import layer_states

STUDY = Path(__file__).resolve().parent.parent / "experiments" / "studies" / "which_channel"
CRITERIA = runpy.run_path(str(STUDY / "criteria.py"))
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(STUDY)  # as for a script that is run
    SUMMARY = runpy.run_path(str(STUDY / "summary.py"))


def layer():
    """One layer of three channels and two outputs; the third channel is never positive."""
    module = selconv_jax.SelectiveConv(features=2, kernel_size=(1,), gate_only=True)
    variables = module.init(jax.random.key(0), jnp.ones((1, 4, 3)), train=False)
    params = variables["params"] | {
        "kernel": jnp.array([[[1.0, -1.0], [0.5, 0.5], [3.0, -3.0]]]),
        "scale": jnp.array([0.0, -2.0, 0.0]),
        "bias": jnp.array([3.0, 0.0, -1.0]),
    }
    return layer_states({**variables, "params": params})


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # Damages [[3, e / 2, 0], [-3, e / 2, 0]], with e the mean of a half normal, 2 / sqrt(2 pi).
        ("expected channel damage", np.array([3.0, (2 * np.pi) ** -0.5, 0]) / (3 + (2 * np.pi) ** -0.5)),
        ("batch norm scale", [0, 2, 0]),
        ("kernel L1 norm", [2 / 9, 1 / 9, 6 / 9]),
    ],
)
def test_scores(criterion, expected):
    (score,) = CRITERIA["rankings"](layer(), criterion, 0).values()
    np.testing.assert_allclose(score, expected, rtol=1e-6, atol=1e-9)


def test_random_scores_are_those_of_the_seed():
    one, same, other = (CRITERIA["rankings"](layer(), "random", seed) for seed in (1, 1, 2))
    for path, score in one.items():
        np.testing.assert_array_equal(score, same[path])
        assert (score != other[path]).all()


def test_lowest_channels_of_all_layers_are_closed():
    scores = {"a": np.array([0.1, 0.2, 0.9]), "b": np.array([0.5, 0.3, 0.4, 0.6, 0.7])}
    gates = CRITERIA["close"](scores, 0.5)
    assert gates["a"].tolist() == [False, False, True]
    assert gates["b"].tolist() == [True, False, False, True, True]
    assert all(gate.all() for gate in CRITERIA["close"](scores, 0.0).values())


def test_the_best_channel_of_a_layer_stays():
    scores = {"low": np.array([0.0, 0.0]), "high": np.array([1.0, 2.0, 3.0, 4.0])}
    gates = CRITERIA["close"](scores, 0.8)
    assert gates["low"].sum() == 1
    assert gates["high"].tolist() == [False, False, False, True]


def test_a_library_prunes_the_network_that_was_trained():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_pruning")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDY)
        library = runpy.run_path(str(STUDY / "pruning_library.py"))
    from pytorch_baseline.networks import torch_network  # its folder is added by the script

    image = (16, 16, 3)
    for name, blocks in (("densenet40", (1, 1)), ("preresnet164", (1, 1))):
        model = create_model(name, 10, variant="plain", blocks=blocks, stem="tiny_imagenet")
        variables = jax.jit(model.init, static_argnames="train")(
            jax.random.key(0), jnp.ones((1, *image)), train=False
        )
        network = torch_network(model, 3)
        for norm in (part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(norm.weight)  # among equal scales there is none to remove
        whole = library["sizes"](network, image)
        assert whole["parameters"] == count_parameters(variables["params"])
        counts = count_multiply_adds(
            lambda x, model=model, variables=variables: model.apply(variables, x, train=False),
            jnp.ones((1, *image)),
        )
        assert whole["multiply_adds"] == sum(counts.values())
        for criterion in library["LIBRARY"]:
            smaller = library["sizes"](library["prune"](network, criterion, 0.3, image), image)
            assert smaller["parameters"] < whole["parameters"]
            assert library["sizes"](network, image) == whole


def test_table_of_seeds():
    sizes = {"network": "n", "parameters": 10, "multiply_adds": 1e6}
    accuracies = {"expected channel damage": (0.5, 0.8), "random": (0.4, 0.6)}
    rows = [
        {**sizes, "seed": seed, "criterion": criterion, "share": share, "test_accuracy": accuracy - share}
        for criterion, values in accuracies.items()
        for seed, accuracy in enumerate(values)
        for share in (0.0, 0.3)
        if share or criterion != "random"
    ]
    rows[-1]["test_accuracy_trained_on"] = 0.75
    text = SUMMARY["table"]({"criteria": rows, "environments": [], "trained": []})
    assert "test accuracy 65.0 ± 21.2%; parameters and multiply-adds 10; 1.00 M" in text
    lines = text.splitlines()
    assert "| 30% | 35.0 ± 21.2 | 20.0 ± 14.1 |" in lines
    assert "| 30%, trained on | - | 75.0 |" in lines
    # Student's t for one degree of freedom is 12.7, and the standard error of 10 and 20 is 5.
    assert "| 30% | +15.0 (-48.5 to +78.5) |" in lines
    assert "| 30% | 10; 1.00 M | 10; 1.00 M |" in lines
    figure = SUMMARY["picture"](rows)
    assert [axes.get_xlabel() for axes in figure.axes] == list(SUMMARY["_AXES"].values())

"""The network that cannot look around: what it sees, what its controls are, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from runs import QUICK
from selconv_jax import ConfigError
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.models import Pointwise, create_model
from selconv_jax.train._config import OptimizerConfig
from selconv_jax.train._optimizer import make_optimizer
from states import perturbed_variables

IMAGE = (16, 16, 3)
SMALL = {"blocks": (1, 1), "widths": (6, 8)}
# The plain 3x3 network of about the same cost.
WIDE_KERNEL = {"variant": "plain", "kernel_size": 3, "widths": (10, 11, 12)}


def images():
    return 4 * jax.random.normal(jax.random.key(7), (2, *IMAGE))


def permuted_within_cells(x, cell):
    """The images with the pixels of every ``cell x cell`` square in another order, the same in all."""
    count, height, width, channels = x.shape
    rows, columns = height // cell, width // cell
    cells = x.reshape(count, rows, cell, columns, cell, channels).swapaxes(2, 3)
    order = np.random.default_rng(0).permutation(cell * cell)
    cells = cells.reshape(count, rows, columns, cell * cell, channels)[..., order, :]
    cells = cells.reshape(count, rows, columns, cell, cell, channels).swapaxes(2, 3)
    return cells.reshape(x.shape)


def permuted_pixels(x):
    """The images with the pixels of every image in another order."""
    order = np.random.default_rng(0).permutation(IMAGE[0] * IMAGE[1])
    return x.reshape(len(x), -1, IMAGE[2])[:, order].reshape(x.shape)


def logits(model, variables, *inputs):
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False), compiler_options=QUICK)
    return [apply(variables, x) for x in inputs]


def initial(model, seed=0):
    return model.init(jax.random.key(seed), images(), train=False)


def test_plain_sees_no_order_within_the_cells_of_its_first_pool():
    model = Pointwise(10, **SMALL, variant="plain")
    variables = perturbed_variables(model, (1, *IMAGE), seed=0)
    x = images()
    before, within, across = logits(model, variables, x, permuted_within_cells(x, 2), permuted_pixels(x))
    np.testing.assert_allclose(within, before, rtol=1e-5, atol=1e-5)
    assert np.abs(across - before).max() > 1e-3  # between cells it does: the pools average features


def test_without_pools_it_sees_no_order_at_all():
    model = Pointwise(10, blocks=(2,), widths=(6,), variant="plain")
    variables = perturbed_variables(model, (1, *IMAGE), seed=0)
    before, after = logits(model, variables, images(), permuted_pixels(images()))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shift_range", "sees"), [(1.5, True), (0.0, False)], ids=["shifted", "without shifts"]
)
def test_copies_see_neighbours_through_their_shifts_alone(shift_range, sees):
    """A re-allocated network; the new slots' weights, which restart at 0, are given values as by training."""
    model = Pointwise(10, **SMALL)
    variables = perturbed_variables(model, (1, *IMAGE), seed=0)
    rule = selconv_jax.AllocationRule(threshold=0.4, shift_range=shift_range)
    variables, report = selconv_jax.reallocate(variables, jax.random.key(1), rule)
    assert report.layers["block1_layer1"].copies > 0
    variables["params"] = jax.tree.map(lambda leaf: leaf, variables["params"])
    for layer in ("block1_layer1", "block2_layer1"):
        kernel = variables["params"][layer]["kernel"]
        variables["params"][layer]["kernel"] = jnp.where(kernel == 0, 0.5, kernel)
    before, within = logits(model, variables, images(), permuted_within_cells(images(), 2))
    assert (np.abs(within - before).max() > 1e-3) == sees


@pytest.mark.parametrize(
    ("image", "arguments", "parameters", "multiply_adds"),
    [
        ((28, 28, 1), {"variant": "plain"}, 6_954, 2_132_800),
        ((28, 28, 1), {}, 6_954 + 6 * 32 * 2, 2_132_800),
        ((28, 28, 1), {"shifted": 0.33}, 6_954 + 6 * 32 * 2, 2_132_800),
        ((28, 28, 1), WIDE_KERNEL, 7_135, 2_125_740),
        ((32, 32, 3), {"variant": "plain"}, 7_018, 2_851_136),
        ((32, 32, 3), WIDE_KERNEL, 7_315, 2_960_760),
    ],
)
def test_costs(image, arguments, parameters, multiply_adds):
    model = create_model("pointwise", 10, capacity=0.0, **arguments)

    def init(x):
        return model.init(jax.random.key(0), x, train=False)

    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    assert count_parameters(jax.eval_shape(init, x)["params"]) == parameters
    assert sum(count_multiply_adds(init, x).values()) == multiply_adds


@pytest.mark.parametrize(("share", "counts"), [(0.33, (2, 3)), (1.0, (6, 8))])
def test_shifted_channels_copy_themselves_from_the_start(share, counts):
    variables = initial(Pointwise(10, **SMALL, shifted=share))
    drawn = []
    for layer, count in zip(("block1_layer1", "block2_layer1"), counts, strict=True):
        source = variables["selectivity"][layer]["source"]
        shift = variables["params"][layer]["shift"]
        np.testing.assert_array_equal(source[:count], np.arange(count))
        assert (source[count:] == -1).all()
        assert variables["selectivity"][layer]["gate"].all()
        assert (source.dtype, shift.dtype) == (jnp.int32, jnp.float32)
        assert ((np.abs(shift[:count]) <= 1.5) & (shift[:count] != 0)).all()
        assert not shift[count:].any()
        drawn.append(shift[:2])
    assert (drawn[0] != drawn[1]).all()
    other = initial(Pointwise(10, **SMALL, shifted=share), seed=1)
    assert (other["params"]["block1_layer1"]["shift"][0] != drawn[0][0]).all()


def test_controls_start_from_the_weights_of_the_plain_network():
    plain = initial(Pointwise(10, **SMALL, variant="plain"))["params"]
    for arguments in ({}, {"shifted": 0.5}, {"variant": "gate_only"}):
        params = initial(Pointwise(10, **SMALL, **arguments))["params"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
            other = params
            for part in path:
                other = other[part.key]
            np.testing.assert_array_equal(other, leaf, err_msg=f"{arguments} {path}")


def test_shifted_network_sees_neighbours_and_computes_the_same_when_compact():
    model = Pointwise(10, **SMALL, shifted=0.5)
    variables = initial(model)
    before, within = logits(model, variables, images(), permuted_within_cells(images(), 2))
    assert np.abs(within - before).max() > 1e-3
    small_model, small = selconv_jax.compact(model, variables)
    assert "selectivity" not in small
    np.testing.assert_allclose(*logits(small_model, small, images()), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_shift", [True, False])
def test_shifts_from_the_start_are_trained_or_stay(train_shift):
    model = Pointwise(3, blocks=(1,), widths=(4,), shifted=0.5)
    variables = initial(model)
    optimizer = make_optimizer(OptimizerConfig(train_shift=train_shift), steps=10)

    def loss(params):
        scores, _ = model.apply(
            {**variables, "params": params}, images(), train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.square(scores))

    params = variables["params"]
    updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    moved = updates["block1_layer1"]["shift"] != 0
    np.testing.assert_array_equal(moved.all(axis=1), [train_shift, train_shift, False, False])
    assert not moved[2:].any()
    assert (updates["block1_layer1"]["kernel"] != 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shifted": 1.5}, r"shifted is 1.5; it must be a fraction"),
        ({"shifted": "all"}, "shifted is 'all'"),
        ({"shifted": 0.5, "variant": "plain"}, 'layers of the variant "plain" have no shifts'),
        ({"shifted": 0.5, "variant": "gate_only"}, 'Set variant to "selective"'),
        ({"kernel_size": 2}, "kernel_size is 2; it must be odd"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"widths": (8, 8)}, r"widths is \(8, 8\); it must be a list of 3, like blocks"),
        ({"widths": (8, 8, 0)}, r"widths is \(8, 8, 0\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Pointwise(**{"num_classes": 10, **arguments})

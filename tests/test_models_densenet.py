"""DenseNets: parameters as published, the function under re-allocation, slots, damage predicted and done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from selconv_jax import AllocationRule, ConfigError
from selconv_jax.functional import expected_channel_damage, normalize_damage
from selconv_jax.models import DenseNet, create_model
from states import perturbed_variables


def shapes(model, size=32, channels=3):
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)


@pytest.mark.slow
def test_densenet_bc190_halves_between_blocks():
    params = shapes(create_model("densenet_bc190", 100))["params"]
    # 80 + 31 * 40 = 1320 -> 660; 660 + 1240 = 1900 -> 950; 950 + 1240 = 2190.
    assert params["transition1"]["kernel"].shape == (1, 1, 1320, 660)
    assert params["transition2"]["kernel"].shape == (1, 1, 1900, 950)
    assert params["classifier"]["linear"]["kernel"].shape == (2190, 100)
    assert "shift" in params["transition1"]


@pytest.mark.parametrize(
    ("stem", "size", "channels", "kernel", "spatial"),
    [
        ("cifar", 32, 3, (3, 3, 3, 8), (32, 32)),
        ("cifar", 28, 1, (3, 3, 1, 8), (28, 28)),
        ("tiny_imagenet", 64, 3, (3, 3, 3, 8), (32, 32)),
        ("imagenet", 224, 3, (7, 7, 3, 8), (56, 56)),
    ],
)
def test_stems(stem, size, channels, kernel, spatial):
    model = DenseNet(num_classes=7, blocks=(1, 1), growth=4, stem=stem)
    image = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    variables = shapes(model, size, channels)
    assert variables["params"]["stem"]["kernel"].shape == kernel
    logits, seen = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, capture_intermediates=True), variables, image
    )
    assert logits.shape == (2, 7)
    assert seen["intermediates"]["stem"]["__call__"][0].shape == (2, *spatial, 8)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("compression", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_reallocation_leaves_the_function_as_deallocation_left_it(compression, seed):
    """Freed kernels restart at zero, so filling the slots changes no output at all."""
    model = DenseNet(num_classes=10, blocks=(2, 1, 1), growth=4, compression=compression)
    variables = perturbed_variables(model, (1, 16, 16, 3), seed, closed=0.1, copies=0.3)
    images = jax.random.normal(jax.random.key(seed), (4, 16, 16, 3))
    apply = jax.jit(lambda v: model.apply(v, images, train=False))
    closing = AllocationRule(threshold=0.2, top_k=0)
    filling = AllocationRule(threshold=0.2, top_k=3)
    deallocated, _ = selconv_jax.reallocate(variables, jax.random.key(0), closing)
    reallocated, report = selconv_jax.reallocate(variables, jax.random.key(0), filling)
    assert report.reallocated > 0
    np.testing.assert_array_equal(apply(reallocated), apply(deallocated))
    assert np.abs(apply(deallocated) - apply(variables)).max() > 0  # closing itself does change it


def test_slots_do_not_change_the_result():
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    model = DenseNet(num_classes=10, blocks=(1, 1), growth=4)
    variables = perturbed_variables(model, images.shape, 0, copies=0.3)
    assert 0 < selconv_jax.required_capacity(variables) <= 0.5

    def loss(params, capacity):
        logits, _ = model.clone(capacity=capacity).apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.square(logits))

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    results = [value_and_grad(variables["params"], capacity) for capacity in (0.5, 1.0)]
    for half, full in zip(*map(jax.tree.leaves, results), strict=True):
        scale = float(jnp.abs(full).max())
        np.testing.assert_allclose(half, full, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
def test_what_deallocation_does_to_densenet40_and_what_was_predicted(record_property, capsys):
    """The damage is a share of each layer's own output: small threshold, small change of the logits."""
    model = create_model("densenet40", 10)
    variables = perturbed_variables(model, (1, 32, 32, 3), seed=0)
    images = jax.random.normal(jax.random.key(1), (16, 32, 32, 3))
    apply = jax.jit(lambda v: model.clone(capacity=0.0).apply(v, images, train=False))
    before = np.asarray(apply(variables))
    changes = []
    for threshold in (1e-3, 1e-2, 1e-1):
        rule = AllocationRule(threshold=threshold, top_k=0)
        after, report = selconv_jax.reallocate(variables, jax.random.key(0), rule)
        predicted = [
            float(_closed_damage(state, report.layers[name].deallocated))
            for name, state in selconv_jax.layer_states(variables).items()
        ]
        assert max(predicted) <= threshold * (1 + 1e-4)
        assert report.deallocated > 0
        change = np.abs(np.asarray(apply(after)) - before).max() / np.abs(before).max()
        changes.append(change)
        with capsys.disabled():
            print(
                f"\nthreshold {threshold:g}: closed {report.deallocated} of {report.channels}, "
                f"predicted {max(predicted):.2e} of the output, measured {change:.2e} of the largest logit"
            )
    assert changes[0] < changes[1] < changes[2]
    assert changes[0] < 0.05


def _closed_damage(state, closed):
    normalized = normalize_damage(expected_channel_damage(state.kernel, state.scale, state.bias, state.gate))
    return jnp.max(jnp.sum(jnp.where(closed[None, :], normalized, 0), axis=1))


def test_logits_are_wide_in_bfloat16():
    model = DenseNet(num_classes=10, blocks=(1,), growth=4, dtype=jnp.bfloat16)
    variables = perturbed_variables(model, (1, 8, 8, 3), seed=0, copies=0.3)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(changed))
    wide, _ = model.clone(dtype=None).apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, wide, atol=0.05 * float(jnp.abs(wide).max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "cifr"}, "stem is 'cifr'. Did you mean 'cifar'?"),
        ({"variant": "selectiv"}, "variant is 'selectiv'. Did you mean 'selective'?"),
        ({"blocks": ()}, "blocks is"),
        ({"blocks": (1, 0)}, "blocks is"),
        ({"growth": 0}, "growth is 0"),
        ({"compression": 0.0}, "compression is 0.0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        DenseNet(**{"num_classes": 10, **arguments})

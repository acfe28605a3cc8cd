"""Optimizers by name, and the learning rate over the steps of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selconv_jax.errors import ConfigError
from selconv_jax.train._config import OptimizerConfig, parse_config
from selconv_jax.train._optimizer import learning_rate_schedule, make_optimizer

PARAMS = {
    "conv": {"kernel": jnp.full((2, 3), 2.0), "scale": jnp.ones(3), "shift": jnp.full((2, 2), 0.5)},
}
GRADS = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.25), PARAMS)


def moved(config):
    optimizer = make_optimizer(config, 10)
    # Some of optax's own code mixes types.
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]["conv"]


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_optimizers_are_the_same_by_their_full_name(name):
    short, full = (moved(OptimizerConfig(name=prefix + name)) for prefix in ("", "optax."))
    jax.tree.map(np.testing.assert_array_equal, full, short)


def test_the_published_rate_is_a_cosine_without_warm_up():
    rate = learning_rate_schedule(OptimizerConfig(), 100, steps_per_epoch=10, batch_size=64)
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(101) / 100))
    np.testing.assert_allclose([rate(step) for step in range(101)], expected, atol=1e-7)


def test_rates_are_scaled_in_proportion_and_warmed_up():
    config = OptimizerConfig(learning_rate=0.1, reference_batch_size=64, warmup_epochs=2.0)
    rate = learning_rate_schedule(config, 100, steps_per_epoch=10, batch_size=256)
    rates = np.asarray([float(rate(step)) for step in range(100)])
    assert rates[20] == pytest.approx(0.4)  # after the warm-up
    assert rates.argmax() == 20
    np.testing.assert_allclose(np.diff(rates[:21]), 0.4 / 21, rtol=1e-4)
    np.testing.assert_allclose(rates[60], 0.2, rtol=1e-5)  # halfway down
    assert 0 < rates[99] < 1e-3


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "lamb"])
def test_optimizers_by_name(name):
    update = moved(OptimizerConfig(name=name))
    assert all(np.all(np.asarray(leaf) < 0) for leaf in jax.tree.leaves(update))


def test_sgd_is_the_published_one():
    update = moved(OptimizerConfig(weight_decay=0.1, shift_weight_decay=0.01))
    # Nesterov's first step: the gradient and 0.9 of it.
    np.testing.assert_allclose(update["kernel"], -0.1 * 1.9 * (0.25 + 0.1 * 2.0), rtol=1e-6)
    np.testing.assert_allclose(update["scale"], -0.1 * 1.9 * (0.25 + 0.1), rtol=1e-6)
    np.testing.assert_allclose(update["shift"], -0.1 * 1.9 * (0.25 + 0.01 * 0.5), rtol=1e-6)


def test_lars_scales_kernels_alone():
    """By the ratio of the norms of weights and of decayed gradients (You et al., 2017)."""
    update = moved(OptimizerConfig(name="lars", weight_decay=0.1, options={"trust_coefficient": 0.001}))
    decayed = 0.25 + 0.1 * 2.0
    np.testing.assert_allclose(update["kernel"], -0.1 * 1.9 * decayed * 0.001 * 2.0 / decayed, rtol=1e-5)
    np.testing.assert_allclose(update["scale"], -0.1 * 1.9 * (0.25 + 0.1), rtol=1e-5)


def after_idle_steps(config, steps=100):
    """Each parameter after steps without a gradient, as a share of what it was."""
    optimizer = make_optimizer(config, steps)
    params, state, zeros = PARAMS, optimizer.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(lambda state, params: optimizer.update(zeros, state, params))
        for _ in range(steps):
            updates, state = step(state, params)
            params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda after, before: float(jnp.mean(after / before)), params, PARAMS)["conv"]


@pytest.mark.parametrize(
    "name", ["adamw", "adamaxw", "adan", "lion", "contrib.ademamix", "contrib.acprop", "optax.contrib.muon"]
)
def test_an_optimizer_with_a_decay_of_its_own_decays_once(name):
    """By the rate times the decay in every step, and on shifts by theirs (Loshchilov and Hutter, 2019)."""
    rates = 0.05 * (1 + np.cos(np.pi * np.arange(100) / 100))
    shares = after_idle_steps(OptimizerConfig(name=name, weight_decay=0.01, shift_weight_decay=0.001))
    for key, decay in {"kernel": 0.01, "scale": 0.01, "shift": 0.001}.items():
        assert shares[key] == pytest.approx(np.prod(1 - rates * decay), rel=1e-5)


def test_its_own_decay_may_be_an_option():
    config = OptimizerConfig(name="adamw", weight_decay=0.5, options={"weight_decay": 0.01})
    rates = 0.05 * (1 + np.cos(np.pi * np.arange(100) / 100))
    assert after_idle_steps(config)["kernel"] == pytest.approx(np.prod(1 - rates * 0.01), rel=1e-5)
    config = OptimizerConfig(
        name="adafactor", weight_decay=0.5, options={"weight_decay_rate": 0.01, "clipping_threshold": 1.0}
    )
    assert after_idle_steps(config)["kernel"] == pytest.approx(0.99**100, rel=1e-5)


def test_one_that_cannot_tell_parameters_apart_decays_shifts_as_all_others():
    update = moved(OptimizerConfig(name="novograd", weight_decay=0.1, shift_weight_decay=0.0))
    same = moved(OptimizerConfig(name="novograd", weight_decay=0.1, shift_weight_decay=0.5))
    none = moved(OptimizerConfig(name="novograd", weight_decay=0.0))
    np.testing.assert_array_equal(update["shift"], same["shift"])
    np.testing.assert_allclose(update["shift"] - none["shift"], -0.1 * 0.1 * 0.5, rtol=1e-5)


def test_shifts_stay_where_they_are_if_they_are_not_trained():
    for name in ("sgd", "adam"):
        assert not np.any(moved(OptimizerConfig(name=name, train_shift=False))["shift"])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "lasr"}, "optimizer.name is 'lasr', which is no optimizer of optax. Did you mean 'lars'"),
        ({"name": "chain"}, "which is no optimizer of optax"),
        ({"options": {"nestrov": False}}, "optimizer.options.nestrov: sgd has no such option. .*'nesterov'"),
        ({"name": "adam", "options": {"learning_rate": 1.0}}, "adam has no such option"),
        ({"name": "contrib.sgd"}, "optimizer.name is 'contrib.sgd', which is no optimizer of optax"),
        ({"name": "prodgy"}, "which is no optimizer of optax. Did you mean 'prodigy'"),
        ({"name": "optimistic_adam"}, "no optimizer of optax. Did you mean 'optimistic_adam_v2'"),
        ({"name": "_deprecated_dpsgd"}, "which is no optimizer of optax"),
        ({"name": "scale_by_learning_rate"}, "which is no optimizer of optax"),
        ({"name": "dpsgd"}, "optimizer.name is 'dpsgd', .* with these optimizer.options .*'l2_norm_clip'"),
        ({"name": "sm3"}, "optimizer.name is 'sm3', which cannot be used with a learning-rate schedule, or"),
        ({"name": "adam", "options": {"b1": "0.9"}}, "options.b1 is '0.9'; it must be a number, such as 0.9"),
        ({"name": "adam", "options": {"b1": True}}, "options.b1 is True; it must be a number"),
        ({"name": "adam", "options": {"eps": [1e-8]}}, "options.eps is .*; it must be a number"),
        ({"options": {"nesterov": "yes"}}, "options.nesterov is 'yes'; it must be true or false"),
        ({"options": {"nesterov": 1}}, "options.nesterov is 1; it must be true or false"),
    ],
)
def test_refusals(config, said):
    with pytest.raises(ConfigError, match=said):
        make_optimizer(OptimizerConfig(**config), 10)


def test_deprecated_aliases_and_parts_are_not_offered():
    with pytest.raises(ConfigError) as error:
        make_optimizer(OptimizerConfig(name="zzzzzz"), 10)
    offered = str(error.value).partition("Valid: ")[2].rstrip(".").split(", ")
    assert {"sgd", "adamw", "prodigy", "muon", "dpsgd"} <= set(offered)
    assert not [name for name in offered if name.startswith(("_", "scale_by_")) or name == "optimistic_adam"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"warmup_epochs": 4.0}, "optimizer.warmup_epochs is 4.0; it must be below the 4 epochs"),
        ({"warmup_epochs": -1.0}, "optimizer.warmup_epochs is -1.0; it must be at least 0"),
        ({"reference_batch_size": 0}, "optimizer.reference_batch_size is 0"),
    ],
)
def test_values_out_of_bounds(section, said):
    with pytest.raises(ConfigError, match=said):
        parse_config({"epochs": 4, "optimizer": section})


def test_an_option_that_is_no_value_of_its_kind_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.name is 'sgd', .* or not with these optimizer.options"):
        make_optimizer(OptimizerConfig(options={"accumulator_dtype": "no type"}), 10).init(PARAMS)

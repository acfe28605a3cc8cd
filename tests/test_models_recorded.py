"""The networks against recorded trainings: logits, losses, momentum, re-allocation, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recorded import MODEL_CASES, assert_close, read
from selconv_jax import AllocationRule, functional, layer_states
from selconv_jax.interop.torch import load_state_dict, state_dict
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt
from selconv_jax.train._config import OptimizerConfig
from selconv_jax.train._optimizer import make_optimizer
from selconv_jax.transforms._layer_tree import merge_layers

NETWORKS = {
    "densenet_sconv_cifar10": lambda **more: DenseNet(10, (2, 2, 2), growth=4, **more),
    "densenet_bc_sconv_cifar100": lambda **more: DenseNet(20, (2, 1, 1), growth=4, compression=0.5, **more),
    "densenet_baseline_cifar10": lambda **more: DenseNet(10, (1, 1, 1), growth=4, variant="plain", **more),
    "preresnet_sconv_fmnist": lambda **more: PreResNet(10, (2, 1, 1), **more),
    "resnext_sconv_tinyimg": lambda **more: ResNeXt(
        7, (1, 1, 1), groups=2, base_width=4, widen=1, stem="tiny_imagenet", **more
    ),
    "condensenet_sconv_cifar10": lambda **more: CondenseNet(
        10, (2, 1, 1), growth=(4, 8, 8), dropout_rate=0.0, **more
    ),
}
MAX_COPIES = {"densenet_bc_sconv_cifar100": 2}
STEPS_BEFORE_ROUND = 2
NOT_OURS = ("num_batches_tracked", "_eye")  # constants and counters, which our models do without


def section(case, name):
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


def given_round(variables, after, rule):
    """De-allocates and re-allocates every layer with the sources and shifts that ``after`` came to."""
    states, wanted = layer_states(variables), layer_states(after)
    for path, state in states.items():
        states[path], drawn, scores = given_slots(state, wanted[path], rule)
        if drawn is not None:
            candidates = np.argsort(-np.asarray(scores), kind="stable")[: rule.top_k]
            assert set(np.asarray(drawn)[np.asarray(drawn) >= 0]) <= set(candidates)
    return merge_layers(variables, states)


@functools.partial(jax.jit, static_argnames="rule")
def given_slots(state, wanted, rule):
    """The round of one layer, what it drew and the scores that it had to draw by."""
    gate, source = functional.deallocate(damage_of(state), state.gate, state.source, rule.threshold)
    state = dataclasses.replace(state, gate=gate, source=source)
    if source is None:
        return state, None, None
    scores = functional.channel_scores(damage_of(state), source, rule.max_copies)
    # Nothing was a copy before the only round, so the new sources are what was drawn.
    drawn = jnp.where(~gate & wanted.gate, wanted.source, -1)
    return functional.fill_slots(state, drawn, wanted.shift), drawn, scores


def is_ours(name):
    return not name.endswith(NOT_OURS)


def damage_of(state):
    return functional.normalize_damage(
        functional.expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
    )


def assert_same_variables(model, variables, expected):
    ours = {name: value for name, value in state_dict(model, variables).items() if is_ours(name)}
    assert ours.keys() == set(filter(is_ours, expected))
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


# Like one of the others in all but widths and growth.
LIKE_OTHERS = ("densenet_bc_sconv_cifar100",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in MODEL_CASES],
)
def test_recorded_training(name):
    case = read(f"model_{name}")
    with jax.enable_x64(True):
        model = NETWORKS[name](dtype=jnp.float64, param_dtype=jnp.float64)
        variables = load_state_dict(model, section(case, "init"))
        # The rate is constant here: the cosine of the run is taken at its very start.
        optimizer = make_optimizer(OptimizerConfig(), steps=10**12)
        opt_state = optimizer.init(variables["params"])
        images, labels = jnp.asarray(case["images"]), jnp.asarray(case["labels"])
        evaluate = jax.jit(lambda variables: model.apply(variables, images[0], train=False))

        @jax.jit
        def step(variables, opt_state, index):
            def loss(params):
                logits, changed = model.apply(
                    {**variables, "params": params}, images[index], train=True, mutable=["batch_stats"]
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
                return losses.mean(), changed

            (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return {**variables, **changed, "params": params}, opt_state, value

        assert_close(evaluate(variables), case["eval_logits_init"], np.float64, "initial logits")
        for index, loss in enumerate(case["losses"]):
            if index == STEPS_BEFORE_ROUND:
                realloc = section(case, "realloc")
                if "selectivity" in variables:
                    rule = AllocationRule(threshold=0.4, max_copies=MAX_COPIES.get(name))
                    variables = given_round(variables, load_state_dict(model, realloc), rule)
                assert_same_variables(model, variables, realloc)
                momentum = {**variables, "params": optax.tree.get(opt_state, "trace")}
                ours = state_dict(model, momentum)
                for key, value in section(case, "momentum").items():
                    assert_close(ours[key], value, np.float64, f"momentum of {key}")
                logits = evaluate(variables)
                assert_close(logits, case["eval_logits_realloc"], np.float64, "logits after the round")
            variables, opt_state, value = step(variables, opt_state, index)
            assert_close(value, loss, np.float64, f"loss of step {index}")
        assert_close(evaluate(variables), case["eval_logits_final"], np.float64, "final logits")

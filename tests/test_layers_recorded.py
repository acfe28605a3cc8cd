"""The module against the recorded layers: output, gradients, running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recorded import LAYER_CASES, assert_close, read
from selconv_jax import SelectiveConv

pytestmark = pytest.mark.optimized

PARAMS = ("kernel", "scale", "bias", "shift")


@pytest.mark.usefixtures("device_count")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LAYER_CASES)
def test_recorded_layer(name, dtype):
    case = read(name)
    train = name.endswith("_train")
    gate_only = "gate_only" in name
    with jax.enable_x64(dtype == np.float64):
        params = {key: jnp.asarray(case[key], dtype) for key in PARAMS}
        selectivity = {"gate": jnp.asarray(case["gate"]), "source": jnp.asarray(case["source"])}
        if gate_only:
            del params["shift"], selectivity["source"]
        stats = {key: jnp.asarray(case[key], dtype) for key in ("mean", "var")}
        layer = SelectiveConv(
            features=case["kernel"].shape[-1],
            kernel_size=case["kernel"].shape[:2],
            strides=tuple(case["strides"].tolist()),
            padding=tuple(case["padding"].tolist()),
            param_dtype=dtype,
            gate_only=gate_only,
        )

        def loss(params, x):
            variables = {"params": params, "batch_stats": stats, "selectivity": selectivity}
            y, changed = layer.apply(variables, x, train=train, mutable=["batch_stats"])
            return jnp.sum(y * jnp.asarray(case["cotangent"], dtype)), (y, changed["batch_stats"])

        x = jnp.asarray(case["x"], dtype)
        grads, (y, new_stats) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    assert_close(y, case["y"], dtype, "y")
    assert_close(grads[1], case["grad_x"], dtype, "grad_x")
    for key in params:
        assert_close(grads[0][key], case[f"grad_{key}"], dtype, f"grad_{key}")
    for key in stats:
        assert_close(new_stats[key], case[f"new_{key}"], dtype, f"new_{key}")

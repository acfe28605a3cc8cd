"""What ours is timed against in PyTorch computes the same: layers as recorded, networks as ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recorded import LAYER_CASES, assert_close, read
from selconv_jax.interop.torch import state_dict
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt
from selconv_jax.train._config import OptimizerConfig
from selconv_jax.train._optimizer import make_optimizer
from states import perturbed_variables

torch = pytest.importorskip("torch")

from pytorch_baseline.cases import TorchStep  # noqa: E402
from pytorch_baseline.layers import SelectiveLayer  # noqa: E402
from pytorch_baseline.networks import torch_network  # noqa: E402


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def layer_of(case, gate_only):
    """A layer in float64 with the state of a recorded case."""
    size, _, channels, features = case["kernel"].shape
    (stride,), (padding,) = set(case["strides"].tolist()), set(case["padding"].tolist())
    layer = SelectiveLayer(channels, features, size, gate_only=gate_only, stride=stride, padding=padding)
    values = {
        "norm.weight": case["scale"],
        "norm.bias": case["bias"],
        "norm.running_mean": case["mean"],
        "norm.running_var": case["var"],
        "norm.num_batches_tracked": np.zeros((), np.int64),
        "conv.weight": np.moveaxis(case["kernel"], (-1, -2), (0, 1)),
        "is_open": case["gate"].astype(np.float64),
    }
    if not gate_only:
        values["_ind_ptr"] = case["source"].astype(np.int64)
        values["_bias"] = case["shift"][:, ::-1]
        values["_eye"] = np.eye(2, 3)
    layer.double().load_state_dict({key: torch.tensor(np.array(value)) for key, value in values.items()})
    return layer


@pytest.mark.parametrize("name", LAYER_CASES)
def test_recorded_layer(name):
    case = read(name)
    gate_only = "gate_only" in name
    layer = layer_of(case, gate_only).train(name.endswith("_train"))
    x = nchw(case["x"]).requires_grad_()
    y = layer(x)
    (y * nchw(case["cotangent"])).sum().backward()

    def same(actual, expected, what):
        assert_close(actual.detach().numpy(), expected, np.float64, what)

    same(y.movedim(1, -1), case["y"], "y")
    same(x.grad.movedim(1, -1), case["grad_x"], "grad_x")
    same(layer.conv.weight.grad.permute(2, 3, 1, 0), case["grad_kernel"], "grad_kernel")
    same(layer.norm.weight.grad, case["grad_scale"], "grad_scale")
    same(layer.norm.bias.grad, case["grad_bias"], "grad_bias")
    same(layer.norm.running_mean, case["new_mean"], "new_mean")
    same(layer.norm.running_var, case["new_var"], "new_var")
    if not gate_only:
        shift = layer._bias.grad
        grad = torch.zeros_like(layer._bias) if shift is None else shift
        same(grad.flip(1), case["grad_shift"], "grad_shift")


NETWORKS = {
    "densenet": lambda **more: DenseNet(5, (2, 1), growth=4, **more),
    "densenet_bc": lambda **more: DenseNet(5, (1, 1), growth=4, compression=0.5, **more),
    "preresnet": lambda **more: PreResNet(5, (2, 1), width=4, **more),
    "preresnet_imagenet": lambda **more: PreResNet(5, (1, 1), width=4, stem="imagenet", **more),
    "resnext": lambda **more: ResNeXt(5, (1, 1), groups=2, base_width=4, widen=1, **more),
    "condensenet": lambda **more: CondenseNet(5, (1, 1), growth=(4, 8), dropout_rate=0.0, **more),
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("densenet", "plain"),
        ("densenet", "selective"),
        ("densenet_bc", "selective"),
        ("preresnet", "selective"),
        ("preresnet_imagenet", "plain"),
        ("resnext", "selective"),
        ("condensenet", "gate_only"),
    ],
)
def test_step_is_that_of_our_network(name, variant):
    """Logits, and every parameter after two steps of the published optimizer, in float64."""
    shape = (3, 16, 12, 3)
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=shape), rng.integers(0, 5, shape[0])
    config = OptimizerConfig(learning_rate=0.05)
    with jax.enable_x64(True):
        model = NETWORKS[name](variant=variant, dtype=jnp.float64, param_dtype=jnp.float64)
        allocated = {} if variant == "plain" else {"closed": 0.2, "copies": 0.4}
        variables = perturbed_variables(model, shape, seed=1, **allocated)
        variables = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, variables
        )
        network = torch_network(model, 3).double()
        # Strictly: every name and shape is that of the authors' networks.
        network.load_state_dict(
            {key: torch.from_numpy(value) for key, value in state_dict(model, variables).items()}
        )
        with torch.no_grad():
            theirs = network.eval()(nchw(images)).numpy()
        ours = model.apply(variables, jnp.asarray(images), train=False)
        np.testing.assert_allclose(theirs, ours, rtol=1e-9, atol=1e-9 * np.abs(ours).max())

        optimizer = make_optimizer(config, steps=10**12)
        opt_state = optimizer.init(variables["params"])

        @jax.jit
        def step(variables, opt_state):
            def loss(params):
                logits, changed = model.apply(
                    {**variables, "params": params}, jnp.asarray(images), train=True, mutable=["batch_stats"]
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
                return losses.mean(), changed

            grads, changed = jax.grad(loss, has_aux=True)(variables["params"])
            updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return {**variables, **changed, "params": params}, opt_state

        their_step = TorchStep(network, nchw(images), torch.from_numpy(labels), config)
        for _ in range(2):
            variables, opt_state = step(variables, opt_state)
            their_step()
        new = {key: value.numpy() for key, value in network.state_dict().items()}
        for key, value in state_dict(model, variables).items():
            if key.endswith("num_batches_tracked"):
                continue
            if key.endswith("_bias") and not (new[key.replace("_bias", "_ind_ptr")] >= 0).any():
                continue  # not used, and what is not used does not decay there
            scale = np.abs(value).max(initial=0.0)
            np.testing.assert_allclose(new[key], value, rtol=1e-9, atol=1e-9 * scale, err_msg=key)

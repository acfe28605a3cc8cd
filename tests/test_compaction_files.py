"""Files of compacted networks: there and back, refusals, damage."""

import functools
import json

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from compactions import NETWORKS, SHAPE, assert_equal_trees
from selconv_jax import CheckpointError
from selconv_jax.models import DenseNet
from states import perturbed_variables


def compacted(model, *inputs, **options):
    variables = perturbed_variables(model, SHAPE, seed=0, closed=0.4, copies=0.3)
    return selconv_jax.compact(model, variables, *inputs, **options)


@pytest.fixture(scope="module")
def small():
    return compacted(NETWORKS["densenet_bc"])


@pytest.fixture
def saved(small, tmp_path):
    path = tmp_path / "small.npz"
    selconv_jax.save_compact(path, *small)
    return path


@pytest.mark.parametrize("family", NETWORKS)
def test_there_and_back(family, tmp_path):
    model, variables = compacted(NETWORKS[family], multiple=4)
    selconv_jax.save_compact(tmp_path / "small.npz", model, variables)
    read_model, read_variables = selconv_jax.load_compact(tmp_path / "small.npz")
    assert read_model == model
    assert_equal_trees(read_variables, variables)
    assert [path.name for path in tmp_path.iterdir()] == ["small.npz"]


def test_types_are_kept(tmp_path):
    network = DenseNet(5, (1,), growth=4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model, variables = compacted(network)
    selconv_jax.save_compact(tmp_path / "small.npz", model, variables)
    with np.load(tmp_path / "small.npz") as arrays:  # bits that any program can read
        assert arrays["params/classifier/linear/kernel"].dtype == np.uint16
    read_model, read_variables = selconv_jax.load_compact(tmp_path / "small.npz")
    assert read_model.dtype == jnp.bfloat16
    assert read_model.network.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16) == network
    chex.assert_trees_all_equal(read_variables, variables, strict=True)


def test_nothing_is_overwritten_unasked(saved, small):
    before = saved.read_bytes()
    with pytest.raises(CheckpointError, match=r"small\.npz: there is a file already"):
        selconv_jax.save_compact(saved, *small)
    assert saved.read_bytes() == before
    selconv_jax.save_compact(saved, *small, overwrite=True)
    with pytest.raises(CheckpointError, match="no folder"):
        selconv_jax.save_compact(saved.parent / "missing" / "small.npz", *small)
    with pytest.raises(ValueError, match=r"pass what selconv_jax\.compact returned"):
        selconv_jax.save_compact(saved, NETWORKS["densenet"], {}, overwrite=True)


def test_damaged_files(saved, tmp_path):
    whole = saved.read_bytes()
    middle = len(whole) // 2
    for name, content in {
        "short": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: not a whole file"):
            selconv_jax.load_compact(tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no such file"):
        selconv_jax.load_compact(tmp_path / "missing.npz")


def test_foreign_files(saved, tmp_path):
    with np.load(saved) as archive:
        arrays = dict(archive)
    path = tmp_path / "other.npz"

    def refused(match, entry=None, **changes):
        described = {**arrays, **changes}
        if entry is not None:
            described["selconv_jax"] = np.frombuffer(json.dumps(entry).encode(), np.uint8)
        np.savez(path, **{name: array for name, array in described.items() if array is not None})
        with pytest.raises(CheckpointError, match=match):
            selconv_jax.load_compact(path)

    entry = json.loads(arrays["selconv_jax"].tobytes())
    refused("has no entry 'selconv_jax'", selconv_jax=None)
    refused("in format 1, this version reads format 2", {**entry, "format": 1})
    refused("holds a UNet, none of the library's", {**entry, "network": "UNet"})
    refused("the description in it is damaged", {"format": 1})
    refused("the description in it is damaged", selconv_jax=np.zeros(3, np.uint8))
    refused("has no attribute 'depth'", {**entry, "attributes": {"depth": 3}})
    layouts = {**entry["layouts"], "transition1": {"inputs": 1, "own": [[4, 1]], "outputs": 2}}
    refused("the layout of a compacted layer is inconsistent", {**entry, "layouts": layouts})
    refused("such as params/stem/kernel", **{"params/stem/kernel": None})


def test_a_network_of_the_users(tmp_path):
    layer = selconv_jax.SelectiveConv(4, (3, 3))
    variables = perturbed_variables(layer, SHAPE, seed=0, closed=0.4)
    model, small = selconv_jax.compact(layer, variables, jnp.ones(SHAPE))
    path = tmp_path / "small.npz"
    selconv_jax.save_compact(path, model, small)
    with pytest.raises(CheckpointError, match=r"holds a SelectiveConv.*load_compact\(path, network="):
        selconv_jax.load_compact(path)
    with pytest.raises(CheckpointError, match="holds a SelectiveConv, but network is a DenseNet"):
        selconv_jax.load_compact(path, network=NETWORKS["densenet"])
    read, read_variables = selconv_jax.load_compact(path, network=layer)
    assert read == model
    assert_equal_trees(read_variables, small)


def test_a_network_of_fitted_capacities(tmp_path):
    """The file of a network from `with_capacity` is that of the network, which is all a loader can make."""
    layer = selconv_jax.SelectiveConv(4, (3, 3))
    variables = perturbed_variables(layer, SHAPE, seed=0, closed=0.4, copies=0.3)
    fitted = selconv_jax.with_capacity(layer, variables)
    model, small = selconv_jax.compact(fitted, variables, jnp.ones(SHAPE))
    path = tmp_path / "small.npz"
    selconv_jax.save_compact(path, model, small)
    for network in (layer, fitted):
        read, read_variables = selconv_jax.load_compact(path, network=network)
        assert_equal_trees(read_variables, small)
        np.testing.assert_array_equal(
            read.apply(read_variables, jnp.ones(SHAPE), train=False),
            model.apply(small, jnp.ones(SHAPE), train=False),
        )
    with pytest.raises(CheckpointError, match="features=4, but network has features=5"):
        selconv_jax.load_compact(path, network=selconv_jax.with_capacity(layer.clone(features=5), variables))


class Wrapped(nn.Module):
    """A network of the user's, with attributes of many kinds."""

    inner: nn.Module
    activation: object = nn.relu
    scales: object = (1.0, 2)
    dtype: object = jnp.float32

    def __call__(self, x, train):
        return self.activation(self.inner(x, train)) * jnp.asarray(self.scales[0], self.dtype)

    def features(self, x, train):
        return self.inner(x, train)


def test_the_network_must_have_the_attributes_it_had(tmp_path):
    path = tmp_path / "small.npz"
    network = DenseNet(5, (1,), growth=4)
    selconv_jax.save_compact(path, *compacted(network))
    assert selconv_jax.load_compact(path, network=network.clone(capacity=0.0, blocks=[1]))
    with pytest.raises(CheckpointError, match="stem='cifar', but network has stem='tiny_imagenet'"):
        selconv_jax.load_compact(path, network=network.clone(stem="tiny_imagenet"))
    with pytest.raises(CheckpointError, match="dtype=None, but network has dtype='bfloat16'"):
        selconv_jax.load_compact(path, network=network.clone(dtype=jnp.bfloat16))
    inner = selconv_jax.SelectiveConv(4, (3, 3))
    own = Wrapped(inner)
    model, variables = compacted(own, jnp.ones(SHAPE), method="features")
    selconv_jax.save_compact(path, model, variables, overwrite=True)
    read, _ = selconv_jax.load_compact(path, network=Wrapped(inner.clone(capacity=0.5), scales=[1.0, 2]))
    assert read.method == "features"
    for other, message in (
        (Wrapped(inner.clone(epsilon=1e-3)), "inner.epsilon=1e-05, but network has inner.epsilon=0.001"),
        (own.clone(activation=nn.gelu), "activation='relu', but network has activation='gelu'"),
        (own.clone(activation=nn.Dense), "activation='relu', but network has activation='Dense'"),
        (own.clone(activation=functools.partial(nn.elu, alpha=2.0)), r"\['elu', \[\], \{'alpha': 2.0\}\]"),
        (own.clone(scales=np.array([2.0, 2.0])), r"scales=\[1.0, 2\], but"),
        (own.clone(dtype="bfloat16"), "dtype='float32', but network has dtype='bfloat16'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            selconv_jax.load_compact(path, network=other)

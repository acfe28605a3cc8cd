"""State dicts with torchvision's and timm's names: DenseNets and pre-activation ResNets."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from compactions import assert_same_function, images
from selconv_jax import CheckpointError, ConfigError
from selconv_jax.interop.torch import load_network, load_state_dict, state_dict
from selconv_jax.models import DenseNet, PreResNet
from states import perturbed_variables
from test_interop_torch import COUNT, WRAPPED

IMAGES = (2, 33, 40, 3)  # odd, so that pools and strides have to round
# Names and shapes recorded from torchvision 0.28 (growth 4, blocks (1, 2)) and timm 1.0 (width 8, blocks
# (2, 1), batch norm): kernels, and channels of batch norms.
DENSENET = """
features.conv0 8x3x7x7; features.norm0 8; features.denseblock1.denselayer1.norm1 8;
features.denseblock1.denselayer1.conv1 16x8x1x1; features.denseblock1.denselayer1.norm2 16;
features.denseblock1.denselayer1.conv2 4x16x3x3; features.transition1.norm 12;
features.transition1.conv 6x12x1x1; features.denseblock2.denselayer1.norm1 6;
features.denseblock2.denselayer1.conv1 16x6x1x1; features.denseblock2.denselayer1.norm2 16;
features.denseblock2.denselayer1.conv2 4x16x3x3; features.denseblock2.denselayer2.norm1 10;
features.denseblock2.denselayer2.conv1 16x10x1x1; features.denseblock2.denselayer2.norm2 16;
features.denseblock2.denselayer2.conv2 4x16x3x3; features.norm5 14; classifier 5x14
"""
RESNETV2 = """
stem.conv 8x3x7x7; stages.0.blocks.0.downsample.conv 32x8x1x1; stages.0.blocks.0.norm1 8;
stages.0.blocks.0.conv1 8x8x1x1; stages.0.blocks.0.norm2 8; stages.0.blocks.0.conv2 8x8x3x3;
stages.0.blocks.0.norm3 8; stages.0.blocks.0.conv3 32x8x1x1; stages.0.blocks.1.norm1 32;
stages.0.blocks.1.conv1 8x32x1x1; stages.0.blocks.1.norm2 8; stages.0.blocks.1.conv2 8x8x3x3;
stages.0.blocks.1.norm3 8; stages.0.blocks.1.conv3 32x8x1x1; stages.1.blocks.0.downsample.conv 64x32x1x1;
stages.1.blocks.0.norm1 32; stages.1.blocks.0.conv1 16x32x1x1; stages.1.blocks.0.norm2 16;
stages.1.blocks.0.conv2 16x16x3x3; stages.1.blocks.0.norm3 16; stages.1.blocks.0.conv3 64x16x1x1;
norm 64; head.fc 5x64x1x1
"""
RECORDED = {"densenet": DENSENET, "resnetv2": RESNETV2}


def random_arrays(recorded):
    """A state dict with weights and running statistics as after some training."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, sizes in (entry.split() for entry in recorded.split(";")):
        shape = tuple(map(int, sizes.split("x")))
        if len(shape) > 1:
            arrays[f"{name}.weight"] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
            if name in ("classifier", "head.fc"):
                arrays[f"{name}.bias"] = rng.normal(size=shape[0])
        else:
            arrays[f"{name}.weight"], arrays[f"{name}.bias"] = (
                rng.normal(1, 0.3, shape),
                rng.normal(size=shape),
            )
            arrays[f"{name}.running_mean"] = rng.normal(0, 0.2, shape)
            arrays[f"{name}.running_var"] = rng.uniform(0.5, 1.5, shape)
            arrays[f"{name}.{COUNT}"] = np.int64(3)
    return {key: value if COUNT in key else value.astype(np.float32) for key, value in arrays.items()}


@pytest.fixture(params=RECORDED)
def arrays(request):
    return random_arrays(RECORDED[request.param])


@pytest.fixture
def densenet():
    return random_arrays(DENSENET)


@pytest.fixture
def resnetv2():
    return random_arrays(RESNETV2)


def reference(arrays, x):
    """The PyTorch network, written down from its definition; images ``[N, H, W, C]``."""

    def conv(name, x, stride=1):
        kernel = arrays[f"{name}.weight"]
        padding = ((kernel.shape[-1] // 2,) * 2,) * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding)

    def act(name, x):
        scale, bias, mean, var = (
            arrays[f"{name}.{field}"][None, :, None, None]
            for field in ("weight", "bias", "running_mean", "running_var")
        )
        return jax.nn.relu((x - mean) / np.sqrt(var + 1e-5) * scale + bias)

    def pool(x, start, function, size, padding):
        return jax.lax.reduce_window(x, start, function, (1, 1, size, size), (1, 1, 2, 2), padding)

    def max_pool(x):
        return pool(x, -np.inf, jax.lax.max, 3, ((0, 0), (0, 0), (1, 1), (1, 1)))

    x = jnp.transpose(x, (0, 3, 1, 2))
    if "stem.conv.weight" in arrays:
        x = max_pool(conv("stem.conv", x, 2))
        for name in ("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"):
            stride = 2 if name == "stages.1.blocks.0" else 1
            y = act(f"{name}.norm1", x)
            if f"{name}.downsample.conv.weight" in arrays:
                x = conv(f"{name}.downsample.conv", y, stride)
            y = act(f"{name}.norm2", conv(f"{name}.conv1", y))
            x = x + conv(f"{name}.conv3", act(f"{name}.norm3", conv(f"{name}.conv2", y, stride)))
        x, last = act("norm", x), "head.fc"
    else:
        x = max_pool(act("features.norm0", conv("features.conv0", x, 2)))
        for block, layers in ((1, 1), (2, 2)):
            if block == 2:
                x = conv("features.transition1.conv", act("features.transition1.norm", x))
                x = pool(x, 0.0, jax.lax.add, 2, "VALID") / 4
            for layer in range(1, layers + 1):
                name = f"features.denseblock{block}.denselayer{layer}"
                y = conv(f"{name}.conv1", act(f"{name}.norm1", x))
                x = jnp.concatenate([x, conv(f"{name}.conv2", act(f"{name}.norm2", y))], axis=1)
        x, last = act("features.norm5", x), "classifier"
    weight = arrays[f"{last}.weight"].reshape(5, -1)
    return x.mean(axis=(2, 3)) @ weight.T + arrays[f"{last}.bias"][None]


def assert_same_logits(model, variables, expected):
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images(IMAGES))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_logits_and_back(arrays):
    model, variables = load_network(arrays, capacity=0.0)
    initial = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones(IMAGES), train=False))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, initial)
    layer = {key: value["block1_layer1"]["conv1"] for key, value in variables.items()}
    assert layer["selectivity"]["gate"].all()
    assert set(layer["selectivity"]["source"].tolist()) == {-1}
    assert not layer["params"]["shift"].any()
    assert_same_logits(model, variables, reference(arrays, images(IMAGES)))

    back = state_dict(model, variables)
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert (back[name].shape, back[name].dtype) == (value.shape, value.dtype), name
        np.testing.assert_array_equal(back[name], 0 if COUNT in name else value, err_msg=name)


def test_networks_are_read_from_the_shapes(densenet, resnetv2):
    model, variables = load_network(densenet, variant="plain")
    assert model == DenseNet(
        5, (1, 2), growth=4, compression=0.5, stem="imagenet", stem_norm=True, variant="plain"
    )
    assert sorted(variables) == ["batch_stats", "params"]
    model, _ = load_network(resnetv2, variant="gate_only", dtype=jnp.bfloat16)
    assert model == PreResNet(
        5, (2, 1), width=8, stem="imagenet", projection=True, variant="gate_only", dtype=jnp.bfloat16
    )
    small_stem = {**densenet, "features.conv0.weight": densenet["features.conv0.weight"][:, :1, 2:5, 2:5]}
    model, variables = load_network(small_stem, stem="cifar")
    assert (model.stem, variables["params"]["stem"]["kernel"].shape) == ("cifar", (3, 3, 1, 8))
    with pytest.raises(CheckpointError, match=r'a stem of 3x3 .* pass stem="cifar"'):
        load_network(small_stem)


@pytest.mark.parametrize("wrapper", ["Lightning", "averaged", "single modules", "a prefix and a key"])
def test_wrapped_and_prefixed(wrapper, arrays):
    model, variables = load_network(WRAPPED[wrapper](arrays), variant="plain")
    chex.assert_trees_all_equal(variables, load_state_dict(model, arrays))


def test_files_of_old_torchvision(densenet):
    """Its published files say ``norm.1`` for ``norm1``, and have no counts of batches."""
    old = {
        re.sub(r"(denselayer\d\.\w+)(\d)", r"\1.\2", key): value
        for key, value in densenet.items()
        if COUNT not in key
    }
    assert "features.denseblock2.denselayer1.norm.2.running_var" in old
    model, variables = load_network({"state_dict": old})
    chex.assert_trees_all_equal(variables, load_state_dict(model, densenet))


# Back, after training and re-allocation.


def test_closed_channels_become_zeros(arrays):
    model, variables = load_network(arrays, variant="gate_only")
    variables["selectivity"]["block1_layer1"]["conv1"]["gate"] = jnp.arange(8) != 2
    back = state_dict(model, variables)
    changed = [name for name, value in back.items() if COUNT not in name and (value != arrays[name]).any()]
    assert len(changed) == 1
    assert changed[0].endswith("1.conv1.weight" if "classifier.bias" in arrays else "0.conv1.weight")
    assert not back[changed[0]][:, 2].any()
    assert_same_logits(model, variables, reference(back, images(IMAGES)))


def test_what_the_layout_cannot_hold_is_refused(densenet, resnetv2):
    model, variables = load_network(densenet)
    variables["selectivity"]["transition1"]["source"] = jnp.arange(12)
    with pytest.raises(
        ConfigError, match="transition1 has 12 copied channels, which torchvision's and timm's"
    ):
        state_dict(model, variables)
    model, variables = load_network(resnetv2)
    variables["params"]["block2_layer1"]["shortcut"]["bias"] += 1
    with pytest.raises(
        ConfigError, match=r"stages\.1\.blocks\.0\.norm1\.bias is one array .* params/block2.*/shortcut/bias"
    ):
        state_dict(model, variables)


# What is not expressed.


def renamed(arrays, old, new):
    return {key.replace(old, new): value for key, value in arrays.items()}


def without(arrays, pattern):
    return {key: value for key, value in arrays.items() if not re.search(pattern, key)}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "resnetv2",
            lambda a: renamed(a, "stem.conv", "stem.conv1"),
            "its stem has several convolutions (stem",
        ),
        ("densenet", lambda a: {**a, "features.conv1.weight": np.ones((8, 8, 3, 3))}, "its stem has several"),
        ("resnetv2", lambda a: without(a, "conv3|norm3"), "its residual blocks have two convolutions"),
        ("resnetv2", lambda a: without(a, "running|num"), "its norms are not batch norms"),
        (
            "densenet",
            lambda a: {**a, "features.conv0.weight": np.ones((9, 3, 7, 7))},
            "growth is 4, its stem has 9 and its bottlenecks 16 channels, ours have 2 and 4 times the growth",
        ),
        (
            "resnetv2",
            lambda a: {**a, "stem.conv.weight": np.ones((16, 3, 7, 7))},
            "its first bottleneck has 8 channels and its stem 16, ours have the same",
        ),
        ("densenet", lambda a: without(a, "classifier"), "has no array classifier.weight."),
        (
            "resnetv2",
            lambda a: {"epoch": 3, "net": renamed(a, "stages", "layers")},
            "has an unknown layout. Its first names: net.stem.conv.weight, net.layers.0.blocks.0.downsample",
        ),
        (
            "densenet",
            lambda a: {"features.block1.layer1.brc_1.conv.weight": a["features.conv0.weight"]},
            "is of the authors' code, whose names do not determine the network",
        ),
        (
            "densenet",
            lambda a: {},
            "Its first names: none. Known are the authors' code (features.block1.layer1.",
        ),
    ],
)
def test_refusals_by_name(name, change, said):
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        load_network(change(random_arrays(RECORDED[name])))
    assert "\n" not in str(error.value)


def test_models_of_other_layouts(densenet, resnetv2):
    model = DenseNet(5, (1, 2), growth=4, compression=0.5, stem="imagenet")
    with pytest.raises(
        CheckpointError, match=r"names of torchvision's .* the authors' code: load_.* stem_norm=True"
    ):
        load_state_dict(model, densenet)
    with pytest.raises(CheckpointError, match=r"names of timm's .* has projection=True"):
        load_state_dict(model.clone(stem_norm=True), resnetv2)
    with pytest.raises(CheckpointError, match="cannot be expressed: it has no running statistics"):
        load_state_dict(PreResNet(5, (2, 1), width=8, projection=True), without(resnetv2, "running"))
    with pytest.raises(CheckpointError, match=r"2 of another shape .* classifier\.weight: \[5, 14\] instead"):
        load_network(densenet, num_classes=4)
    with pytest.raises(ConfigError, match=r"no option 'grow'\. Did you mean 'growth'"):
        load_network(densenet, grow=8)


@pytest.mark.parametrize("name", ["stem_norm", "projection"])
def test_switches_are_switches(name):
    network = DenseNet if name == "stem_norm" else PreResNet
    with pytest.raises(ConfigError, match=f"{name} is 'no'; it must be True or False"):
        network(5, **{name: "no"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (PreResNet(5, (1, 1), width=4, projection=True), (4, 9, 8, 3)),
        (DenseNet(5, (2, 1), growth=4, compression=0.5, stem_norm=True), (4, 8, 8, 3)),
    ],
    ids=["projection", "stem_norm"],
)
def test_compact(model, shape):
    variables = perturbed_variables(model, shape, seed=0, closed=0.4, copies=0.3)
    plan, small = assert_same_function(model, variables, images(shape))
    assert small["params"]["block1_layer1"]["conv2"]["kernel"].shape[2] < 16
    assert selconv_jax.required_capacity(variables) > 0
    assert dict(plan.model.widths).get("stem") != 8


# With PyTorch, and the networks as these libraries make them.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # on import, where they lack optional parts
@pytest.mark.parametrize(
    ("library", "name"),
    [
        *(("torchvision", f"densenet{depth}") for depth in (121, 169, 201)),
        *(("timm", name) for name in ("densenet121", "resnetv2_50", "resnetv2_101", "resnetv2_152")),
    ],
)
def test_networks_of_the_libraries(library, name):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip(library)
    create = package.create_model if library == "timm" else getattr(package.models, name, None)
    torch.manual_seed(0)
    net = (create(name, num_classes=10) if library == "timm" else create(num_classes=10)).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        x = images((2, 65, 96, 3))
        batch = torch.from_numpy(np.array(x.transpose(0, 3, 1, 2)))
        expected = net(batch).numpy()
        model, variables = load_network(
            {"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}
        )
        logits = jax.jit(lambda v: model.clone(capacity=0.0).apply(v, x, train=False))(variables)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

        back = {key: torch.from_numpy(value) for key, value in state_dict(model, variables).items()}
        for value in net.parameters():
            value.zero_()
        net.load_state_dict(back)
        np.testing.assert_array_equal(net(batch).numpy(), expected)

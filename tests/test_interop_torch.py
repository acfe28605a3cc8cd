"""The authors' state dicts: read, written, refused."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recorded import MODEL_CASES, assert_close, read
from selconv_jax import CheckpointError, ConfigError
from selconv_jax.interop._arrays import shift_units
from selconv_jax.interop.torch import load_state_dict, state_dict
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt
from states import perturbed_variables
from test_models_recorded import NETWORKS, section

pytestmark = pytest.mark.optimized

IMAGE = (8, 8, 3)
LAYER = "features.block1.layer1.brc_1"
COUNT = "num_batches_tracked"
ALLOCATION = ("is_open", "_ind_ptr", "_bias", "_eye")


@pytest.fixture(scope="module")
def model(small_densenet):
    return small_densenet[0]


@pytest.fixture(scope="module")
def variables(small_densenet):
    return small_densenet[1]


@pytest.fixture
def arrays(small_densenet):
    return state_dict(*small_densenet)


def test_all_networks_are_recorded():
    assert set(MODEL_CASES) == set(NETWORKS)


@pytest.mark.parametrize("name", MODEL_CASES)
def test_recorded_state_dicts(name):
    """There and back bit for bit, and the logits, with the first gates and with re-allocated ones."""
    case = read(f"model_{name}")
    with jax.enable_x64(True):
        network = NETWORKS[name](dtype=jnp.float64, param_dtype=jnp.float64)
        evaluate = jax.jit(lambda v: network.apply(v, jnp.asarray(case["images"][0]), train=False))
        for part in ("init", "realloc"):
            theirs = section(case, part)
            loaded = load_state_dict(network, theirs)
            back = state_dict(network, loaded)
            assert {key for key in back if not key.endswith("._eye")} == theirs.keys()
            for key, value in theirs.items():
                assert back[key].dtype == value.dtype, key
                assert back[key].shape == value.shape, key
                if COUNT not in key:
                    np.testing.assert_array_equal(back[key], value, err_msg=key)
            assert_close(evaluate(loaded), case[f"eval_logits_{part}"], np.float64, part)


@pytest.mark.parametrize("variant", ["plain", "selective", "gate_only"])
@pytest.mark.parametrize(
    "network",
    [
        lambda **more: DenseNet(5, (1, 1), growth=4, compression=0.5, **more),
        lambda **more: PreResNet(5, (1, 1), width=4, **more),
        lambda **more: ResNeXt(5, (1, 1), groups=2, base_width=2, widen=1, **more),
        lambda **more: CondenseNet(5, (1, 1), growth=(4, 8), stem="imagenet", **more),
    ],
    ids=["densenet", "preresnet", "resnext", "condensenet"],
)
def test_every_family_and_variant(network, variant):
    model = network(variant=variant)
    shares = {} if variant == "plain" else {"closed": 0.3, "copies": 0.3}
    variables = perturbed_variables(model, (1, 32, 32, 1), seed=1, **shares)
    theirs = state_dict(model, variables)
    assert all(value.flags.c_contiguous for value in theirs.values())
    chex.assert_trees_all_equal(load_state_dict(model, theirs), variables, strict=True)
    endings = {key.rpartition(".")[2] for key in theirs}
    assert ("is_open" in endings) == (variant != "plain")
    assert ({"_bias", "_ind_ptr", "_eye"} <= endings) == (variant == "selective")
    stem = "conv0.weight" if isinstance(model, CondenseNet) else "features.conv0.weight"
    assert theirs[stem].shape[1] == 1


def test_layouts_by_hand(model, variables, arrays):
    layer = {key: value["block1_layer1"]["conv1"] for key, value in variables.items()}
    kernel = variables["params"]["stem"]["kernel"]
    assert arrays["features.conv0.weight"][3, 2, 1, 0] == kernel[1, 0, 2, 3]
    assert arrays["classifier.weight"][2, 4] == variables["params"]["classifier"]["linear"]["kernel"][4, 2]
    assert arrays[f"{LAYER}._bias"][1].tolist() == layer["params"]["shift"][1].tolist()[::-1]
    np.testing.assert_array_equal(arrays[f"{LAYER}.is_open"] == 1, layer["selectivity"]["gate"])
    np.testing.assert_array_equal(arrays[f"{LAYER}._ind_ptr"], layer["selectivity"]["source"])
    assert arrays[f"{LAYER}._ind_ptr"].dtype == np.int64
    assert arrays[f"{LAYER}.is_open"].dtype == np.float32


def test_strict_loading_finds_the_constants(arrays):
    assert arrays[f"{LAYER}._eye"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert f"{LAYER.replace('brc_1', 'brc_2')}._eye" not in arrays  # gate-only
    count = arrays[f"{LAYER}.norm.{COUNT}"]
    assert (count.shape, count.dtype, count.item()) == ((), np.int64, 0)
    assert f"features.norm_last.{COUNT}" in arrays


def test_constants_may_be_missing_and_counts_are_dropped(model, variables, arrays):
    counted = {key: np.int64(7) if COUNT in key else value for key, value in arrays.items()}
    chex.assert_trees_all_equal(load_state_dict(model, counted), variables, strict=True)
    without = {key: value for key, value in arrays.items() if COUNT not in key and "_eye" not in key}
    chex.assert_trees_all_equal(load_state_dict(model, without), variables, strict=True)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_types_are_those_of_init(dtype, model, arrays):
    model = model.clone(param_dtype=dtype)
    loaded = load_state_dict(model, arrays)
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, *IMAGE), dtype), train=False))
    assert jax.tree.map(lambda leaf: leaf.dtype, loaded) == jax.tree.map(lambda leaf: leaf.dtype, wanted)
    assert loaded["batch_stats"]["classifier"]["norm"]["mean"].dtype == jnp.float32
    back = state_dict(model, loaded)
    written = np.float32 if dtype == jnp.bfloat16 else np.float16
    assert back["classifier.weight"].dtype == back[f"{LAYER}._bias"].dtype == written
    chex.assert_trees_all_equal(load_state_dict(model, back), loaded, strict=True)


def under(prefix, arrays):
    return {f"{prefix}{key}": value for key, value in arrays.items()}


WRAPPED = {
    "DataParallel": lambda arrays: under("module.", arrays),
    "torch.compile": lambda arrays: under("_orig_mod.", arrays),
    "DataParallel of torch.compile": lambda arrays: under("module._orig_mod.", arrays),
    "torch.compile of DataParallel": lambda arrays: under("_orig_mod.module.", arrays),
    "FSDP": lambda arrays: under("_fsdp_wrapped_module.", arrays),
    "Lightning": lambda arrays: {
        "state_dict": {**under("model.", arrays), "criterion.weight": np.ones(3)},
        "hyper_parameters": {"lr": 0.1},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "averaged": lambda arrays: {**under("module.", arrays), "n_averaged": np.int64(3)},
    "a key": lambda arrays: {"epoch": 3, "state_dict": arrays},
    "another key": lambda arrays: {"model_state_dict": arrays, "optimizer_state_dict": {"state": {0: {}}}},
    "a key and a prefix": lambda arrays: {"net": under("module.", arrays), "acc": 93.1},
    "a prefix and a key": lambda arrays: {"module": {"network": under("_orig_mod.", arrays)}},
    "keys within keys": lambda arrays: {"a": {"b": {"state_dict": arrays}, "c": {}}},
    "single modules": lambda arrays: {
        key.replace("features.", "features.module.").replace("conv0", "conv0._orig_mod"): value
        for key, value in arrays.items()
    },
    "a moving average of the parameters alone": lambda arrays: {
        "ema": {key: 0.5 * value for key, value in arrays.items() if key.endswith(".weight")},
        "model": arrays,
    },
    "twice the same": lambda arrays: {**under("net.", arrays), **under("compiled._orig_mod.", arrays)},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_and_prefixed(wrapper, model, variables, arrays):
    chex.assert_trees_all_equal(load_state_dict(model, WRAPPED[wrapper](arrays)), variables, strict=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda arrays, other: {"model": arrays, "ema": other}, "as model.{0} and as ema.{0}: load the file"),
        (lambda arrays, other: {**arrays, **under("module.", other)}, "as {0} and as module.{0}: load"),
    ],
)
def test_two_networks_that_differ_are_told_apart_by_nobody(given, said, model, arrays):
    key = "classifier.bias"
    other = {**arrays, key: arrays[key] + 1}
    message = f"the state dict holds different weights {said.format(key)}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_state_dict(model, given(arrays, other))


def test_a_verdict_on_the_variant_needs_known_names(model, arrays):
    """That of another network, or of nothing, is none."""
    torchvision = {
        "features.conv0.weight": np.ones((8, 3, 7, 7)),
        "features.norm0.weight": np.ones(8),
        "classifier.weight": np.ones((3, 8)),
    }
    for given, remedy in (
        ({"layer1.0.conv1.weight": np.ones(3)}, "an unknown layout. Its first names: layer1.0.conv1.weight."),
        ({"layers": {"0": {"is_open": np.ones(3)}}}, "Its first names: layers.0.is_open. Known are the"),
        (torchvision, "Build the model with the arguments"),
    ):
        for variant in ("plain", "selective"):
            with pytest.raises(CheckpointError) as error:
                load_state_dict(model.clone(variant=variant), given)
            assert remedy in str(error.value)
            assert "The checkpoint is of" not in str(error.value)
    plain = {key: value for key, value in arrays.items() if key.rpartition(".")[2] not in ALLOCATION}
    for given, variant, found in ((plain, "selective", "plain"), (arrays, "plain", "selective")):
        with pytest.raises(CheckpointError, match=f"The checkpoint is of a {found} network, the model has"):
            load_state_dict(model.clone(variant=variant), {"net": under("module.", given)})


# Units of shifts.


def test_units_by_hand():
    sizes = {("a",): (8, 8), ("b",): (8, 24), ("c",): (1, 3)}
    units = shift_units(sizes, align_corners=False)
    assert [units[path].tolist() for path in sizes] == [[1, 1], [0.5, 1.5], [0.5, 1.5]]
    units = shift_units(sizes, align_corners=True)
    assert [units[path].tolist() for path in sizes] == [[0.875, 0.875], [14 / 32, 46 / 32], [0, 1]]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape", [(16, 16, 3), (8, 24, 3)])
def test_shifts_of_every_layer_take_the_size_of_its_input(shape, align_corners):
    model = DenseNet(num_classes=3, blocks=(1, 1), growth=2)
    variables = perturbed_variables(model, (1, *shape), seed=2)
    theirs = state_dict(model, variables)
    options = {"image_shape": shape, "align_corners": align_corners}
    loaded = load_state_dict(model, theirs, **options)
    for block, (height, width) in {1: shape[:2], 2: (shape[0] // 2, shape[1] // 2)}.items():
        lost = 1 if align_corners else 0
        factor = np.array([height - lost, width - lost]) * 2 / (height + width)
        shift = variables["params"][f"block{block}_layer1"]["conv1"]["shift"]
        actual = loaded["params"][f"block{block}_layer1"]["conv1"]["shift"]
        np.testing.assert_allclose(actual, np.asarray(shift) * factor, rtol=1e-6)
    back = state_dict(model, loaded, **options)
    for key, value in theirs.items():
        np.testing.assert_allclose(back[key], value, rtol=1e-6, err_msg=key)


def test_an_axis_of_one_pixel_has_no_unit_with_aligned_corners(model, variables):
    back = state_dict(model, variables, image_shape=(1, 4, 3), align_corners=True)
    shift = variables["params"]["block1_layer1"]["conv1"]["shift"]
    np.testing.assert_array_equal(back[f"{LAYER}._bias"][:, 1], 0)
    np.testing.assert_allclose(back[f"{LAYER}._bias"][:, 0], shift[:, 1] / (6 / 5), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align_corners": True}, "needs image_shape"),
        ({"image_shape": (32, 32)}, r"image_shape is (32, 32); it must be (H, W, C)"),
        ({"image_shape": (32, 0, 3)}, r"image_shape is (32, 0, 3)"),
    ],
)
def test_impossible_image_shapes(options, message, model, variables, arrays):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_state_dict(model, arrays, **options)
    with pytest.raises(ConfigError, match=re.escape(message)):
        state_dict(model, variables, **options)


def test_images_that_the_pools_swallow():
    model = DenseNet(num_classes=3, blocks=(1, 1), growth=2)
    theirs = state_dict(model, perturbed_variables(model, (1, *IMAGE), seed=0))
    with pytest.raises(ConfigError, match="too small for the network: nothing is left of 1x8"):
        load_state_dict(model, theirs, image_shape=(1, 8, 3))


# What does not fit.


def test_missing_unexpected_and_misshaped_entries_are_listed(model, arrays):
    del arrays[f"{LAYER}.norm.weight"]
    arrays["features.block1.layer9.brc_1.conv.weight"] = np.zeros(1)
    arrays["classifier.bias"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError) as error:
        load_state_dict(model, arrays)
    assert str(error.value) == (
        f"the state dict does not fit DenseNet: 1 missing ({LAYER}.norm.weight); "
        "1 unexpected (features.block1.layer9.brc_1.conv.weight); "
        "1 of another shape (classifier.bias: [4] instead of [3]). "
        "Build the model with the arguments that the checkpoint was trained with (blocks, classes, ...)."
    )


def test_long_lists_are_cut_and_counted(model, arrays):
    with pytest.raises(CheckpointError) as error:
        load_state_dict(model.clone(variant="plain"), arrays)
    message = str(error.value)
    assert "5 unexpected (" in message  # a shift, a source, a constant and two gates
    assert "The checkpoint is of a selective network, the model has variant='plain'." in message
    with pytest.raises(CheckpointError, match=r"\d\d missing \(([^,]+, ){5}\.\.\.\)"):
        load_state_dict(model, {"classifier.bias": arrays["classifier.bias"]})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_ind_ptr", 4, "4 instead of -1 or a channel in 0 .. 3"),
        ("_ind_ptr", -2, "-2 instead of -1 or a channel"),
        ("_ind_ptr", 0.5, "float64 instead of whole numbers"),
        ("is_open", 0.5, "0.5 instead of 0 or 1"),
        ("is_open", np.nan, "nan instead of 0 or 1"),
        ("_bias", np.nan, "nan instead of a finite float32"),
        ("conv.weight", np.inf, "inf instead of a finite float32"),
        ("conv.weight", 1e39, "1e+39 instead of a finite float32"),
        ("conv.weight", 1, "int64 instead of floating numbers"),
        ("norm.running_var", -0.5, "-0.5 instead of a finite float32 of at least 0"),
    ],
)
def test_impossible_values(name, value, message, model, arrays):
    key = f"{LAYER}.{name}"
    arrays[key] = np.full(arrays[key].shape, value)
    with pytest.raises(CheckpointError, match=re.escape(f"1 with impossible values ({key}: {message}")):
        load_state_dict(model, arrays)


def test_variables_of_another_network(model, variables):
    with pytest.raises(
        ConfigError, match=r"2 of another shape \(params/classifier/linear/bias: \[3\]"
    ) as error:
        state_dict(model.clone(variant="gate_only", num_classes=4), variables)
    assert "2 unexpected (params/block1_layer1/conv1/shift" in str(error.value)
    with pytest.raises(ConfigError, match=r"missing \(batch_stats/"):
        state_dict(model, {"params": variables["params"]})


def test_other_collections_are_left_out(model, variables, arrays):
    more = {**variables, "intermediates": {"stem": {"__call__": (jnp.ones(1),)}}}
    assert state_dict(model, more).keys() == arrays.keys()


def test_networks_the_authors_do_not_have(arrays):
    with pytest.raises(ConfigError, match="the model is a Dense; networks with known names are DenseNet, "):
        load_state_dict(nn.Dense(3), arrays)

    class Longer(DenseNet):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(2, name="head")(jnp.mean(images, axis=(1, 2)))

    with pytest.raises(ConfigError, match="Longer has a variable params/head/"):
        load_state_dict(Longer(num_classes=3), arrays)

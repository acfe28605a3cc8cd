"""All networks: parameters as published, stems, the function under re-allocation, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from selconv_jax import AllocationRule, ConfigError
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.analysis._counting import count_parameters
from selconv_jax.models import MODELS, CondenseNet, PreResNet, ResNeXt, create_model, stem_for
from selconv_jax.models._parts import average_pool
from states import perturbed_variables

SMALL = {
    "preresnet": lambda **more: PreResNet(10, (1, 1), width=4, **more),
    "resnext": lambda **more: ResNeXt(10, (1, 1), groups=2, base_width=4, widen=1, **more),
    "condensenet": lambda **more: CondenseNet(
        10, (2, 1), growth=(4, 8), **{"variant": "selective", "dropout_rate": 0.0, **more}
    ),
}


def shapes(model, *image):
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


@pytest.mark.parametrize(
    ("name", "variant", "count"),
    [
        ("densenet40", "plain", 211_978),
        ("densenet40", "selective", 216_514),
        ("densenet40", "gate_only", 211_978),
        ("densenet100", "plain", 995_698),
        ("preresnet164", "plain", 1_661_274),
        ("preresnet164", "selective", 1_680_954),
    ],
)
def test_parameters_as_published(name, variant, count):
    assert count_parameters(shapes(create_model(name, 10, variant=variant), 32, 32, 3)["params"]) == count


def test_layers_of_resnext29():
    variables = shapes(create_model("resnext29", 10), 32, 32, 3)
    params = variables["params"]
    # 8 groups of 64 channels, doubled from block to block; 64 * 4 channels between the bottlenecks.
    assert params["stem"]["kernel"].shape == (3, 3, 3, 64)
    assert params["block1_layer1"]["conv1"]["kernel"].shape == (1, 1, 64, 512)
    assert params["block1_layer1"]["conv2"]["kernel"].shape == (3, 3, 64, 512)
    assert params["block3_layer3"]["conv3"]["kernel"].shape == (1, 1, 2048, 1024)
    assert set(variables["selectivity"]["block1_layer1"]) == {"conv1", "conv3"}


def test_layers_of_condensenet182():
    variables = shapes(create_model("condensenet182", 10), 32, 32, 3)
    params = variables["params"]
    assert params["stem"]["kernel"].shape == (3, 3, 3, 24)
    assert params["block3_layer30"]["conv1"]["kernel"].shape[-1] == 4 * 48
    assert params["block3_layer30"]["conv2"]["kernel"].shape == (3, 3, 48, 48)
    # 24 + 30 * (12 + 24 + 48) channels at the end.
    assert params["classifier"]["linear"]["kernel"].shape == (2544, 10)
    assert "shift" not in params["block1_layer1"]["conv1"]
    assert set(variables["selectivity"]["block1_layer1"]) == {"conv1"}
    assert create_model("condensenet182", 10).dropout_rate == 0.1


def test_width_follows_the_stem_of_preresnet164():
    widths = {
        stem: shapes(create_model("preresnet164", 10, blocks=(1,), stem=stem), 64, 64, 3)["params"]["stem"]
        for stem in ("cifar", "tiny_imagenet", "imagenet")
    }
    assert {stem: params["kernel"].shape for stem, params in widths.items()} == {
        "cifar": (3, 3, 3, 16),
        "tiny_imagenet": (3, 3, 3, 16),
        "imagenet": (7, 7, 3, 64),
    }


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    ("stem", "image"), [("cifar", (28, 28, 1)), ("tiny_imagenet", (64, 64, 3)), ("imagenet", (64, 64, 3))]
)
def test_every_family_takes_every_stem(family, stem, image):
    model = SMALL[family](stem=stem)
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), shapes(model, *image), images)
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "condensenet" else pytest.mark.slow) for name in SMALL],
)
def test_reallocation_leaves_the_function_as_deallocation_left_it(family):
    model = SMALL[family]()
    variables = perturbed_variables(model, (1, 16, 16, 3), 0, closed=0.1, copies=0.3)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    apply = jax.jit(lambda v: model.apply(v, images, train=False))
    key = jax.random.key(0)
    deallocated, _ = selconv_jax.reallocate(variables, key, AllocationRule(threshold=0.2, top_k=0))
    reallocated, report = selconv_jax.reallocate(variables, key, AllocationRule(threshold=0.2, top_k=3))
    assert report.reallocated > 0
    np.testing.assert_array_equal(apply(reallocated), apply(deallocated))
    assert np.abs(apply(deallocated) - apply(variables)).max() > 0  # closing itself does change it


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (PreResNet, {"width": 0}, "width is 0"),
        (PreResNet, {"blocks": (1, 0)}, "blocks is"),
        (ResNeXt, {"groups": 0}, "groups is 0"),
        (ResNeXt, {"stem": "imagnet"}, r"stem is 'imagnet'. Did you mean 'imagenet'\?"),
        (CondenseNet, {"growth": (12, 24)}, "growth is .* list of 3"),
        (CondenseNet, {"growth": (12, 24, 46)}, "46 is not a multiple of groups 4"),
        (CondenseNet, {"variant": "gate-only"}, r"Did you mean 'gate_only'\?"),
    ],
)
def test_bad_arguments(network, arguments, message):
    with pytest.raises(ConfigError, match=message):
        network(**{"num_classes": 10, **arguments})


def test_images_that_the_pools_eat_up_are_refused():
    with pytest.raises(ConfigError, match="nothing is left of 1x1 pixels"):
        shapes(PreResNet(10, (1, 1, 1, 1), width=4), 4, 4, 3)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2)])
def test_pools_for_tpu_are_the_same_pools(shape):
    """Forward and back; an odd last row or column is left out."""
    x = jax.random.normal(jax.random.key(0), shape)

    def pool(x):
        return jnp.sum(jnp.sin(average_pool(x))), average_pool(x)

    (_, y), gradient = jax.value_and_grad(pool, has_aux=True)(x)
    with tracing_for("tpu"):
        (_, other), other_gradient = jax.value_and_grad(pool, has_aux=True)(x)
        assert average_pool(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(y, other, rtol=1e-6)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-6)


def test_unknown_model_and_option():
    with pytest.raises(ConfigError, match=r"no model 'densnet40'. Did you mean 'densenet40'\?"):
        create_model("densnet40", 10)
    with pytest.raises(ConfigError, match=r"no option 'grow'. Did you mean 'growth'\?"):
        create_model("densenet40", 10, grow=3)


def test_stem_for_image_sizes():
    assert [stem_for((size, size, 3)) for size in (28, 32, 64, 224)] == [
        "cifar",
        "cifar",
        "tiny_imagenet",
        "imagenet",
    ]


def test_every_name_is_in_the_registry():
    assert set(MODELS) == {
        "densenet40",
        "densenet100",
        "densenet_bc190",
        "densenet121",
        "preresnet164",
        "preresnet50",
        "resnext29",
        "condensenet182",
        "pointwise",
    }

"""From a plain network to a selective one, and on to a compact, exported one.

The cells are those of editors that know ``# %%``; docs/tutorial.md shows them with their outputs. Run with

    python docs/tutorial.py
"""
# ruff: noqa: B018, D101, D102, D103

# %% [markdown]
# ## A plain network
#
# The task is Fashion-MNIST: a sample of 2,000 training and 1,000 test images.

# %% Imports
import functools
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import selconv_jax
from selconv_jax import functional

# %% Six of the training images, with their classes
data = selconv_jax.data.load("fashion_mnist_sample")


def normalize(pixels):
    return jnp.asarray((pixels / 255 - data.info.mean) / data.info.std, jnp.float32)


images, labels = normalize(data.train.images), jnp.asarray(data.train.labels)
test_images, test_labels = normalize(data.test.images), jnp.asarray(data.test.labels)
print("training:", images.shape, "test:", test_images.shape)

figure = Figure(figsize=(6, 1.3), dpi=120, layout="constrained")
for axes, pixels, label in zip(figure.subplots(1, 6), data.train.images, data.train.labels, strict=False):
    axes.imshow(pixels[..., 0], cmap="gray_r")
    axes.set_title(data.info.class_names[label], fontsize=8)
    axes.axis("off")
figure

# %% [markdown]
# The network has ordinary Flax layers, and nothing in it knows of this package. All its convolutions are
# 1x1, so it never compares a pixel with its neighbours; between them are pools. That is not how you would
# build a classifier. It is here because it makes visible what re-allocation can do: a copy of a channel
# reads at a shifted position, and a network that has copies can look around.


# %% The network
class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(32, (1, 1), use_bias=False)(x)
        for _ in range(2):
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for _ in range(2):
                x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
                x = nn.Conv(32, (1, 1), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


# %% [markdown]
# The training loop is the usual one. The three lines of the round, under `if rule`, are all that selective
# layers ask of it; the plain network is trained without them.


# %% The training loop
@functools.partial(jax.jit, static_argnums=0)
def step(model, variables, opt_state, rate, images, labels):
    def loss(params):
        logits, updates = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    changes, opt_state = optimizer(rate).update(grads, opt_state)
    params = optax.apply_updates(variables["params"], changes)
    return {**variables, **updates, "params": params}, opt_state, value


def optimizer(rate):
    return optax.sgd(rate, momentum=0.9, nesterov=True)


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model, variables):
    return (model.apply(variables, test_images, False).argmax(axis=-1) == test_labels).mean()


def fit(model, variables, epochs, rate=0.1, rule=None, seed=0):
    opt_state, fitted, history = optimizer(rate).init(variables["params"]), model, []
    for epoch in range(epochs):
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        cosine = rate * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        for rows in jax.random.permutation(key, len(images)).reshape(-1, 50):
            variables, opt_state, _ = step(fitted, variables, opt_state, cosine, images[rows], labels[rows])
        before, report = float(accuracy(fitted, variables)), None
        if rule and epoch < epochs // 2:
            variables, report = selconv_jax.reallocate(variables, key, rule)
            fitted = selconv_jax.with_capacity(model, variables, steps=4)
        history.append((before, report))
    return variables, history


# %% Training the plain network
EPOCHS = 8
plain = Network()
trained = jax.jit(plain.init, static_argnums=2)(jax.random.key(0), images[:1], False)
trained, history = fit(plain, trained, EPOCHS)
print(f"plain network: {accuracy(plain, trained):.1%} of the test images")

# %% [markdown]
# ## Make it selective
#
# `selconv_jax.selectivize_model` traces the network. Every convolution whose input is the ReLU of a batch
# norm becomes a selective layer. The result computes the same function.

# %% Conversion
result = selconv_jax.selectivize_model(plain, trained, images[:1])
model, variables = result.model, result.variables
print(result.summary())
difference = abs(model.apply(variables, images[:9], False) - plain.apply(trained, images[:9], False)).max()
print(f"largest difference of the logits: {difference:.1e}")

# %% [markdown]
# ## One round
#
# A round measures, for every input channel of every selective layer, by how much the layer's output would
# change without it; closes the channels that matter least; and gives their kernel rows to copies of those
# that matter most. The threshold is the fraction of the damage that a round may do by closing. The
# published one is 0.001, for hundreds of epochs; for a dozen we need a larger one.

# %% One round
rule = selconv_jax.AllocationRule(threshold=0.1)
once, report = selconv_jax.reallocate(variables, jax.random.key(1), rule)
print(report.summary())
print(f"\naccuracy before {accuracy(model, variables):.1%}, after {accuracy(model, once):.1%}")

# %% [markdown]
# What changed the output is the closing alone: the kernel rows of a new copy start at zero, so filling the
# slots changes nothing at first. Training then finds out what the copies are good for.
#
# ## Train further, with rounds
#
# The same network is trained further, once unchanged, for comparison, and once with a round after every
# epoch of the first half. Same images, same order, same learning rates, and the same number of weights,
# apart from two numbers per channel: the shift.

# %% Test accuracy after every epoch, with and without rounds, and the channels that the rounds changed
LONGER = 12
_, unchanged = fit(plain, trained, LONGER, seed=1)
variables, history = fit(model, variables, LONGER, rule=rule, seed=1)
reports = [report for _, report in history if report]
print(f"plain, trained on: {unchanged[-1][0]:.1%}    selective: {history[-1][0]:.1%}")

figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
left, right = figure.subplots(1, 2)
epochs = 1 + np.arange(LONGER)
left.plot(epochs, [100 * before for before, _ in history], "o-", color="#D55E00", label="with rounds")
left.plot(epochs, [100 * before for before, _ in unchanged], "o-", color="#56B4E9", label="without")
left.axvline(len(reports), color="#666666", linestyle=":", label="last round")
left.set(xlabel="epoch", ylabel="test accuracy, %")
left.legend()
rounds = 1 + np.arange(len(reports))
right.bar(rounds, [report.reallocated for report in reports], color="#BBBBBB", label="closed and refilled")
copies = [report.copies for report in reports]
right.plot(rounds, copies, "o-", color="#D55E00", label="copies after the round")
right.set(xlabel="round", ylabel=f"channels, of {reports[0].channels}", ylim=(0, 1.4 * max(copies)))
right.legend()
figure

# %% [markdown]
# Without rounds, the network can only learn what single pixels tell. With them, it gets copies that look
# elsewhere. This is one run of a small sample; the
# [study of this network](results.md) has five seeds, the whole data sets, and the controls, which show that
# it is the shifts that help, and not the choice of the channels.
#
# ## Look at the channels
#
# `selconv_jax.layer_states` finds the layers with their arrays. The damage scores that the rounds go by
# come from three functions of them.


# %% What the slots of every layer read
def allocation_of(name, state):
    damage = functional.expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
    scores = functional.channel_scores(functional.normalize_damage(damage), state.source)
    arrays = map(np.asarray, (state.gate, state.source, state.shift, scores))
    return selconv_jax.report.LayerAllocation(name, *arrays, features=state.kernel.shape[-1])


states = selconv_jax.layer_states(variables)
layers = [allocation_of(name, state) for name, state in states.items()]
selconv_jax.report.allocation_overview(layers, "After training")

# %% [markdown]
# One layer in detail: the state of every slot, its score, and for each copied channel the positions that its
# copies read.

# %% Channel map of one layer
most = max(layers, key=lambda layer: layer.copy.sum())
selconv_jax.report.channel_map(most, "after training")

# %% [markdown]
# ## Close channels and compact
#
# A round with `top_k=0` only closes. After it the network is trained a little more, so that the others make
# up for what is gone; then `selconv_jax.compact` removes the closed channels from the layers that read them
# and, where nothing else reads them, from those that compute them.

# %% A smaller network
closing = selconv_jax.AllocationRule(threshold=0.2, top_k=0)
variables, report = selconv_jax.reallocate(variables, jax.random.key(2), closing)
print(f"closed {report.deallocated} of {report.channels} channels: {accuracy(model, variables):.1%}")
variables, _ = fit(model, variables, 3, rate=0.02, seed=2)
print(f"trained on: {accuracy(model, variables):.1%}")

small, small_variables = selconv_jax.compact(model, variables, images[:1])
for name, network, tree in (("plain", plain, trained), ("compact", small, small_variables)):
    parameters = selconv_jax.analysis.count_parameters(tree["params"])
    macs = selconv_jax.analysis.count_multiply_adds(
        functools.partial(network.apply, train=False), tree, images[:1]
    )
    print(f"{name}: {parameters:,} parameters, {sum(macs.values()):,} multiply-adds")
print(f"compact: {accuracy(small, small_variables):.1%}")

# %% [markdown]
# ## Export
#
# What is exported takes the pixels as they come, with normalization inside, for batches of any size. The
# StableHLO file runs wherever JAX does, without this package.

# %% StableHLO


def classify(pixels):
    return small.apply(small_variables, normalize_inside(pixels), False)


def normalize_inside(pixels):
    return (pixels.astype(jnp.float32) / 255 - data.info.mean[0]) / data.info.std[0]


folder = Path(tempfile.mkdtemp())
pixels = jnp.asarray(data.test.images[:5])
selconv_jax.export.save_stablehlo(folder / "clothes.stablehlo", classify, pixels)

exported = jax.export.deserialize(bytearray((folder / "clothes.stablehlo").read_bytes()))
logits = exported.call(pixels)
print(f"{(folder / 'clothes.stablehlo').stat().st_size:,} bytes")
print([data.info.class_names[label] for label in logits.argmax(axis=-1)])
print(f"largest difference of the logits: {abs(logits - classify(pixels)).max():.1e}")

# %% [markdown]
# With the extra `onnx` installed, `selconv_jax.export.save_onnx` writes a file for onnxruntime in the same
# way.

# %% ONNX, if its packages are there
try:
    selconv_jax.export.save_onnx(folder / "clothes.onnx", classify, pixels)
except selconv_jax.SelconvError as error:
    print(error)
else:
    outputs = selconv_jax.export.load_onnx(folder / "clothes.onnx")(np.asarray(pixels))
    print(f"largest difference of the logits: {abs(np.asarray(outputs) - logits).max():.1e}")

# %% [markdown]
# ## From here
#
# - [Layers](guide/layers.md) to build networks of, and [NNX modules](guide/nnx.md).
# - [Rounds in a loop of your own](guide/reallocation.md), and [complete loops](guide/loops.md): Flax
#   `TrainState`, averaged parameters, gradient accumulation, several devices, checkpoints.
# - The [training program](training/commands.md), with the published networks and configurations.

"""``selconv export``."""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax._cli.runs import share_compilations
from selconv_jax._utils.files import check_target
from selconv_jax._utils.versions import version_of
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.compaction import Compact, plan_compaction
from selconv_jax.data._augment import normalize
from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.errors import CheckpointError, ConfigError, nearest
from selconv_jax.export import (
    load_onnx,
    load_safetensors,
    load_stablehlo,
    save_onnx,
    save_safetensors,
    save_stablehlo,
)
from selconv_jax.export._files import PACKAGES, check_packages
from selconv_jax.train._run_setup import best_meaning, find_checkpoint, refuse_skipped, restore_run
from selconv_jax.transforms import required_capacity

_IMAGES = 16
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class _Network:
    """A network to export: its variables, on the host, and its evaluation of images of the file's type."""

    model: Any
    variables: Any
    info: DatasetInfo
    normalizes: bool

    def evaluate(self, variables: Any, images: Any) -> Any:
        """Compute logits ``[N, classes]`` of images ``[N, H, W, C]``, uint8 if the network normalizes."""
        dtype = self.model.dtype or jnp.float32
        if self.normalizes:
            images = normalize(images, self.info.mean, self.info.std, dtype)
        return self.model.apply(variables, images.astype(dtype), train=False)

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and type of one image in a batch."""
        return jax.ShapeDtypeStruct(
            (1, *self.info.image_shape), jnp.uint8 if self.normalizes else jnp.float32
        )

    def save(self, path: Path, form: str, notes: dict[str, Any]) -> Callable[[Any], Any]:
        """Write the network to a file; return the function that the file holds."""
        function = functools.partial(self.evaluate, self.variables)
        if form == "stablehlo":
            save_stablehlo(path, function, self.images)
            return load_stablehlo(path)
        if form == "onnx":
            save_onnx(path, function, self.images, input_names=["images"], output_names=["logits"])
            return load_onnx(path)
        save_safetensors(path, self.variables, metadata={"selconv_jax": json.dumps(notes | self._layout())})
        return functools.partial(jax.jit(self.evaluate), load_safetensors(path))

    def _layout(self) -> dict[str, Any]:
        """Describe what the variables of a compacted network do not tell."""
        if not isinstance(self.model, Compact):
            return {}
        layouts = {name: layout.to_json() for name, layout in self.model.layouts}
        return {"layouts": layouts, "widths": dict(self.model.widths)}


def run(options: argparse.Namespace) -> int:
    """Write the network of a checkpoint to a file for other programs, check it, and print a table."""
    form = options.format
    if form not in PACKAGES:
        raise ConfigError(f"there is no format {form!r}. {nearest(form, PACKAGES)}")
    if options.normalize and form == "safetensors":
        raise ConfigError(
            "--normalize is for functions, but a safetensors file has the variables alone. Leave it out, or "
            "take another format."
        )
    if options.multiple != 1 and not options.compact:
        raise ConfigError("--multiple is for the compacted network. Add --compact, or leave it out.")
    check_packages(form)
    workdir = Path(options.workdir)
    checkpoint = find_checkpoint(workdir, options.checkpoint)
    refuse_skipped(checkpoint.step, checkpoint.skipped)
    output = Path(options.output or workdir / f"{'compact' if options.compact else 'network'}.{form}")
    check_target(output, overwrite=True)
    if output.exists() and not options.overwrite:
        raise CheckpointError(
            f"{output}: there is a file already. Add --overwrite or choose another --output."
        )
    share_compilations()
    networks, notes = _networks(workdir, checkpoint.step, options)
    columns = _write(networks, output, form, notes)
    note = f" ({best_meaning(workdir)})" if options.checkpoint == "best" else ""
    what = "compacted network" if options.compact else "network"
    print(f"{workdir}, checkpoint of step {checkpoint.step}{note}: {what} in {output}")
    print(f"{'':<19}" + "".join(f"{name:>16}" for name in networks))
    for title, cells in columns.items():
        print(f"  {title:<17}" + "".join(f"{cell:>16}" for cell in cells))
    return 0


def _networks(
    workdir: Path, step: int, options: argparse.Namespace
) -> tuple[dict[str, _Network], dict[str, Any]]:
    """Restore the network of a checkpoint, and compact it if asked for; the last one is to be exported."""
    trainer, info, step, state = restore_run(workdir, step, options.words)
    variables = jax.device_get(state.variables)
    model: nn.Module = trainer.model.clone(
        capacity=required_capacity(variables) if variables.get("selectivity") else 0.0
    )
    if options.format == "onnx" and np.dtype(trainer.model.dtype).itemsize < 4:
        model = model.clone(dtype=jnp.float32)  # onnxruntime has hardly any operators for bfloat16
    networks = {"original": _Network(model, variables, info, options.normalize)}
    if options.compact:
        image = jax.ShapeDtypeStruct((1, *info.image_shape), trainer.model.dtype)
        # They are compared below.
        plan = plan_compaction(model, variables, image, multiple=options.multiple, compare=False)
        small = jax.device_get(plan.take(variables))
        networks["compact"] = _Network(plan.model, small, info, options.normalize)
    notes = {
        "version": version_of("selconv-jax"),
        "step": step,
        "model": dataclasses.asdict(trainer.config.model),
        **{key: getattr(info, key) for key in ("image_shape", "num_classes", "class_names", "mean", "std")},
    }
    return networks, notes


def _write(
    networks: dict[str, _Network], output: Path, form: str, notes: dict[str, Any]
) -> dict[str, list[str]]:
    """Write the last network, after checking it; return the cells of the table by their titles."""
    original = networks["original"]
    rng = np.random.default_rng(0)
    shape = (_IMAGES, *original.info.image_shape)
    images: Any = rng.normal(size=shape).astype(np.float32)
    if original.normalizes:
        images = rng.integers(0, 256, shape, np.uint8)
    expected = np.asarray(jax.jit(original.evaluate)(original.variables, images))
    if not np.isfinite(expected).all():
        raise CheckpointError(
            "nothing is written: the network's outputs are not finite on random images. Choose an earlier "
            "checkpoint by --checkpoint."
        )
    sizes, differences, calls = [], [], []
    try:
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error}).") from None
    with folder:
        for name, network in networks.items():
            path = Path(folder.name) / f"{name}.{form}"
            function = network.save(path, form, notes)
            sizes.append(path.stat().st_size)
            differences.append(float(np.abs(np.asarray(function(images)) - expected).max()))
            calls.append(functools.partial(function, images))
        allowed, largest = _allowed(original.model.dtype, expected), np.max(differences)  # NaN if one is
        if not largest <= allowed:
            raise CheckpointError(
                f"{output}: not written, as its outputs on random images differ from the network's by "
                f"{largest:.1e}, more than rounding ({allowed:.1e}). Try another --format."
            )
        milliseconds = _times(calls)
        try:
            path.replace(output)
        except OSError as error:
            raise CheckpointError(f"{output}: cannot be written ({error}).") from None
    return {
        "bytes": [f"{size:,}" for size in sizes],
        "parameters": [f"{count_parameters(each.variables['params']):,}" for each in networks.values()],
        "multiply-adds": [f"{_multiply_adds(each):,}" for each in networks.values()],
        "difference": [f"{difference:.1e}" for difference in differences],
        "ms per image": [f"{each / _IMAGES:.3f}" for each in milliseconds],
    }


def _times(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Time the calls in turns; return their medians in milliseconds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def _allowed(dtype: Any, expected: Any) -> float:
    """Return how far rounding may change the outputs; accelerators multiply with bfloat16's precision."""
    type_ = dtype or jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return float(3 * np.sqrt(float(jnp.finfo(type_).eps)) * np.abs(expected).max() + 1e-6)


def _multiply_adds(network: _Network) -> int:
    return sum(count_multiply_adds(network.evaluate, network.variables, network.images).values())

"""PyTorch training steps for comparison with ours; needs torch."""

import functools
from typing import Any

import flax.linen
import jax
import numpy as np
import torch
from torch.nn import functional

from pytorch_baseline.networks import torch_network
from selconv_jax._bench.cases import Case, torch_name
from selconv_jax._bench.environment import cores
from selconv_jax._bench.states import without_allocation
from selconv_jax._bench.workbench import Prepared, Workbench
from selconv_jax.interop.torch import state_dict
from selconv_jax.train._config import OptimizerConfig

__all__ = ["TORCH_NOTE", "TorchStep", "plan_torch_cases"]

TORCH_NOTE = (
    "PyTorch's steps get batches that are augmented and normalized already; ours augment and normalize "
    "theirs within the time given"
)


class TorchStep:
    """A training step in PyTorch with SGD as published, from the same parameters as one of ours.

    Args:
        network: From `networks.torch_network`.
        images: ``[N, C, H, W]`` floating.
        labels: ``[N]`` int64.
        config: Learning rate, momentum and weight decays.
        autocast: Compute in bfloat16; parameters keep their type.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        config: OptimizerConfig,
        autocast: bool = False,
    ) -> None:
        self.network, self._images, self._labels = network.train(), images, labels
        self._autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=autocast)
        named = list(network.named_parameters())
        shifts = [parameter for name, parameter in named if name.endswith("_bias")]
        others = [parameter for name, parameter in named if not name.endswith("_bias")]
        groups: list[dict[str, Any]] = [{"params": others, "weight_decay": config.weight_decay}]
        if shifts:
            groups.append({"params": shifts, "weight_decay": config.shift_weight_decay})
        self._optimizer = torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True
        )

    def __call__(self) -> None:
        """Make a step; on a GPU it may return before the step is done."""
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            logits = self.network(self._images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        functional.cross_entropy(logits, self._labels).backward()
        self._optimizer.step()


def plan_torch_cases(bench: Workbench) -> list[Case]:
    """Plan the PyTorch steps: plain, and with each fraction of copies.

    Args:
        bench: The network.

    Returns:
        The cases; PyTorch uses a GPU where both have one, else as many threads as there are cores.
    """
    settings, group = bench.settings, "training step"
    torch.set_num_threads(cores())
    plain = functools.partial(_prepare, bench, None)
    cases = [Case(torch_name(None), group, None, None, settings.batch, plain, steps=bench.steps)]
    shares = list(settings.capacity) if "step" in settings.what else []
    if "frozen" in settings.what:
        shares.append(settings.share)
    for share in dict.fromkeys(shares):
        prepare = functools.partial(_prepare, bench, share)
        name, base = torch_name(share), torch_name(None)
        cases.append(Case(name, group, base, None, settings.batch, prepare, steps=bench.steps))
    return cases


def _prepare(bench: Workbench, capacity: float | None) -> Prepared:
    """Prepare a step of the plain network, or of the selective one with a fraction of copies."""
    model: flax.linen.Module
    if capacity is None:
        model, variables = bench.plain, without_allocation(bench.initial.variables)
    else:
        model, variables = bench.selective, bench.copied(capacity)
    use_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_gpu else "cpu")
    network = torch_network(model, bench.settings.image[2])
    arrays = state_dict(model, variables)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    noise, labels = bench.noise(bench.settings.batch)
    images = np.ascontiguousarray(((noise / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2))
    step = TorchStep(
        network.to(device),
        torch.from_numpy(images).to(device),
        torch.from_numpy(labels.astype(np.int64)).to(device),
        bench.optimizer_config,
        autocast=bench.settings.dtype == "bfloat16",
    )

    def call() -> None:
        for _ in range(bench.steps):
            step()
        if use_gpu:
            torch.cuda.synchronize()

    call()
    return Prepared(call)

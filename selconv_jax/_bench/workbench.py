"""The networks, images and states of a benchmark, and the calls that it times."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax._bench.compilation import TimedProgram, compile_program
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._bench.states import with_closed, with_copies, without_allocation
from selconv_jax.compaction import plan_compaction
from selconv_jax.data._augment import augment, normalize
from selconv_jax.data._dataset import DatasetInfo, ImageData, Split
from selconv_jax.errors import SelconvError
from selconv_jax.train._config import OptimizerConfig
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._feed import ResidentFeed
from selconv_jax.train._optimizer import make_optimizer
from selconv_jax.train._seeds.trainer import over_members
from selconv_jax.train._state import TrainState, initial_state
from selconv_jax.train._step import eval_batch, train_step
from selconv_jax.transforms._reallocation import reallocate
from selconv_jax.transforms._rule import AllocationRule

PLAIN = "plain"
Network = tuple[Any, dict[str, Any]]  # model and variables

# The rate does not affect the speed; a small one keeps the loss finite on synthetic images.
_OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
_STEPS = 10**6
_THRESHOLD = 0.1  # of the timed re-allocation
_STEPS_ELSEWHERE = 50  # per call, as in training runs on accelerators
_BATCHES = 16  # that the images of the input are


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case that is compiled and warmed up."""

    call: Callable[[], object]  # runs it once and blocks until it is done
    program: TimedProgram | None = None  # the compiled program; None: unknown


@dataclasses.dataclass(frozen=True)
class StepNetwork:
    """A network whose training step is measured."""

    name: str  # in reports
    kind: str  # `PLAIN`, ``"step"``, ``"frozen"`` or ``"compact"``
    copies: float | None  # fraction of the channels that are re-allocated; None: it has no selective layers
    make: Callable[[], Network]  # makes the network and its variables


class Workbench:
    """The networks, images and states of one network's cases, created on first use.

    All of it lies on one device. Steps are the library's own `train_step`, with augmentation and a donated
    state, all on the same batch.
    """

    def __init__(self, name: str, settings: BenchSettings) -> None:
        self.settings = settings
        self.plain = settings.model(name, "plain")
        self.selective = settings.model(name, "selective")
        self.optimizer_config = _OPTIMIZER
        self.optimizer = make_optimizer(_OPTIMIZER, _STEPS)
        mean, std = ((value,) * settings.image[2] for value in (0.5, 0.25))
        classes = self.plain.num_classes
        self.info = DatasetInfo("noise", settings.image, classes, None, mean, std, crop_padding=4, flip=True)

    @property
    def steps(self) -> int:
        """Training steps per call of a compiled program."""
        return self.settings.steps or (1 if jax.default_backend() == "cpu" else _STEPS_ELSEWHERE)

    @functools.cached_property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        """Synthetic images ``[B, H, W, C]`` uint8, and labels ``[B]`` int32."""
        images, labels = self.noise(self.settings.batch)
        return jnp.asarray(images), jnp.asarray(labels)

    @functools.cached_property
    def initial(self) -> TrainState:
        """The selective network's state at the start; never donated."""
        make = functools.partial(
            initial_state, self.selective, self.optimizer, self.settings.image, self.settings.seed
        )
        # A huge program that runs once: not optimized on CPU, where that would take minutes.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(make, compiler_options=options)()

    def noise(self, count: int) -> tuple[Any, Any]:
        """Draw synthetic images and labels as NumPy arrays."""
        rng = np.random.default_rng(self.settings.seed)
        images = rng.integers(0, 256, (count, *self.settings.image), np.uint8)
        return images, rng.integers(0, self.plain.num_classes, count).astype(np.int32)

    def copied(self, share: float) -> dict[str, Any]:
        """Variables of the selective network with a fraction of the channels re-allocated."""
        return with_copies(self.initial.variables, share, self.settings.seed)

    def plain_network(self) -> Network:
        """Return the plain network and its variables."""
        return self.plain, without_allocation(self.initial.variables)

    def selective_network(self, capacity: float) -> Network:
        """Make the selective network with as many copies as it has capacity for."""
        return self.selective.clone(capacity=capacity), self.copied(capacity)

    def step_networks(self, kinds: Collection[str]) -> list[StepNetwork]:
        """List the networks of these kinds whose training steps are measured, the plain one first."""
        share = self.settings.share

        def frozen() -> Network:
            model, variables = self.selective_network(share)
            return plan_compaction(model, variables, compare=False).frozen_model(), variables

        def compact() -> Network:
            variables = with_closed(self.initial.variables, share, self.settings.seed)
            plan = plan_compaction(self.selective, variables, compare=False)
            return plan.model, plan.take(variables)

        selective = (
            StepNetwork(
                f"selective, capacity {capacity:g}",
                "step",
                capacity,
                functools.partial(self.selective_network, capacity),
            )
            for capacity in self.settings.capacity
        )
        networks = (
            StepNetwork(PLAIN, PLAIN, None, self.plain_network),
            *selective,
            StepNetwork(f"frozen, {share:g} re-allocated", "frozen", share, frozen),
            StepNetwork(f"compact, {share:g} closed", "compact", None, compact),
        )
        return [network for network in networks if network.kind in (PLAIN, *kinds)]

    def state(self, variables: dict[str, Any]) -> TrainState:
        """Make a state with a copy of these variables and a fresh optimizer, which may be donated."""
        filled = {"params": {}, "batch_stats": {}, "selectivity": {}, **variables}
        state = self.initial.with_variables(filled)
        state = dataclasses.replace(state, opt_state=self.optimizer.init(filled["params"]))
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)

    def step(
        self, model: Any, placement: Placement | None = None
    ) -> Callable[[TrainState, jax.Array, jax.Array], TrainState]:
        """Make the training step of a network, a pure function; see `train_step`."""
        return functools.partial(
            train_step,
            model=model,
            optimizer=self.optimizer,
            info=self.info,
            steps_per_epoch=_STEPS,
            placement=placement,
        )

    def prepare_step(self, make: Callable[[], Network], seeds: int = 1) -> Prepared:
        """Compile the step of a network for a state with its variables, or for several such states."""
        model, variables = make()
        state, batch = self.state(variables), tuple[Any, ...](self.batch)
        one, count = self.step(model), self.steps

        def steps(state: TrainState, *batch: Any) -> TrainState:
            if count == 1:
                return one(state, *batch)
            return jax.lax.scan(lambda state, _: (one(state, *batch), None), state, length=count)[0]

        function: Callable[..., TrainState] = steps
        if seeds > 1:
            state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), state)
            batch = tuple((each,) * seeds for each in batch)

            def function(state: TrainState, *batch: Any) -> TrainState:
                return over_members(steps, state, batch)

        program = compile_program(lambda: jax.jit(function, donate_argnums=0).lower(state, *batch))

        def run() -> TrainState:
            nonlocal state
            state = program.run(state, *batch)
            return state

        prepared = _warmed_up(run, program)
        if np.any(np.asarray(state.failed_step) >= 0):
            raise SelconvError("the loss of the first step is not finite: choose other network options.")
        return prepared

    def prepare_reallocate(self) -> Prepared:
        """Prepare one round on the whole network, as training calls it between epochs."""
        variables, key = self.initial.variables, jax.random.key(self.settings.seed)
        rule = AllocationRule(threshold=_THRESHOLD)
        return _warmed_up(lambda: reallocate(variables, key, rule))

    def prepare_eval(self, make: Callable[[], Network]) -> Prepared:
        """Prepare the evaluation of one batch."""
        model, variables = make()
        evaluate = functools.partial(eval_batch, model=model, info=self.info)
        program = compile_program(lambda: jax.jit(evaluate).lower(variables, *self.batch))
        return _warmed_up(lambda: program.run(variables, *self.batch), program)

    def prepare_input(self) -> Prepared:
        """Prepare gathering a batch from images on the device, with augmentation and normalization."""
        size = self.settings.batch
        split = Split(*self.noise(_BATCHES * size))
        feed = ResidentFeed(ImageData(self.info, split, split), Placement.over(1, size), size, size)
        arguments = next(feed.train(self.initial.key, 0, 0))

        def make(step: jax.Array, *arguments: Any) -> tuple[jax.Array, jax.Array]:
            images, labels = feed.take(step, *arguments)
            key = jax.random.fold_in(jax.random.key(0), step)
            batch = augment(key, images, crop_padding=self.info.crop_padding, flip=self.info.flip)
            return normalize(batch, self.info.mean, self.info.std, self.settings.dtype), labels

        program = compile_program(lambda: jax.jit(make).lower(jnp.zeros((), jnp.int32), *arguments))
        steps = itertools.cycle([jnp.asarray(step, jnp.int32) for step in range(_BATCHES)])
        return _warmed_up(lambda: program.run(next(steps), *arguments), program)


def _warmed_up(run: Callable[[], object], program: TimedProgram | None = None) -> Prepared:
    """Make the first call of a case."""

    def call() -> None:
        jax.block_until_ready(run())

    call()
    return Prepared(call, program)

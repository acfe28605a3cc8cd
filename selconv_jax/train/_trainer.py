"""A configuration turned into compiled functions on devices: steps, evaluation, re-allocation."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax.compaction import CompactionPlan, plan_compaction
from selconv_jax.data._dataset import DatasetInfo, ImageData
from selconv_jax.data._stream import StreamedData
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config, DataConfig
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._feed import Arguments, Feed, ResidentFeed, StreamedFeed
from selconv_jax.train._network import Program, bucket_program, frozen_program, make_network
from selconv_jax.train._optimizer import learning_rate_schedule, make_optimizer
from selconv_jax.train._speed import Interruptions
from selconv_jax.train._state import Totals, TrainState, initial_state
from selconv_jax.train._step import Purpose, eval_batch, fold, train_step
from selconv_jax.train._trial import notes_on, try_on_shapes
from selconv_jax.transforms._capacity import required_capacity
from selconv_jax.transforms._optimizer_state import reset_rewritten
from selconv_jax.transforms._reallocation import reallocate
from selconv_jax.transforms._report import Report


class Trainer:
    """The compiled functions of a run and access to its images, without a training state.

    Args:
        config: The run.
        data: Its images, in memory or streamed.
        placement: The devices; None: those of the configuration.

    Raises:
        ConfigError: Configuration, data and devices do not fit together.

    Attributes:
        steps_per_epoch: Steps of an epoch.
        steps: Steps of the run.
        model: The network, compiled for no particular capacity.
        optimizer: The optimizer.
        interruptions: Time that did not go into steps; shared by all runs in one program.
        notes: Warnings about settings that are valid but probably not intended.
    """

    def __init__(
        self, config: Config, data: ImageData | StreamedData, placement: Placement | None = None
    ) -> None:
        count = len(data.train)
        if config.batch_size > count:
            held = f" besides the {len(data.validation)} to validate on" if data.validation else ""
            raise ConfigError(
                f"batch_size is {config.batch_size}; {data.info.name} has {count} training images{held}. "
                "Choose a smaller one."
            )
        self.config = config
        self.steps_per_epoch = count // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        self._info = _with_augmentation(data.info, config.data)
        self.model = make_network(config.model, data.info.image_shape, data.info.num_classes)
        self._learning_rate = learning_rate_schedule(
            config.optimizer, self.steps, steps_per_epoch=self.steps_per_epoch, batch_size=config.batch_size
        )
        self.optimizer = make_optimizer(config.optimizer, self.steps, self._learning_rate)
        self._placement = placement or Placement.over(
            config.devices,
            config.batch_size,
            parameter_shards=config.parameter_shards,
            micro_batches=config.micro_batches,
        )
        run, devices = (config, self.model, self.optimizer, data.info.image_shape), self._placement.mesh.size
        self._state_shape = try_on_shapes(*run)
        self._state_sharding = self._placement.state_sharding(self._state_shape)
        self.notes = notes_on(*run, devices)
        # Rounded up to a multiple of the devices; the padding past the last image is not counted.
        sizes = config.batch_size, -(-config.eval_batch_size // devices) * devices
        self._feed: Feed = (
            StreamedFeed(data, self._info, self._placement, *sizes, config.data.workers)
            if isinstance(data, StreamedData)
            else ResidentFeed(data, self._placement, *sizes)
        )
        self._compiled: dict[tuple[str, Program, int], Callable[..., Any]] = {}
        self.interruptions = Interruptions()
        self._frozen: tuple[bytes, Program] | None = None

    @property
    def steps_per_dispatch(self) -> int:
        """Training steps per call of the compiled program; one if images are streamed."""
        if self._feed.one_step:
            return 1
        # XLA runs convolutions inside a loop slowly on CPU, where dispatch costs little anyway.
        return self.config.steps_per_dispatch or (1 if jax.default_backend() == "cpu" else 50)

    def initial_state(self) -> TrainState:
        """Make the state before the first step, on all devices."""
        return self._initial(np.uint32(self.config.seed))

    @functools.cached_property
    def _initial(self) -> Callable[[Any], TrainState]:
        """`initial_state` as a function of the seed, compiled once."""
        make = functools.partial(initial_state, self.model, self.optimizer, self._info.image_shape)
        # Drawing many small arrays is a huge program that runs once: it is not optimized on CPU, where
        # that would take minutes.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(make, out_shardings=self._state_sharding, compiler_options=options)

    def state_shape(self) -> TrainState:
        """Return shapes, dtypes and shardings of the state, without computing it."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._state_shape,
            self._state_sharding,
        )

    def program(self, state: TrainState, epoch: int) -> Program:
        """Choose the program for the steps of an epoch, counted from 0, and the evaluation after it.

        Before the last round it provides for the current copies. After it, it is the program of the frozen
        allocation, unless ``allocation.compile_frozen`` is false.
        """
        # All rounds that were due have been made, except one at the end of this epoch.
        done = max(int(state.step), epoch * self.steps_per_epoch)
        frozen = self.next_round(min(done + 1, (epoch + 1) * self.steps_per_epoch)) is None
        if not (frozen and self.config.allocation.compile_frozen and state.selectivity):
            return self._bucket_program(state)
        allocation = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state.selectivity)))
        if self._frozen is None or self._frozen[0] != allocation:
            self._frozen = allocation, frozen_program(self.model, state.variables, self._example)
        return self._frozen[1]

    def _bucket_program(self, state: TrainState) -> Program:
        return bucket_program(self.model, required_capacity(state.variables) if state.selectivity else 0.0)

    def batches(self, state: TrainState, epoch: int) -> Generator[Arguments]:
        """Yield the remaining batches of an epoch, for `run_steps`; close it when no more are needed."""
        return self._feed.train(state.key, epoch, int(state.step) - epoch * self.steps_per_epoch)

    def is_compiled(self, program: Program) -> bool:
        """Return whether training steps have been compiled for this program."""
        return any(kind == "train" and known == program for kind, known, _ in self._compiled)

    def run_steps(
        self, state: TrainState, batches: Iterator[Arguments], program: Program, count: int
    ) -> tuple[TrainState, jax.Array]:
        """Make ``count`` training steps; ``state`` is donated.

        Batches and program are from `batches` and `program`, for the epoch of the state.

        Returns:
            The state after, and ``[3]`` float32: mean loss and accuracy of the epoch so far, and 1 if a
            loss has not been finite, else 0.
        """
        key, arguments = ("train", program, count), next(batches)
        if key in self._compiled:
            return self._compiled[key](state, *arguments)
        self._compiled[key] = self._make_steps(program.model, count)
        jax.block_until_ready(state)
        with self.interruptions.first_calls:
            return jax.block_until_ready(self._compiled[key](state, *arguments))

    def lower_step(self, program: Program) -> jax.stages.Lowered:
        """Lower a training step for ahead-of-time compilation; reads no image and needs no device."""
        arguments = self._feed.shapes(evaluation=False)
        return self._make_steps(program.model, 1).lower(self.state_shape(), *arguments)

    def lower_evaluation(self, program: Program) -> jax.stages.Lowered:
        """Lower the evaluation of a batch, as `lower_step`."""
        arguments = self._feed.shapes(evaluation=True)
        return self._make_eval(program.model).lower(self.state_shape().variables, *arguments)

    def plan_compaction(self, state: TrainState, multiple: int = 1) -> CompactionPlan:
        """Plan the compaction of the network for the state's allocation, see `selconv_jax.compact`."""
        model = self._bucket_program(state).model
        return plan_compaction(model, state.variables, self._example, multiple=multiple)

    def evaluate(
        self,
        state: TrainState,
        should_stop: Callable[[], bool] = lambda: False,
        program: Program | None = None,
        split: str = "test",
    ) -> Totals | None:
        """Compute loss and accuracy on all images of a split.

        The split is ``"test"``, or ``"validation"`` where the run has one. Without a program, one with room
        for the state's copies is used. ``should_stop`` is called between batches.

        Returns:
            Sums on the host, or None if it was asked to stop.
        """
        program = program or self._bucket_program(state)
        key, totals = ("eval", program, 1), []
        if key not in self._compiled:
            self._compiled[key] = self._make_eval(program.model)
        with contextlib.closing(self._feed.evaluation(split)) as batches:
            for arguments in batches:
                if should_stop():
                    return None
                totals.append(self._compiled[key](state.variables, *arguments))
                if len(totals) > 2:
                    # Keeps the queue short, so that a request to stop is noticed soon.
                    totals[-3] = jax.device_get(totals[-3])
        return jax.tree.map(lambda *parts: sum(parts), *jax.device_get(totals))

    def next_round(self, first: int) -> int | None:
        """Return the first step count from ``first`` on at which a round is due; None: no more rounds."""
        schedule = self.config.allocation.schedule
        return schedule.next_round(first, self.steps_per_epoch, self.config.epochs)

    def reallocate(self, state: TrainState) -> tuple[TrainState, Report]:
        """Make a round of re-allocation; returns the state after it, and what changed."""
        settings = self.config.allocation
        step = int(state.step)
        number = step if settings.every_steps else step // self.steps_per_epoch - 1
        key = fold(state.key, Purpose.REALLOCATION, number)
        variables, report = reallocate(state.variables, key, settings.rule)
        if settings.reset_momentum:
            opt_state = reset_rewritten(self.optimizer, state.opt_state, variables["params"], report)
            state = dataclasses.replace(state, opt_state=opt_state)
        changed = np.asarray([report.deallocated, report.reallocated], np.int32)
        state = dataclasses.replace(state.with_variables(variables), changed=state.changed + changed)
        if self.config.parameter_shards > 1:
            state = jax.device_put(state, self._state_sharding)
        return state, report

    def is_finite(self, state: TrainState) -> bool:
        """Return whether all parameters and running statistics are finite."""
        return bool(_all_finite((state.params, state.batch_stats)))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return float(self._learning_rate(step))

    def _make_steps(self, model: Any, count: int) -> Any:
        steps = self._placed(functools.partial(self._steps, model, count))
        return jax.jit(
            steps, donate_argnums=0, out_shardings=(self._state_sharding, self._placement.replicated)
        )

    def _steps(
        self, model: Any, count: int, placement: Placement | None, state: TrainState, *arguments: Any
    ) -> tuple[TrainState, jax.Array]:
        """Compute `run_steps`, inside ``jit``."""

        def step(state: TrainState) -> TrainState:
            return train_step(
                state,
                *self._feed.take(state.step, *arguments),
                model=model,
                optimizer=self.optimizer,
                info=self._step_info,
                steps_per_epoch=self.steps_per_epoch,
                mixup=self.config.data.mixup,
                micro_batches=self.config.micro_batches,
                placement=placement,
                batch_norm=self.config.batch_norm,
            )

        if count == 1:
            state = step(state)
        else:
            state, _ = jax.lax.scan(lambda carry, _: (step(carry), None), state, length=count)
        seen = state.totals.count.astype(jnp.float32)
        correct = state.totals.correct.astype(jnp.float32)
        failed = (state.failed_step >= 0).astype(jnp.float32)
        return state, jnp.stack([state.totals.loss / seen, correct / seen, failed])

    def _make_eval(self, model: Any) -> Any:
        evaluate = self._placed(functools.partial(self._evaluation, model))
        return jax.jit(evaluate, out_shardings=self._placement.replicated)

    def _evaluation(self, model: Any, placement: Placement | None, variables: Any, *arguments: Any) -> Totals:
        """Evaluate one batch, inside ``jit``."""
        batch = self._feed.take_evaluation(*arguments)
        return eval_batch(variables, *batch, model=model, info=self._info, placement=placement)

    def _placed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Apply `_steps` or `_evaluation` to the placement of the run."""
        return functools.partial(function, self._placement)

    @property
    def _example(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of one image, as the network takes it."""
        return jax.ShapeDtypeStruct((1, *self._info.image_shape), self.model.dtype)

    @property
    def _step_info(self) -> DatasetInfo:
        """The data set's description, with only the augmentation that the compiled step does."""
        if self._info.eval_resize is None:
            return self._info
        return dataclasses.replace(self._info, crop_padding=0, flip=False)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _with_augmentation(info: DatasetInfo, config: DataConfig) -> DatasetInfo:
    """Apply the configuration's augmentation to the description of the data set."""
    if config.crop_padding and info.eval_resize is not None:
        raise ConfigError(
            f"data.crop_padding does not apply to {info.name}: its training images are random parts of "
            "images of differing sizes. Leave it out."
        )
    padding = info.crop_padding if config.crop_padding is None else config.crop_padding
    flip = info.flip if config.flip is None else config.flip
    return dataclasses.replace(info, crop_padding=padding, flip=flip)

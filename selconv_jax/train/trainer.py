"""A configuration turned into compiled functions on devices: steps, evaluation, re-allocation."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from selconv_jax.compaction import CompactionPlan, plan_compaction
from selconv_jax.data.dataset import DatasetInfo, ImageData
from selconv_jax.data.stream import StreamedData
from selconv_jax.errors import ConfigError
from selconv_jax.models import create_model, stem_for
from selconv_jax.optimizer_state import reset_rewritten
from selconv_jax.train.config import Config, DataConfig
from selconv_jax.train.feed import Arguments, Feed, ResidentFeed, StreamedFeed
from selconv_jax.train.optimizer import learning_rate_schedule, make_optimizer
from selconv_jax.train.sharding import Placement
from selconv_jax.train.state import Totals, TrainState, initial_state
from selconv_jax.train.step import Purpose, eval_batch, fold, train_step
from selconv_jax.transform import Report, reallocate, required_slots

__all__ = ["SLOT_BUCKETS", "Trainer"]

# Shares of the channels that a step may be compiled for: few programs, little waste.
SLOT_BUCKETS = (0.0, 0.125, 0.25, 0.5, 1.0)

# A loop of convolutions inside one program is slow on CPU, which also gains nothing from it.
_STEPS_PER_DISPATCH = {"cpu": 1}
_STEPS_PER_DISPATCH_ELSEWHERE = 50


class Trainer:
    """The compiled functions of a run; holds its images, or reads them, but has no state.

    Args:
        config: The run.
        data: Its images, in memory or to be streamed.

    Raises:
        ConfigError: Configuration, data and devices do not go together.

    Attributes:
        config: The run.
        steps_per_epoch: Steps of an epoch.
        steps: Steps of the run.
        model: The network, compiled for no particular number of slots.
        optimizer: The optimizer.
    """

    def __init__(self, config: Config, data: ImageData | StreamedData) -> None:
        count = len(data.train)
        if config.batch_size > count:
            raise ConfigError(
                f"batch_size is {config.batch_size}; {data.info.name} has {count} training images. "
                "Choose a smaller one."
            )
        self.config = config
        self.steps_per_epoch = count // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        self._info = _with_augmentation(data.info, config.data)
        for key in ("variant", "dtype", "slots"):
            if key in config.model.options:
                raise ConfigError(f"model.options.{key} cannot be set: it follows from [model] and the run.")
        self.model = create_model(
            config.model.name,
            data.info.num_classes,
            **{
                "stem": stem_for(data.info.image_shape),
                "variant": config.model.variant,
                "dtype": jnp.dtype(config.model.dtype),
                **config.model.options,
            },
        )
        self.optimizer = make_optimizer(config.optimizer, self.steps)
        self._learning_rate = learning_rate_schedule(config.optimizer.learning_rate, self.steps)
        self._placement = Placement.over(config.devices, config.batch_size)
        # Rounded up to a multiple of the devices: what is past the last image is not counted.
        devices = self._placement.mesh.size
        sizes = config.batch_size, -(-config.eval_batch_size // devices) * devices
        self._feed: Feed
        if isinstance(data, StreamedData):
            self._feed = StreamedFeed(data, self._info, self._placement, *sizes, config.data.workers)
        else:
            self._feed = ResidentFeed(data, self._placement, *sizes)
        self._compiled: dict[tuple[str, float, int], Callable[..., Any]] = {}

    @property
    def steps_per_dispatch(self) -> int:
        """Steps that one call of the compiled program makes; one where images are streamed."""
        if self._feed.one_step:
            return 1
        backend = _STEPS_PER_DISPATCH.get(jax.default_backend(), _STEPS_PER_DISPATCH_ELSEWHERE)
        return self.config.steps_per_dispatch or backend

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices."""
        make = functools.partial(
            initial_state, self.model, self.optimizer, self._info.image_shape, self.config.seed
        )
        # Drawing many small arrays is a huge program that runs once: on CPU, where optimizing it takes
        # minutes, it is not optimized.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(make, out_shardings=self._placement.replicated, compiler_options=options)()

    def state_shape(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        shape = jax.eval_shape(
            functools.partial(
                initial_state, self.model, self.optimizer, self._info.image_shape, self.config.seed
            )
        )
        sharding = self._placement.replicated
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shape
        )

    def slots(self, state: TrainState) -> float:
        """The smallest of `SLOT_BUCKETS` that holds the copies of every layer."""
        if not state.selectivity:
            return 0.0
        needed = required_slots(state.variables)
        return next(bucket for bucket in SLOT_BUCKETS if bucket >= needed)

    def batches(self, state: TrainState, epoch: int) -> Generator[Arguments]:
        """The batches of the rest of an epoch, for `run_steps`; to be closed when no more are needed."""
        return self._feed.train(state.key, epoch, int(state.step) - epoch * self.steps_per_epoch)

    def is_compiled(self, slots: float) -> bool:
        """Whether training steps have been compiled for this share of slots."""
        return any(kind == "train" and share == slots for kind, share, _ in self._compiled)

    def run_steps(
        self, state: TrainState, batches: Iterator[Arguments], slots: float, count: int
    ) -> tuple[TrainState, jax.Array]:
        """Makes ``count`` training steps; the given state is used up.

        Args:
            state: The state before.
            batches: From `batches`, for the epoch of the state.
            slots: From `slots`.
            count: Number of steps, within the epoch.

        Returns:
            The state after, and ``[3]`` float32: mean loss and accuracy of the epoch so far, and 1 if a
            loss has not been finite, else 0.
        """
        function = self._function("train", slots, count, self._make_steps)
        return function(state, *next(batches))

    def plan_compaction(self, state: TrainState, multiple: int = 1) -> CompactionPlan:
        """Plans the network without what the state's allocation does not use, see `selconv_jax.compact`."""
        image = jax.ShapeDtypeStruct((1, *self._info.image_shape), self.model.dtype)
        model = self.model.clone(slots=self.slots(state))
        return plan_compaction(model, state.variables, example=image, multiple=multiple)

    def evaluate(
        self,
        state: TrainState,
        should_stop: Callable[[], bool] = lambda: False,
        model: Any = None,
    ) -> Totals | None:
        """Loss and accuracy on all test images.

        Args:
            state: The state to evaluate.
            should_stop: Asked between batches.
            model: What computes in place of the network, with its variables; None: the network.

        Returns:
            Sums on the host, or None if it was asked to stop.
        """
        if model is None:
            function = self._function("eval", self.slots(state), 1, self._make_eval)
        else:
            function = self._make_eval(model, 1)
        totals = []
        with contextlib.closing(self._feed.test()) as batches:
            for arguments in batches:
                if should_stop():
                    return None
                totals.append(function(state.variables, *arguments))
                if len(totals) > 2:
                    # Keeps the queue short, so that a request to stop is soon heard.
                    totals[-3] = jax.device_get(totals[-3])
        return functools.reduce(Totals.__add__, jax.device_get(totals))

    def reallocate(self, state: TrainState, epoch: int) -> tuple[TrainState, Report]:
        """The round of re-allocation that follows on an epoch.

        Args:
            state: The state at the end of the epoch.
            epoch: The epoch, counted from 0.

        Returns:
            The state after, and what changed.
        """
        settings = self.config.allocation
        key = fold(state.key, Purpose.REALLOCATION, epoch)
        variables, report = reallocate(state.variables, key, settings.allocation)
        if settings.reset_momentum:
            opt_state = reset_rewritten(self.optimizer, state.opt_state, variables["params"], report)
            state = dataclasses.replace(state, opt_state=opt_state)
        return state.with_variables(variables), report

    def is_finite(self, state: TrainState) -> bool:
        """Whether all parameters and running statistics are finite."""
        return bool(_all_finite((state.params, state.batch_stats)))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return float(self._learning_rate(step))

    def _function(
        self, kind: str, slots: float, count: int, make: Callable[[Any, int], Callable[..., Any]]
    ) -> Callable[..., Any]:
        key = (kind, slots, count)
        if key not in self._compiled:
            self._compiled[key] = make(self.model.clone(slots=slots), count)
        return self._compiled[key]

    def _make_steps(self, model: Any, count: int) -> Callable[..., Any]:
        def step(state: TrainState, arguments: Arguments) -> TrainState:
            return train_step(
                state,
                *self._feed.take(state.step, *arguments),
                model=model,
                optimizer=self.optimizer,
                info=self._step_info,
                steps_per_epoch=self.steps_per_epoch,
                mixup=self.config.data.mixup,
                shard_batch=self._placement.shard_batch,
            )

        def steps(state: TrainState, *arguments: Any) -> tuple[TrainState, Any]:
            if count == 1:
                state = step(state, arguments)
            else:
                state, _ = jax.lax.scan(lambda carry, _: (step(carry, arguments), None), state, length=count)
            seen = state.totals.count.astype(jnp.float32)
            correct = state.totals.correct.astype(jnp.float32)
            failed = (state.failed_step >= 0).astype(jnp.float32)
            return state, jnp.stack([state.totals.loss / seen, correct / seen, failed])

        return jax.jit(steps, donate_argnums=0, out_shardings=self._placement.replicated)

    def _make_eval(self, model: Any, count: int) -> Callable[..., Any]:
        del count

        def evaluate(variables: Any, *arguments: Any) -> Totals:
            return eval_batch(
                variables,
                *self._feed.take_test(*arguments),
                model=model,
                info=self._info,
                shard_batch=self._placement.shard_batch,
            )

        return jax.jit(evaluate, out_shardings=self._placement.replicated)

    @property
    def _step_info(self) -> DatasetInfo:
        """The facts with the augmentation that is left to the compiled step."""
        if self._info.eval_resize is None:
            return self._info
        return dataclasses.replace(self._info, crop_padding=0, flip=False)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _with_augmentation(info: DatasetInfo, config: DataConfig) -> DatasetInfo:
    """The facts of the data set with the augmentation that the configuration asks for."""
    if config.crop_padding and info.eval_resize is not None:
        raise ConfigError(
            f"data.crop_padding does not apply to {info.name}: its training images are random parts of "
            "images of differing sizes. Leave it out."
        )
    padding = info.crop_padding if config.crop_padding is None else config.crop_padding
    flip = info.flip if config.flip is None else config.flip
    return dataclasses.replace(info, crop_padding=padding, flip=flip)

"""Steps and evaluations of several runs in one program, with what each run has of a trainer."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selconv_jax._xla.vmapped_convolution import unrolled_convolutions
from selconv_jax.train._config import Config
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._feed import Arguments
from selconv_jax.train._program import Program
from selconv_jax.train._state import Totals, TrainState
from selconv_jax.train._trainer import Trainer
from selconv_jax.transforms._report import Report

__all__ = ["JointTrainer", "MemberTrainer", "Request", "common_program", "over_members"]

_AXIS = "members"
_EVALUATION, _STEPS = range(2)


def over_members(one: Callable[..., Any], state: Any, arguments: Arguments, mesh: Mesh | None = None) -> Any:
    """Call a function of a network's state for several states at once, inside of ``jit``.

    Args:
        one: Of a state and further arguments.
        state: Of all members: every array has an axis of the members before the others.
        arguments: Each is one array for all members, or a tuple of one for each.
        mesh: Devices over whose one axis the members are split evenly; None: they are not.

    Returns:
        What ``one`` returns, of all members.
    """
    axes = tuple(0 if isinstance(argument, tuple) else None for argument in arguments)
    stacked = [jnp.stack(each) if isinstance(each, tuple) else each for each in arguments]
    with unrolled_convolutions():
        function = jax.vmap(one, in_axes=(0, *axes))
        if mesh is not None:
            split, whole = PartitionSpec(_AXIS), PartitionSpec()
            specs = (split, *(whole if axis is None else split for axis in axes))
            function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return function(state, *stacked)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a run wants computed.

    Attributes:
        order: The step it stands at and what it is about to do there, see `rendezvous.Ordered`.
        state: Its state.
        program: What its state needs at least.
        batches: Of training steps; None: an evaluation is wanted.
        count: Of training steps.
        split: To be evaluated on.
    """

    order: tuple[Any, ...]
    state: TrainState
    program: Program
    batches: Iterator[Arguments] | None = None
    count: int = 0
    split: str = ""

    def answer(self, trainer: Trainer, should_stop: Callable[[], bool]) -> Any:
        """Do it for this run alone."""
        if self.batches is None:
            return trainer.evaluate(self.state, should_stop, self.program, self.split)
        return trainer.run_steps(self.state, self.batches, self.program, self.count)


def common_program(requests: Sequence[Request]) -> Program:
    """Return what computes for all: the copies of each fit where the most do."""
    return max((each.program for each in requests), key=lambda program: program.model.capacity)


class JointTrainer(Trainer):
    """Makes the steps of several runs at once: a state here is that of all, with an axis for the runs.

    Where the runs divide over the devices, each is computed on one of them. Else they share all devices, as a
    run alone does.

    Args:
        trainer: Of one of the runs, whose configurations differ in their seed alone.
        members: Number of runs.
    """

    def __init__(self, trainer: Trainer, members: int) -> None:
        vars(self).update(vars(trainer))
        self._compiled = {}
        devices = self._placement.mesh.devices.reshape(-1)
        alike = self.config.batch_norm == "global" or devices.size == 1
        divides = alike and not self._feed.one_step and members % devices.size == 0
        self._mesh = Mesh(devices, (_AXIS,)) if divides and devices.size > 1 else None
        of_one = self._placement.state_sharding(self.state_shape())
        self._sharding: Any = jax.tree.map(
            lambda each: NamedSharding(each.mesh, PartitionSpec(None, *each.spec)), of_one
        )
        if self._mesh is not None:
            self._sharding = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._stack = jax.jit(
            lambda states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
            out_shardings=self._sharding,
        )
        self._unstack = jax.jit(
            lambda tree: [jax.tree.map(lambda leaf: leaf[member], tree) for member in range(members)],  # noqa: B023
            out_shardings=[(of_one, self._placement.replicated)] * members,
        )
        # The states of the runs after the last steps, and the same as one.
        self._last: tuple[list[TrainState], TrainState] | None = None

    def answer(self, requests: Sequence[Request], should_stop: Callable[[], bool]) -> Sequence[Any]:
        """Do what runs that stand at the same step want.

        Args:
            requests: Of one order, one of each run.
            should_stop: Asked between the batches of an evaluation.

        Returns:
            For each run what its `MemberTrainer` is to return.
        """
        program, state = common_program(requests), self._joint([each.state for each in requests])
        if requests[0].batches is None:
            totals = self.evaluate(state, should_stop, program, requests[0].split)
            if totals is None:
                return [None] * len(requests)
            return [jax.tree.map(lambda leaf: leaf[member], totals) for member in range(len(requests))]  # noqa: B023
        batches = [each.batches for each in requests if each.batches is not None]
        self._last = None
        state, numbers = self.run_steps(state, _joined(batches), program, requests[0].count)
        answers: Sequence[Any] = self._unstack((state, numbers))
        self._last = [each for each, _ in answers], state
        return answers

    def forget(self) -> None:
        """Free the memory of the states, which others have taken over."""
        self._last = None

    def _joint(self, states: Sequence[TrainState]) -> TrainState:
        """The states as one; nothing is copied if these are those of the last steps."""
        if self._last is None or any(
            one is not other for one, other in zip(states, self._last[0], strict=True)
        ):
            self._last = list(states), self._stack(states)
        return self._last[1]

    def _make_steps(self, model: Any, count: int) -> Any:
        one = functools.partial(self._steps, model, count, self._inner_placement)

        def steps(state: TrainState, *arguments: Any) -> Any:
            return over_members(one, state, arguments, self._mesh)

        return jax.jit(steps, donate_argnums=0, out_shardings=(self._sharding, self._placement.replicated))

    def _make_eval(self, model: Any, count: int) -> Any:
        del count
        one = functools.partial(self._evaluation, model, self._inner_placement)

        def evaluate(variables: Any, *arguments: Any) -> Any:
            return over_members(one, variables, arguments, self._mesh)

        return jax.jit(evaluate, out_shardings=self._placement.replicated)

    @property
    def _inner_placement(self) -> Placement | None:
        return self._placement if self._mesh is None else None


def _joined(batches: Sequence[Iterator[Arguments]]) -> Iterator[Arguments]:
    """The next arguments of all runs: what is the same array for all once, else a tuple."""
    columns = zip(*(next(each) for each in batches), strict=True)
    yield tuple(
        column[0] if all(array is column[0] for array in column) else tuple(column) for column in columns
    )


class MemberTrainer(Trainer):
    """The trainer of one of several runs: has its steps and evaluations made together with those of others.

    It has no program for a frozen allocation, which would be another one for each run: their steps keep room
    for the copies there are. Results agree but for rounding.

    Args:
        trainer: Whose images and compiled functions are used.
        config: The run, which differs from that of ``trainer`` in its seed alone.
        ask: Waits for the answer to a request, see `JointTrainer.answer`.
        lock: Held while something is computed for this run alone: what is compiled then is so only once.
    """

    def __init__(
        self, trainer: Trainer, config: Config, ask: Callable[[Request], Any], lock: threading.Lock
    ) -> None:
        _ = trainer._initial  # compiled once for all
        vars(self).update(vars(trainer))
        self.config = config
        self._ask, self._lock = ask, lock
        self._step = 0

    def initial_state(self) -> TrainState:
        with self._lock:
            return super().initial_state()

    def program(self, state: TrainState, epoch: int) -> Program:
        del epoch
        return self._bucket_program(state)

    def is_compiled(self, program: Program) -> bool:
        """Return true: who makes the steps also says what is compiled."""
        return True

    def batches(self, state: TrainState, epoch: int) -> Generator[Arguments]:
        self._step = int(state.step)
        return super().batches(state, epoch)

    def run_steps(
        self, state: TrainState, batches: Iterator[Arguments], program: Program, count: int
    ) -> tuple[TrainState, jax.Array]:
        request = Request((self._step, _STEPS, count), state, program, batches=batches, count=count)
        self._step += count
        result: tuple[TrainState, jax.Array] = self._ask(request)
        return result

    def evaluate(
        self,
        state: TrainState,
        should_stop: Callable[[], bool] = lambda: False,
        program: Program | None = None,
        split: str = "test",
    ) -> Totals | None:
        del should_stop
        order = int(state.step), _EVALUATION, split != "validation"
        request = Request(order, state, program or self._bucket_program(state), split=split)
        # Who answers is asked to stop, so that all runs are at the same place.
        totals: Totals | None = self._ask(request)
        return totals

    def reallocate(self, state: TrainState) -> tuple[TrainState, Report]:
        with self._lock:
            return super().reallocate(state)

"""Steps and evaluations of several runs in one program, with what each run has of a trainer."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from selconv_jax._xla.apart import members_apart
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


def over_members(
    one: Callable[..., Any], states: Sequence[Any], arguments: Arguments, mesh: Mesh | None = None
) -> Any:
    """Calls a function of a network's state for several states at once, inside of ``jit``.

    Args:
        one: Of a state and further arguments.
        states: Pytrees of the same shapes, one for each member.
        arguments: Each is one array for all members, or a tuple of one for each.
        mesh: Devices over whose one axis the members are split evenly; None: they are not.

    Returns:
        What ``one`` returns, every array with an axis of the members before the others.
    """
    axes = tuple(0 if isinstance(argument, tuple) else None for argument in arguments)
    stacked = [jnp.stack(each) if isinstance(each, tuple) else each for each in arguments]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    with members_apart():
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
        order: The step it stands at and what it is about to do there, see `meeting.Ordered`.
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
        """Does it for this run alone."""
        if self.batches is None:
            return trainer.evaluate(self.state, should_stop, self.program, self.split)
        return trainer.run_steps(self.state, self.batches, self.program, self.count)


def common_program(requests: Sequence[Request]) -> Program:
    """What computes for all: the copies of each fit where the most do."""
    return max((each.program for each in requests), key=lambda program: program.model.slots)


@dataclasses.dataclass(frozen=True)
class _States:
    """The states of several runs."""

    states: tuple[TrainState, ...]

    @property
    def variables(self) -> tuple[Any, ...]:
        return tuple(state.variables for state in self.states)


class JointTrainer(Trainer):
    """Makes the steps of several runs at once; where it takes or returns a state it has one of each.

    Where the runs divide over the devices, each is computed on one of them. Else they share all devices, as a
    run alone does.

    Args:
        trainer: Of one of the runs, whose configurations differ in their seed alone.
        members: Number of runs.
    """

    def __init__(self, trainer: Trainer, members: int) -> None:
        vars(self).update(vars(trainer))
        self._compiled = {}
        self._members = members
        devices = self._placement.mesh.devices.reshape(-1)
        alike = self.config.batch_norm == "global" or devices.size == 1
        divides = alike and not self._feed.one_step and members % devices.size == 0
        self._mesh = Mesh(devices, (_AXIS,)) if divides and devices.size > 1 else None

    def answer(self, requests: Sequence[Request], should_stop: Callable[[], bool]) -> Sequence[Any]:
        """Does what runs that stand at the same step want.

        Args:
            requests: Of one order, one of each run.
            should_stop: Asked between the batches of an evaluation.

        Returns:
            For each run what its `MemberTrainer` is to return.
        """
        program = common_program(requests)
        # The inherited functions only hand states on.
        states: Any = _States(tuple(each.state for each in requests))
        if requests[0].batches is None:
            totals = self.evaluate(states, should_stop, program, requests[0].split)
            if totals is None:
                return [None] * len(requests)
            return [jax.tree.map(lambda leaf: leaf[member], totals) for member in range(self._members)]  # noqa: B023
        batches = [each.batches for each in requests if each.batches is not None]
        results: Any = self.run_steps(states.states, _joined(batches), program, requests[0].count)
        return list(zip(*results, strict=True))

    def _make_steps(self, model: Any, count: int) -> Any:
        one = functools.partial(self._steps, model, count, self._inner_placement)

        def steps(states: Sequence[TrainState], *arguments: Any) -> Any:
            results = over_members(one, states, arguments, self._mesh)
            each = [jax.tree.map(lambda leaf: leaf[member], results) for member in range(self._members)]  # noqa: B023
            return tuple(zip(*each, strict=True))

        states = (self._placement.state_sharding(self.state_shape()),) * self._members
        return jax.jit(steps, donate_argnums=0, out_shardings=(states, self._placement.replicated))

    def _make_eval(self, model: Any, count: int) -> Any:
        del count
        one = functools.partial(self._evaluation, model, self._inner_placement)

        def evaluate(variables: Sequence[Any], *arguments: Any) -> Totals:
            totals: Totals = over_members(one, variables, arguments, self._mesh)
            return totals

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
        """True: who makes the steps also says what is compiled."""
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

"""Training and evaluating several runs in one program, and the trainer that each run sees."""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selconv_jax._xla.vmapped_convolution import unrolled_convolutions
from selconv_jax.train._config import Config
from selconv_jax.train._feed import Arguments
from selconv_jax.train._network import Program
from selconv_jax.train._seeds.requests import Request
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer

_AXIS = "members"


def over_members(one: Callable[..., Any], state: Any, arguments: Arguments, mesh: Mesh | None = None) -> Any:
    """Vectorize a function of a network's state and further arguments over several states, inside ``jit``.

    Arrays of ``state`` have a leading axis of members; each argument is one array shared by all members, or a
    tuple with one per member. Members are split evenly over the one axis of ``mesh``, if any.
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


def common_program(requests: Sequence[Request]) -> Program:
    """Return the program with the largest capacity, which provides for the copies of every run."""
    return max((each.program for each in requests), key=lambda program: program.model.capacity)


class JointTrainer(Trainer):
    """Trainer of several runs at once, whose states are stacked along a leading axis.

    If the runs divide over the devices, each is computed on one device. Otherwise all runs share all devices,
    as a single run does. ``trainer`` is that of one of the runs, whose configurations differ in their seed
    alone.
    """

    def __init__(self, trainer: Trainer, members: int) -> None:
        vars(self).update(vars(trainer))
        self._compiled = {}
        devices = self._placement.mesh.devices.reshape(-1)
        alike = self.config.batch_norm == "global" or devices.size == 1
        divides = alike and not self._feed.one_step and members % devices.size == 0
        self._mesh = Mesh(devices, (_AXIS,)) if divides and devices.size > 1 else None
        of_one = self._state_sharding
        self._state_sharding = (
            NamedSharding(self._mesh, PartitionSpec(_AXIS))
            if self._mesh
            else jax.tree.map(lambda each: NamedSharding(each.mesh, PartitionSpec(None, *each.spec)), of_one)
        )
        self._stack = jax.jit(
            lambda states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
            out_shardings=self._state_sharding,
        )
        self._unstack = jax.jit(
            lambda tree: _unstacked(tree, members),
            out_shardings=[(of_one, self._placement.replicated)] * members,
        )
        # The states of the runs after the last steps, separate and stacked.
        self._last: tuple[list[TrainState], TrainState] | None = None

    def answer(self, requests: Sequence[Request], should_stop: Callable[[], bool]) -> Sequence[Any]:
        """Answer the requests of the same order, one of each run, as each `MemberTrainer` would."""
        program, state = common_program(requests), self._joint([each.state for each in requests])
        if requests[0].batches is None:
            totals = self.evaluate(state, should_stop, program, requests[0].split)
            return [None] * len(requests) if totals is None else _unstacked(totals, len(requests))
        batches = [each.batches for each in requests if each.batches is not None]
        self._last = None
        state, numbers = self.run_steps(state, _joined(batches), program, requests[0].count)
        answers: Sequence[Any] = self._unstack((state, numbers))
        self._last = [each for each, _ in answers], state
        return answers

    def forget(self) -> None:
        """Free the memory of the stacked states, which another trainer has taken over."""
        self._last = None

    def _joint(self, states: Sequence[TrainState]) -> TrainState:
        """Stack the states; nothing is copied if they are the results of the last steps."""
        if self._last is None or list(map(id, states)) != list(map(id, self._last[0])):
            self._last = list(states), self._stack(states)
        return self._last[1]

    def _placed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        one = functools.partial(function, self._placement if self._mesh is None else None)
        return lambda state, *arguments: over_members(one, state, arguments, self._mesh)


def _unstacked(tree: Any, members: int) -> list[Any]:
    return [jax.tree.map(operator.itemgetter(member), tree) for member in range(members)]


def _joined(batches: Sequence[Iterator[Arguments]]) -> Iterator[Arguments]:
    """Yield the next arguments of all runs: an array shared by all once, others as a tuple."""
    columns = zip(*(next(each) for each in batches), strict=True)
    yield tuple(
        column[0] if all(array is column[0] for array in column) else tuple(column) for column in columns
    )


class MemberTrainer(Trainer):
    """The trainer of one of several runs, whose steps and evaluations are computed together with the others.

    It uses the images and compiled functions of ``trainer``, from whose run ``config`` differs in its seed
    alone. It has no program for a frozen allocation, which would differ between runs: steps keep providing
    for the current copies. Results agree up to rounding.
    """

    def __init__(self, trainer: Trainer, config: Config) -> None:
        _ = trainer._initial  # compiled once for all
        vars(self).update(vars(trainer))
        self.config = config

    def program(self, state: TrainState, epoch: int) -> Program:
        del epoch
        return self._bucket_program(state)

    def is_compiled(self, program: Program) -> bool:
        return True  # compilations are announced where the steps of all runs are computed

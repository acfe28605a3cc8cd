"""A place where threads meet: what all of them ask for at the same time is answered at once."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Abandoned", "Ordered", "Rendezvous"]


class Ordered(Protocol):
    """A request.

    Attributes:
        order: Requests of the lowest order are answered first, all of one order together.
    """

    @property
    def order(self) -> tuple[Any, ...]:
        """See above."""


R = TypeVar("R", bound=Ordered)


class Abandoned(BaseException):
    """Nobody answers any more."""


class Rendezvous(Generic[R]):
    """Members, each in a thread of its own, ask; one thread answers once all that are left have asked.

    A member that is behind (its requests have a lower order) is so answered alone until it has caught up.

    Args:
        members: Who will ask.
    """

    def __init__(self, members: Sequence[Hashable]) -> None:
        self._condition = threading.Condition()
        self._present = set(members)
        self._asked: dict[Hashable, R] = {}
        self._answers: dict[Hashable, tuple[Any, BaseException | None]] = {}
        self._abandoned = False

    @property
    def is_abandoned(self) -> bool:
        """Tell whether nobody answers any more."""
        return self._abandoned

    def ask(self, member: Hashable, request: R) -> Any:
        """Wait for the answer to a request.

        Args:
            member: Who asks, in its thread.
            request: What is asked for.

        Returns:
            The answer.

        Raises:
            Exception: What answering raised.
            Abandoned: There will be no answer.
        """
        with self._condition:
            self._asked[member] = request
            self._condition.notify_all()
            self._condition.wait_for(lambda: member in self._answers or self._abandoned)
            if member not in self._answers:
                raise Abandoned
            answer, error = self._answers.pop(member)
        if error is not None:
            raise error
        return answer

    def leave(self, member: Hashable) -> None:
        """Leave: a member will ask no more."""
        with self._condition:
            self._present.discard(member)
            self._condition.notify_all()

    def serve(self, answer: Callable[[Sequence[R]], Sequence[Any]]) -> None:
        """Answer until all members have left.

        Args:
            answer: Of requests of the same order, in the order of the members, an answer for each.
        """
        try:
            while requests := self._next():
                answers: Sequence[Any] = [None] * len(requests)
                failure: Exception | None = None
                try:
                    answers = answer(list(requests.values()))
                except Exception as error:
                    failure = error
                with self._condition:
                    for member, each in zip(requests, answers, strict=True):
                        self._answers[member] = each, failure
                    self._condition.notify_all()
        except BaseException:
            with self._condition:
                self._abandoned = True
                self._condition.notify_all()
            raise

    def _next(self) -> dict[Hashable, R]:
        """The requests to be answered next; none if all members have left."""
        with self._condition:
            self._condition.wait_for(lambda: self._asked.keys() == self._present)
            if not self._asked:
                return {}
            first = min(request.order for request in self._asked.values())
            chosen = [member for member, request in self._asked.items() if request.order == first]
            return {member: self._asked.pop(member) for member in sorted(chosen, key=str)}

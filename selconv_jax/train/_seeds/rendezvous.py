"""A rendezvous of threads: requests that all of them make are answered together by one thread."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar


class Ordered(Protocol):
    """A request; those of the lowest order are answered first, all of one order together."""

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key of the request."""


R = TypeVar("R", bound=Ordered)


class Abandoned(BaseException):
    """The serving thread has ended, so that no request is answered any more."""


class Rendezvous(Generic[R]):
    """Members make requests from their own threads; one thread answers once all remaining members wait.

    A member that is behind (its requests have a lower order) is thus answered alone until it catches up.
    """

    def __init__(self, members: Sequence[Hashable]) -> None:
        self._condition = threading.Condition()
        self._present = set(members)
        self._asked: dict[Hashable, R] = {}
        self._answers: dict[Hashable, tuple[Any, Exception | None]] = {}
        self.is_abandoned = False

    def ask(self, member: Hashable, request: R) -> Any:
        """Wait, in the member's thread, for the answer or what answering raised; else raise `Abandoned`."""
        with self._condition:
            self._asked[member] = request
            self._condition.notify_all()
            self._condition.wait_for(lambda: member in self._answers or self.is_abandoned)
            if member not in self._answers:
                raise Abandoned
            answer, error = self._answers.pop(member)
        if error is not None:
            raise error
        return answer

    def leave(self, member: Hashable) -> None:
        """Remove a member that will make no more requests."""
        with self._condition:
            self._present.discard(member)
            self._condition.notify_all()

    def serve(self, answer: Callable[[Sequence[R]], Sequence[Any]]) -> None:
        """Answer requests of the same order, sorted by member, one each, until all members have left."""
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
                self.is_abandoned = True
                self._condition.notify_all()
            raise

    def _next(self) -> dict[Hashable, R]:
        """Wait for the requests to answer next; empty if all members have left."""
        with self._condition:
            self._condition.wait_for(lambda: self._asked.keys() == self._present)
            if not self._asked:
                return {}
            first = min(request.order for request in self._asked.values())
            chosen = [member for member, request in self._asked.items() if request.order == first]
            return {member: self._asked.pop(member) for member in sorted(chosen, key=str)}

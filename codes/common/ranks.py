"""Several processes of one launch that score together: the first leads, the others compute what it hands out.

Reads the environment that ``accelerate launch`` (or ``torchrun``) sets. Batches and scores travel over gloo, whatever the
device: they are small. Only the leader runs the evaluation; the others serve it until it has ended:

    accelerate launch --multi_gpu --num_processes 2 -m codes.evaluate.eval_rm --model_path output/contrastive
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist

from codes.common.cli import launched_processes
from codes.common.errors import ContrastRMError

if TYPE_CHECKING:
    from accelerate import PartialState

# Between two batches the leader may read, write and draw for as long as it likes. Its death ends the wait at once.
LONGEST_WAIT = timedelta(days=7)
# Processes that were started together load libraries for seconds, on a slow disk for minutes, before they meet.
LONGEST_MEETING = timedelta(minutes=10)

Work = TypeVar("Work")
Result = TypeVar("Result")


class Ranks(Generic[Work, Result]):
    """The processes of this launch.

    Args:
        compute: What every process does with one piece of work. Its ``ContrastRMError`` is raised again by the leader.
    """

    def __init__(self, compute: Callable[[Work], Result], state: PartialState) -> None:
        self._compute = compute
        self.size, self.index = int(state.num_processes), int(state.process_index)
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self._in_round = False
        if self.index == 0:
            atexit.register(self.dismiss)

    def map(self, work: Sequence[Work]) -> Iterator[Result]:
        """Deal work out in rounds, one piece for each process, and give the results in the order of the work. Leader only.

        Raises:
            ContrastRMError: That of any process, or one of them has gone.
        """
        for start in range(0, len(work), self.size):
            pieces: list[Any] = [(piece,) for piece in work[start : start + self.size]]
            n_pieces = len(pieces)
            outcomes = self._round(pieces + [()] * (self.size - n_pieces))
            for outcome in outcomes[:n_pieces]:
                if isinstance(outcome, ContrastRMError):
                    raise outcome
                yield outcome

    def serve(self) -> None:
        """Compute what the leader hands out until it sends everybody home. For all but the leader."""
        while (piece := self._scattered(None)) is not None:
            self._gathered(self._attempt(piece))
        # A group that is still there while the interpreter ends can abort the process, and its launcher then reports a failure.
        dist.destroy_process_group()

    def dismiss(self) -> None:
        """Send the others home. Leader only."""
        if dist.is_initialized() and not self._in_round:
            self._scattered([None] * self.size)
            dist.destroy_process_group()

    def _round(self, pieces: list[Any]) -> list[Any]:
        # A leader that is stopped in the middle of a round must not send anything that the others do not wait for.
        self._in_round = True
        outcomes = self._gathered(self._attempt(self._scattered(pieces)))
        self._in_round = False
        return outcomes

    def _attempt(self, piece: tuple[Work, ...]) -> Result | ContrastRMError | None:
        try:
            return self._compute(*piece) if piece else None
        except ContrastRMError as error:
            return ContrastRMError(str(error))

    def _scattered(self, pieces: list[Any] | None) -> Any:
        received: list[Any] = [None]
        with _named_loss():
            dist.scatter_object_list(received, pieces, src=0, group=self._group)
        return received[0]

    def _gathered(self, outcome: Any) -> list[Any]:
        outcomes: list[Any] | None = [None] * self.size if self.index == 0 else None
        with _named_loss():
            dist.gather_object(outcome, outcomes, dst=0, group=self._group)
        return outcomes or []


@contextmanager
def _named_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ContrastRMError(
            f"another process of this launch has gone ({reason}); its own message says why. Run the same command again: "
            "finished batches are in the score store"
        ) from error


def join_launch() -> PartialState | None:
    """Meet the other processes of this launch; None where there is only this one.

    Raises:
        ContrastRMError: They cannot be reached.
    """
    if launched_processes() == 1:
        return None
    # Only here: it takes seconds, and DeepSpeed with it prints.
    from accelerate import PartialState

    try:
        state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=LONGEST_MEETING)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ContrastRMError(
            f"the {launched_processes()} processes of this launch do not find each other ({reason}); if there is to be one "
            "process, unset WORLD_SIZE"
        ) from error
    if state.num_processes != launched_processes():
        raise ContrastRMError(
            f"the launcher started {launched_processes()} processes, accelerate sees {state.num_processes}; "
            "start with NUM_PROCESSES of the launcher"
        )
    return state


def local_device() -> torch.device:
    """The device of this process among those of its machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ContrastRMError(
            f"process {local} of this launch finds only {torch.cuda.device_count()} GPUs; lower NUM_PROCESSES"
        )
    return torch.device("cuda", local)

"""Processes that go through one thing together: each does its share, and what all have to know they find out together.

Threads would wait for one another: between two operations on a tile of a fraction of a millisecond, each has to take
the interpreter's lock. Two made a merge no faster than one and took 40 % more CPU seconds; with two processes a linear
merge took 3.1 s instead of 5.8 s.
"""

import copy
import ctypes
import gc
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from checkpoint.source import In, Out
from parallel.errors import InputError
from parallel.memory import available_memory, give_back_freed

MOST = 256
"""Members at most: each takes three of a process' files."""
MEMORY = 1 << 29
"""Bytes that a member of those that write checkpoints may want."""
SPARE = 1 << 26
"""Bytes by which a process may grow over what it needs: what torch frees is holes that its next tensors do not fit."""
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""


def as_many_as_fit() -> int:
    """Return as many members as this process may use cores, and there is memory for."""
    return max(1, min(len(os.sched_getaffinity(0)), available_memory() // MEMORY, MOST))


class Killed(InputError):
    """A member was killed from outside: what is there may be gone on with."""


class _Gone(Exception):
    """Who waits for all has gone."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the processes, as it sees itself."""

    number: int
    count: int
    tell: Callable[[Any], None]
    """Send the process that waits for all something."""
    exchange: Callable[[list[Any]], list[list[Any]]]
    """From what this member has found to what each has, in their order; called by all, as often and in one order."""

    @property
    def width(self) -> int:
        """How many things are done at once, by all members."""
        return self.count

    def share(self, function: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
        """Map a function over those of the items that are this member's."""
        return self._each(map(function, items[self.number :: self.count]))

    @staticmethod
    def _each(found: Iterable[Out]) -> Iterator[Out]:
        for one in found:
            yield one
            give_back_freed(above=SPARE)

    def spread(self, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        """Map a function over items, each of which one member does, but one alone all; called by all in the same order.

        Results are as of `map`: numbers, text or numpy arrays, for they go from one process to another. What a function
        changes it changes for one member alone.
        """
        items = [*items]
        if len(items) == 1:  # sooner done by each than waited for
            return self._each(map(function, items))
        mine = [*self._each(map(function, items[self.number :: self.count]))]
        found = self.exchange(mine)
        return (found[at % self.count][at // self.count] for at in range(sum(map(len, found))))


def go_through(work: Callable[[Member], None], told: Callable[[Any], None], *, members: int, threads: int = 1) -> None:
    """Let members do the work, each in a process that shares this one's memory as it is now; wait for all.

    Args:
        work: what each does.
        told: called here with what members tell, in the order in which it arrives.
        members: processes; one does the work here.
        threads: of one member: its `share` and `spread` use them, and they share its memory.

    Raises:
        Killed: a member was killed.
        Exception: the first that a member raised; the others are stopped.
    """
    if members > 1:
        assert threads == 1, "threads of many members"
        _in_processes(work, told, members)
        return
    before = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=threads, initializer=_alone) as pool:
        _alone()
        try:
            work(_Single(number=0, count=1, tell=told, exchange=lambda mine: [mine], pool=pool, threads=threads))
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class _Single(Member):
    pool: ThreadPoolExecutor
    threads: int

    @property
    def width(self) -> int:
        return self.threads

    def share(self, function: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
        return self._each(self.pool.map(function, items) if self.threads > 1 else map(function, items))

    def spread(self, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        return self.share(function, [*items])


def _alone() -> None:
    """Members are the parallelism: torch's own threads would wait for one another at every small operation."""
    torch.set_num_threads(1)


def _in_processes(work: Callable[[Member], None], told: Callable[[Any], None], count: int) -> None:
    fork = multiprocessing.get_context("fork")
    processes: list[multiprocessing.context.ForkProcess] = []
    ends: list[Connection] = []
    try:
        for number in range(count):
            here, there = fork.Pipe()
            process = fork.Process(
                target=_member, args=(work, number, count, there, [*ends, here], os.getpid()), daemon=True
            )
            with warnings.catch_warnings():  # of other threads: members use nothing that these may hold
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        _wait(ends, told)
    finally:
        for end in ends:
            end.close()
        for process in processes:
            process.kill()
            process.join()


def _wait(ends: list[Connection], told: Callable[[Any], None]) -> None:
    """Receive what members say until all are done; hand what they exchange from one to another.

    Raises:
        Killed: a member was killed.
        Exception: what a member raised.
    """
    left, shared = [*ends], dict[int, list[Any]]()
    while left:
        for end in wait(left):
            assert isinstance(end, Connection)
            try:
                kind, content = end.recv()
            except (EOFError, OSError):
                raise Killed("a worker was killed: is there enough memory for --workers of them?") from None
            if kind == "told":
                told(content)
            elif kind == "shared":
                shared[ends.index(end)] = content
            elif kind == "failed":
                raise content
            else:
                left.remove(end)
        if shared and len(left) < len(ends):
            raise RuntimeError("a worker is done while another waits for it: they have not all asked for the same")
        if len(shared) == len(ends):
            everything = ForkingPickler.dumps([shared[number] for number in range(len(ends))])
            for end in ends:
                try:
                    end.send_bytes(everything)
                except OSError:
                    raise Killed("a worker was killed: is there enough memory for --workers of them?") from None
            shared.clear()


def _member(
    work: Callable[[Member], None], number: int, count: int, end: Connection, others: list[Connection], parent: int
) -> None:
    """Do the work in a process of its own, which ends with its parent."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        return
    gc.freeze()  # what is there stays: nobody need look for garbage in it
    for other in others:  # else nobody would see that one of them has ended
        other.close()
    for one in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # of all of a terminal or job; the parent decides
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _alone()

    def say(kind: str, content: Any = None) -> None:
        try:
            end.send((kind, content))
        except OSError:
            raise _Gone from None

    def exchange(mine: list[Any]) -> list[list[Any]]:
        say("shared", mine)
        try:
            found: list[list[Any]] = end.recv()
        except (EOFError, OSError):
            raise _Gone from None
        return found

    try:
        try:
            work(Member(number=number, count=count, tell=lambda content: say("told", content), exchange=exchange))
            say("done")
        except _Gone:
            raise
        except Exception as error:
            say("failed", _sendable(error))
    except _Gone:
        pass  # it stops all


def _sendable(error: Exception) -> Exception:
    """Return an error as it is if another process can make it anew, else what it says."""
    if not isinstance(error, InputError):
        error.add_note(traceback.format_exc())
    try:
        copy.copy(error)
        ForkingPickler.dumps(error)
    except Exception:  # whatever its class does
        return RuntimeError(traceback.format_exc())
    return error

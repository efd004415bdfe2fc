"""Teams of processes: what is spread comes back in order, errors reach whoever waits, and nobody is left over."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from checkpoint.team import go_through
from parallel.errors import InputError


@pytest.mark.parametrize(("members", "threads"), [(1, 1), (1, 3), (2, 1), (3, 1)])
def test_what_is_spread_comes_back_in_order(members, threads):
    told = []

    def work(member):
        for count in (0, 1, 2, 3, 7):
            member.tell((member.number, [*member.spread(lambda item: item**2, range(count))]))
            arrays = [*member.spread(lambda item: np.full(2, item), iter(range(count)))]
            assert [one.tolist() for one in arrays] == [[item, item] for item in range(count)]

    go_through(work, told.append, members=members, threads=threads)
    for number in range(members):
        assert [found for who, found in told if who == number] == [[i**2 for i in range(n)] for n in (0, 1, 2, 3, 7)]


def test_each_item_is_done_by_one_member_in_a_process_of_its_own():
    told = []

    def work(member):
        member.tell((os.getpid(), [*member.spread(lambda _: os.getpid(), range(5))]))

    go_through(work, told.append, members=2)
    (first, pids), (second, same) = told
    assert pids == same and len({first, second, os.getpid()}) == 3
    assert sorted(map(pids.count, {first, second})) == [2, 3] and {*pids} == {first, second}


def test_one_item_alone_is_done_by_each():
    told = []
    go_through(
        lambda member: member.tell((os.getpid(), *member.spread(lambda _: os.getpid(), [0]))), told.append, members=2
    )
    assert all(found == own for own, found in told)
    assert len({own for own, _ in told}) == 2


def test_threads_share_memory_and_processes_do_not():
    for settings, shared in (({"members": 1, "threads": 3}, True), ({"members": 2}, False)):
        values = np.zeros(6)

        def work(member, values=values):
            [*member.spread(lambda at: values.__setitem__(at, at + 1), range(6))]

        go_through(work, lambda _: None, **settings)
        assert (values.sum() == 21) == shared


@pytest.mark.parametrize("members", [1, 3])
def test_the_error_of_a_member_reaches_who_waits_and_ends_the_others(members):
    began, before = time.monotonic(), {*psutil.Process().children()}

    def work(member):
        if member.number == member.count - 1:
            raise InputError("layer 3: holds a NaN")
        time.sleep(60)

    with pytest.raises(InputError, match=r"^layer 3: holds a NaN$"):
        go_through(work, lambda _: None, members=members)
    assert time.monotonic() < began + 30
    assert {*psutil.Process().children()} == before


def test_an_error_that_cannot_be_sent_is_told_all_the_same():
    class Local(Exception):
        pass

    def work(member):
        raise Local("of a class that nobody else knows")

    with pytest.raises(RuntimeError, match="of a class that nobody else knows"):
        go_through(work, lambda _: None, members=2)


def test_a_killed_member_is_one_line():
    def work(member):
        if member.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        [*member.spread(lambda item: item, range(2))]

    with pytest.raises(InputError, match=r"^a worker was killed: is there enough memory for --workers of them"):
        go_through(work, lambda _: None, members=2)


def test_members_that_do_not_ask_for_the_same_are_told_so():
    def work(member):
        if member.number == 0:
            [*member.spread(lambda item: item, range(2))]

    with pytest.raises(RuntimeError, match="a worker is done while another waits for it"):
        go_through(work, lambda _: None, members=2)


@pytest.mark.parametrize(("members", "threads"), [(1, 1), (1, 4), (3, 1)])
def test_what_is_shared_is_done_once(members, threads):
    told = []

    def work(member):
        assert member.width == members * threads
        for found in member.share(lambda item: item * 2, range(7)):
            member.tell(found)

    go_through(work, told.append, members=members, threads=threads)
    assert sorted(told) == [0, 2, 4, 6, 8, 10, 12]


def test_an_error_of_who_is_told_ends_the_members():
    def work(member):
        member.tell("x")
        time.sleep(60)

    def told(_):
        raise KeyboardInterrupt

    before = {*psutil.Process().children()}
    with pytest.raises(KeyboardInterrupt):
        go_through(work, told, members=2)
    assert {*psutil.Process().children()} == before


def test_members_end_with_their_parent():
    program = (
        "import os, time\nfrom checkpoint.team import go_through\n"
        "def work(member):\n    member.tell(os.getpid())\n    time.sleep(60)\n"
        "go_through(work, lambda pid: print(pid, flush=True), members=2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        members = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        process.kill()
        assert len(psutil.wait_procs(members, timeout=20)[0]) == 2

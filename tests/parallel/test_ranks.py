"""Ranks meet, or say that they do not."""

import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from parallel import ranks
from parallel.errors import InputError

TWO = """
import os, sys
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], GLOO_SOCKET_IFNAME="lo")
from parallel.ranks import connect
print(connect(int(sys.argv[1]), 2).gather(sys.argv[1]))
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_ranks_meet_at_an_address():
    port = free_port()
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), port], text=True, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=100)[0] for process in both] == ["['0', '1']\n"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_meets_is_one_line(monkeypatch, rank):
    monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=2))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port := free_port())
    with pytest.raises(InputError, match=rf"^rank {rank} of 2 meets nobody at 127\.0\.0\.1:{port}: .+$"):
        ranks.connect(rank, 2)

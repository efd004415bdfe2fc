"""The memory that a process may take is what is free, or less if a cgroup of its own or above says so."""

import subprocess
import sys

import psutil
import pytest

from parallel.memory import available_memory


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "5000"}, 5000),
        ("0::/job/step", {"job/step/memory.max": "3000", "job/memory.max": "5000"}, 3000),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "7000"}, 7000),
        ("4:cpu:/job", {"cpu/job/memory.limit_in_bytes": "7000"}, None),
        ("0::/job", {}, None),
    ],
)
def test_the_smallest_limit_counts(tmp_path, line, files, limit):
    own = tmp_path / "own"
    own.write_text(f"{line}\n")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    found = available_memory(tmp_path / "root", own)
    if limit is None:
        assert 0 < found <= psutil.virtual_memory().total
        assert found > 10**7
    else:
        assert found == limit


def test_what_is_freed_goes_back_if_it_is_much() -> None:
    """In a process of its own: what glibc keeps depends on all that came before."""
    script = """
import psutil, torch
from parallel.memory import give_back_freed, keep_freed

def resident(): return psutil.Process().memory_info().rss >> 20
keep_freed()
give_back_freed()
tensors = [torch.ones(1 << 18) for _ in range(200)]
del tensors[:199]  # the last one keeps the heap's end where it is
freed = resident()
give_back_freed(above=400 << 20)
kept = resident()
give_back_freed(above=100 << 20)
print(freed, kept, resident())
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    freed, kept, left = map(int, done.stdout.split())
    assert abs(kept - freed) < 20
    assert left < freed - 150

"""The memory that a process may take is what is free, or less if a cgroup of its own or above says so."""

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

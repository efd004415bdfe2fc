"""A cluster for the session."""

import contextlib
import os
from collections.abc import Iterator

import pytest
from cluster import Cluster
from daemons import Unavailable


@contextlib.contextmanager
def _cluster(accounting: bool) -> Iterator[Cluster]:
    """Bring a cluster up; where none can be had, tests are skipped, except in CI, which must have one."""
    try:
        with Cluster(accounting=accounting) as cluster:
            yield cluster
    except Unavailable as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes, n1 to n4, of two cores each."""
    with _cluster(accounting=False) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def accounting_cluster() -> Iterator[Cluster]:
    """The same with sacct; installs a database where there is none."""
    with _cluster(accounting=True) as cluster:
        yield cluster

"""A DVC remote over S3: what `tests/fleet/remotes.py` demands of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.fleet.remotes")

from tests.fleet.remotes import *  # noqa: E402, F403 - the tests, and their fixtures
from tests.fleet.servers import Server, s3  # noqa: E402

pytestmark = [
    pytest.mark.fleet,
    # Of pygtrie, in DVC's own code.
    pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("s3")
    (scratch / "served").mkdir()
    with s3(scratch / "served", scratch) as server:
        yield server

"""A benchmark says what it lacks before it begins."""

import pytest

from benchmarks.surroundings import require


def test_a_peer_that_is_not_installed_is_named_with_what_installs_it() -> None:
    require("torch")
    with pytest.raises(SystemExit, match=r"runs no_such_peer too, .*pip install -e '\.\[no_such_peer\]'"):
        require("no_such_peer")

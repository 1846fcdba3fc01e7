"""What a session runs of a file's parametrised tests, for fixtures that make no more than that."""

from typing import Any

import pytest


def asked_of(request: pytest.FixtureRequest, fixture: str | None = None) -> list[dict[str, Any]]:
    """Returns the parameters of this session's tests of the file that have some and take the fixture.

    None: the one which asks.
    """
    return [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        if item.path == request.path and (fixture or request.fixturename) in item.fixturenames
    ]

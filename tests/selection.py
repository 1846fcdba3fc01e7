"""What a session runs of a file's parametrised tests, for fixtures that make no more than that."""

from typing import Any

import pytest


def asked_of(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Returns the parameters of those tests of the file, in this session, that take the fixture which asks."""
    return [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        if item.path == request.path and request.fixturename in item.fixturenames
    ]

"""What documents say that a command prints or a simulation gives is what they give today."""

import re

import pytest

from docs.refresh import BLOCKS, DOCUMENTS, ROOT, said, texts


def test_every_block_of_every_document_is_refreshed() -> None:
    marked = {name for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] for name in _marks(path.read_text())}
    assert marked == set(said()) == set(BLOCKS)
    assert all(path.exists() for path in DOCUMENTS)


def _marks(text: str) -> list[str]:
    return re.findall(r"<!-- (?:refresh|end) (\S+) -->", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.timeout(600)
def test_documents_say_what_the_code_gives(name: str) -> None:
    """`python -m docs.refresh` writes what is right; then read the text around it."""
    assert said()[name] == texts([name])[name]

"""Processes that torchrun starts again find each other in a store that still knows those before them."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed as dist

from tedlab.launch import rendezvous

SECONDS = timedelta(seconds=20)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """torchrun's store, and the environment that it gives."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_each_attempt_has_its_own_keys(agent: dist.TCPStore) -> None:
    with ThreadPoolExecutor(3) as ranks:
        for attempt in ("first", "second", "third"):
            stores = list(ranks.map(lambda rank: rendezvous.store(rank, 3, SECONDS), range(3)))
            assert all(store is not None for store in stores)
            for rank, store in enumerate(stores):
                assert not store.check([f"address/{rank}"])  # torch's, of the attempt before
                store.set(f"address/{rank}", attempt)
            for rank, store in enumerate(stores):
                assert store.get(f"address/{(rank + 1) % 3}") == attempt.encode()


def test_who_does_not_come_is_named(agent: dist.TCPStore) -> None:
    with pytest.raises(TimeoutError, match=r"0\.2 s \(comm\.timeout_s\) for these to start: 1, 2 of 3"):
        rendezvous.store(0, 3, timedelta(seconds=0.2))


def test_a_process_that_died_after_it_asked_is_not_taken_for_the_one_that_follows(agent: dist.TCPStore) -> None:
    left = dist.PrefixStore("tedlab/rendezvous", agent)
    left.set("question/1", "of one that is dead")
    with pytest.raises(TimeoutError, match="start: 1 of 2"):
        rendezvous.store(0, 2, timedelta(seconds=0.2))


@pytest.mark.parametrize(
    ("variable", "value"), [("TORCHELASTIC_USE_AGENT_STORE", "False"), ("TORCHELASTIC_MAX_RESTARTS", "0")]
)
def test_without_restarts_torch_does_it(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert rendezvous.store(0, 2, SECONDS) is None

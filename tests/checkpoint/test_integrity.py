"""A checkpoint is as it was written, or it is refused by the name of the file that is not; and it is on the disk."""

import fcntl
import itertools
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tedlab import Topology, checkpoint
from tedlab.checkpoint import durable
from tedlab.commands.checkpoint import main
from tests.checkpoint.small import DAMAGES, age, damaged, read, write
from tests.pool import WorkerPool

FILES = ("__0_0.distcp", ".metadata", "meta.pt", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", ["load", "inspect", "consolidate"])
def test_every_damage_to_every_file_is_one_sentence_that_names_it(
    single: Topology, tmp_path: Path, command: str, file: str
) -> None:
    write(tmp_path / "good", 1)
    for damage in DAMAGES:
        bad = damaged(tmp_path / "good", tmp_path / "bad", file, damage)
        if command == "load":
            with pytest.raises((ValueError, FileNotFoundError)) as refused:
                read(bad)
        else:
            with pytest.raises(SystemExit) as refused:
                main([command, str(bad), *([str(tmp_path / "out")] if command == "consolidate" else [])])
        message = str(refused.value)
        assert file in message, (damage, message)
        assert str(bad) in message, (damage, message)
        assert len(message.splitlines()) == 1, (damage, message)
        assert not (tmp_path / "out").exists()


def test_an_undamaged_checkpoint_is_inspected_and_consolidated(
    single: Topology, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "good", 1)
    main(["inspect", str(tmp_path / "good")])
    main(["consolidate", str(tmp_path / "good"), str(tmp_path / "out")])
    assert "300 parameters in 1 tensors" in capsys.readouterr().out
    assert (tmp_path / "out").exists()


def test_verifying_that_takes_long_says_how_far_it_is(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "good", 1)
    monkeypatch.setattr("tedlab.checkpoint.manifest._BLOCK", 256)
    monkeypatch.setattr("time.monotonic", itertools.count(0.0, 6.0).__next__)  # whoever looks finds 6 s gone
    checkpoint.verify(tmp_path / "good")
    shown = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert {line[0] for line in shown} == {"verifying"}
    shares = [int(line[1].rstrip("%")) for line in shown]
    assert shares == sorted(shares)
    assert len(shares) > 1
    assert shares[0] < 100 == shares[-1]


def mixed(folder: Path) -> dict[str, list[str]]:
    """What every process says of checkpoints of which one file is another save's, or of one with a flipped bit."""
    tensors = {"model": {f"weight_{rank}": torch.zeros(50) for rank in range(2)}}
    for step in (1, 2):
        own = {"model": {f"weight_{dist.get_rank()}": torch.full((50,), float(step))}}
        checkpoint.save(own, {"global_step": step}, folder / f"step_{step}")
    said = {}
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "manifest.json", "a flipped bit"):
        path = folder / name.replace(".", "_")
        if dist.get_rank() == 0:
            shutil.copytree(folder / "step_2", path)
            if name == "a flipped bit":
                content = bytearray((path / "__1_0.distcp").read_bytes())
                content[content.index(torch.full((2,), 2.0).numpy().tobytes()) + 80] ^= 1  # the lowest of a mantissa
                (path / "__1_0.distcp").write_bytes(content)
            else:
                shutil.copy(folder / "step_1" / name, path / name)
        dist.barrier()
        try:
            checkpoint.load(tensors, path)
            said[name] = "loaded"
        except ValueError as error:
            said[name] = str(error)
    checkpoint.load(tensors, folder / "step_2")
    said["untouched"] = str({value for tensor in tensors["model"].values() for value in tensor.tolist()})
    return said


def test_a_flipped_bit_and_files_of_another_step_are_refused_by_every_process(pool: WorkerPool, tmp_path: Path) -> None:
    first, second = pool.run(2, mixed, tmp_path)
    assert first == second
    assert first.pop("untouched") == "{2.0}"
    named = {name: "__1_0.distcp" if name == "a flipped bit" else name for name in first}
    named["manifest.json"] = ""  # the manifest is whole, so it is other files that do not belong to it
    for name, message in first.items():
        assert "is damaged: " in message, name
        assert named[name] in message
        assert "of another save" in message


def test_a_checkpoint_from_before_manifests_loads_with_a_warning(single: Topology, tmp_path: Path) -> None:
    write(tmp_path / "old", 1, random={"numpy": ("MT19937", torch.zeros(3).numpy(), 1), "python": (3, (1, 2), None)})
    age(tmp_path / "old")
    with pytest.warns(UserWarning, match=r"old has no manifest.json, as before tedlab wrote them"):
        assert read(tmp_path / "old") == (1, 1, 1)
    (tmp_path / "old" / "__0_0.distcp").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="no manifest"), pytest.raises(ValueError, match="has 2 bytes of"):
        read(tmp_path / "old")


# ---- on the disk -------------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_the_old_checkpoint_goes(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "last", 1)
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(".tmp")))

    def renamed(self: Path, target: Path) -> Path:
        events.append(("rename", str(self)))
        return rename(self, target)

    def removed(path: Path, **options: Any) -> None:
        events.append(("remove", str(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(durable.shutil, "rmtree", removed)
    write(tmp_path / "last", 2)
    written, put = tmp_path / "last.partial", ("rename", str(tmp_path / "last.partial"))
    before = events[: events.index(put)]
    assert {("sync", str(written / file)) for file in FILES} <= set(before)
    names = before.index(("sync", str(written)))
    assert names > max(before.index(("sync", str(written / file))) for file in FILES)
    after = events[events.index(put) + 1 :]
    assert after == [("sync", str(tmp_path)), ("remove", str(tmp_path / "last.old"))]


def full_disk(folder: Path) -> tuple[str, list[str]]:
    """Saves twice; the second time there is no room for the first process's last file."""
    write(folder / "first", 1)
    whole, durable.write = durable.write, no_room if dist.get_rank() == 0 else durable.write
    with pytest.raises(OSError, match="could not write") as caught:
        write(folder / "second", 2)
    durable.write = whole
    return str(caught.value), sorted(path.name for path in folder.iterdir())


def no_room(path: Path, content: bytes) -> None:
    raise OSError("no space left")


def test_every_process_hears_that_the_first_could_not_finish(pool: WorkerPool, tmp_path: Path) -> None:
    for message, found in pool.run(2, full_disk, tmp_path, timeout=20):
        assert message.startswith(f"process 0 could not write the checkpoint {tmp_path / 'second'}: no space left")
        assert f"intact: {tmp_path / 'first'}" in message
        assert found == ["first", "second.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second.partial"]


# ---- leftovers ---------------------------------------------------------------------------------------------------


def test_what_a_dead_process_left_goes_with_the_next_save(single: Topology, tmp_path: Path) -> None:
    write(tmp_path / "step_1", 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_0.partial")
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_1.old")
    write(tmp_path / "step_2", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_nothing_else_goes(single: Topology, tmp_path: Path) -> None:
    """Not the only copy, not what somebody else calls so, not what a living process writes."""
    write(tmp_path / "step_1", 1)
    (tmp_path / "step_1").rename(tmp_path / "step_1.old")
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "text.txt").touch()
    (tmp_path / "step_9.partial").mkdir()
    living = os.open(tmp_path / "step_9.partial", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    write(tmp_path / "step_2", 2)
    there = {path.name for path in tmp_path.iterdir()}
    os.close(living)
    assert there == {"step_1.old", "data.partial", "step_9.partial", "step_2"}
    assert read(tmp_path / "step_1") == (1, 1, 1)
    write(tmp_path / "step_3", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"step_1.old", "data.partial", "step_2", "step_3"}


# ---- links -------------------------------------------------------------------------------------------------------


def test_a_link_moves_once_its_checkpoint_is_written(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, save = threading.Event(), dcp.save

    def slow(*args: Any, **options: Any) -> None:
        assert go_on.wait(20)
        save(*args, **options)

    writer = checkpoint.Writer(background=True)
    tensors = {"model": {"weight": torch.ones(300)}, "optimizer_0": {"param_groups": [{"lr": 1.0}]}}
    for step in (1, 2):
        if step == 2:
            monkeypatch.setattr(dcp, "save", slow)
        writer.save(tensors, {"value": float(step)}, tmp_path / f"step_{step}")
        writer.link(tmp_path / f"step_{step}", tmp_path / "last")
        if step == 1:
            writer.wait()
    assert os.readlink(tmp_path / "last") == "step_1"
    assert read(tmp_path / "last")[2] == 1
    go_on.set()
    writer.wait()
    assert os.readlink(tmp_path / "last") == "step_2"
    assert read(tmp_path / "last")[2] == 2


def test_a_link_takes_the_place_of_whatever_is_there(single: Topology, tmp_path: Path) -> None:
    write(tmp_path / "step_1", 1)
    write(tmp_path / "last", 0)
    for _ in range(2):  # a directory, then a link
        checkpoint.directory.link(tmp_path / "step_1", tmp_path / "last")
        assert read(tmp_path / "last") == (1, 1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_1"]


def test_a_link_stays_where_it_is_if_its_checkpoint_cannot_be_written(single: Topology, tmp_path: Path) -> None:
    writer = checkpoint.Writer(background=True)
    tensors = {"model": {"weight": torch.ones(300)}}
    (tmp_path / "file").touch()
    (tmp_path / "last").symlink_to("step_1")
    writer.save(tensors, {}, tmp_path / "file" / "step_2")
    writer.link(tmp_path / "file" / "step_2", tmp_path / "last")
    with pytest.raises(OSError, match="could not write"):
        writer.wait()
    assert os.readlink(tmp_path / "last") == "step_1"

"""Files of ``save_state``: where they go, who may read them, and what damage is noticed."""

from __future__ import annotations

import collections
import errno
import fcntl
import io
import os
import signal
import stat
import subprocess
import sys
import zipfile
from unittest import mock

import pytest
import torch
from support.strategies import same_bits
from torch import Tensor

from signadam_ext import SignAdamPP, Signum
from signadam_ext.core.formats import FORMATS
from signadam_ext.state import archive
from signadam_ext.state.archive import writer


def trained(steps=2, **options):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 40).view(5, 8)), torch.nn.Parameter(torch.ones(3))]
    optimizer = SignAdamPP(params, lr=0.1, **options)
    for step in range(steps):
        params[0].grad = torch.linspace(-1, 2, 40).view(5, 8) + step
        optimizer.step()
    return optimizer


def fresh(**options):
    return trained(0, **options)


def same(a, b):
    states = [[o.state[p] for g in o.param_groups for p in g["params"] if p in o.state] for o in (a, b)]
    return len(states[0]) == len(states[1]) and all(
        x.keys() == y.keys() and all(same_bits(x[k], y[k]) if isinstance(x[k], Tensor) else x[k] == y[k] for k in x)
        for x, y in zip(*states, strict=True)
    )


def permissions(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_torch_save(umask, tmp_path):
    before = os.umask(umask)
    try:
        for existing in (None, 0o664, 0o600):
            for path, save in (
                (tmp_path / "ours", trained().save_state),
                (tmp_path / "theirs", lambda p: torch.save(1, p)),
            ):
                if existing is None:
                    path.unlink(missing_ok=True)
                else:
                    path.chmod(existing)
                save(path)
            assert permissions(tmp_path / "ours") == permissions(tmp_path / "theirs")
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs"}


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(there, tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "state"
    if there:
        target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "second").symlink_to("link")
    optimizer, other = trained(), fresh()
    optimizer.save_state(tmp_path / "second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    other.load_state(target)
    assert same(optimizer, other)
    assert list((tmp_path / "folder").iterdir()) == [target]


def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, fifo, "/dev/null", tmp_path / "loop", tmp_path / "missing" / "state"):
        with pytest.raises(OSError):
            trained().save_state(path)
    assert stat.S_ISFIFO(os.stat(fifo).st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "loop"}


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 255)
    trained().save_state(path)
    fresh().load_state(os.fsencode(path))


@pytest.mark.parametrize("after", range(5))
def test_no_temporary_file_stays(after, tmp_path, monkeypatch):
    optimizer, save = trained(state_dtype="int8"), torch.save
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.save_state(tmp_path / "state")
    assert not list(tmp_path.iterdir())


#: Writes a state in two parts, and waits between them to be killed.
WRITER = """
import sys, time
from signadam_ext.state.archive import writer
with writer(sys.argv[1]) as archive:
    archive.writestr("member", b"1" * 1000)
    print("under way", flush=True)
    time.sleep(600)
"""


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path):
    """And by nobody while it lives, nor by the writer of another file."""
    path, other = tmp_path / "state", tmp_path / "other"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"under way\n"
            (left,) = names_in(tmp_path)
            trained().save_state(path)
            assert names_in(tmp_path) == sorted([left, "state"]), "its writer is alive"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    trained().save_state(other)
    assert names_in(tmp_path) == sorted([left, "other", "state"])
    (tmp_path / "link").symlink_to(path)
    trained().save_state(tmp_path / "link")
    assert names_in(tmp_path) == ["link", "other", "state"]
    fresh().load_state(path)


def test_writers_of_one_file_at_once_leave_the_last(tmp_path):
    path, one, other = tmp_path / "state", trained(1), trained(2)
    with writer(path) as archive:
        other.save_state(path)
        assert len(names_in(tmp_path)) == 2
        archive.writestr("optimizer", b"")
    assert names_in(tmp_path) == ["state"]
    with pytest.raises(ValueError):
        fresh().load_state(path)
    one.save_state(path)
    twin = fresh()
    twin.load_state(path)
    assert same(one, twin)


def test_a_new_file_that_another_writer_takes_for_a_leftover(tmp_path, monkeypatch):
    """It is made, and looked at by another before it is locked."""
    path, lock, removed = tmp_path / "state", fcntl.flock, []

    def late(file, operation):
        if not removed:
            (name,) = names_in(tmp_path)
            removed.append(name)
            archive._remove_leftovers(str(tmp_path), name[:18])
            assert not names_in(tmp_path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    trained().save_state(path)
    assert removed and names_in(tmp_path) == ["state"]
    fresh().load_state(path)


def test_nothing_is_removed_where_nobody_can_lock(tmp_path, monkeypatch):
    path = tmp_path / "state"
    with monkeypatch.context() as patched, writer(path) as other:
        patched.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
        (left,) = names_in(tmp_path)
        trained().save_state(path)
        assert names_in(tmp_path) == sorted([left, "state"])
        other.writestr("member", b"")
    assert names_in(tmp_path) == ["state"]


def test_an_offloaded_parameter_writes_its_whole_moment_or_nothing(tmp_path):
    for sd in ("fp32", "bf16", "int8", "int2"):
        optimizer = trained(state_dtype=sd)
        (param,) = (p for p in optimizer.state)
        before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
        whole, param.data = param.data, torch.empty(0)
        if sd in ("fp32", "bf16"):
            assert same_bits(optimizer.state_dict()["state"][0]["exp_avg"], before)
            optimizer.save_state(tmp_path / sd)
        else:
            for save in (optimizer.state_dict, lambda optimizer=optimizer: optimizer.save_state(tmp_path / "none")):
                with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 of group 0 holds .* codes of another"):
                    save()
            param.data = torch.empty(33)  # as many runs of codes
            with pytest.raises(ValueError, match="codes of another number of elements than the parameter's 33"):
                optimizer.state_dict()
            assert not (tmp_path / "none").exists()
        param.data = whole
        optimizer.save_state(tmp_path / sd)
        other = fresh(state_dtype=sd)
        other.load_state(tmp_path / sd)
        assert same_bits(other.state_dict()["state"][0]["exp_avg"], before)


def test_entries_of_a_user(tmp_path):
    optimizer, other = trained(), fresh()
    param = optimizer.param_groups[0]["params"][0]
    notes = {"a/b": torch.arange(3), "": 1, "ü\0": "two", 3: 4.0, ("x", 1): [torch.ones(2)], "#1": None}
    optimizer.state[param].update(notes)
    optimizer.state["of no parameter"] = {"seen": torch.tensor(5)}
    optimizer.save_state(tmp_path / "state")
    other.load_state(tmp_path / "state")
    loaded = other.state[other.param_groups[0]["params"][0]]
    assert loaded.keys() == optimizer.state[param].keys()
    assert all(str(loaded[name]) == str(value) for name, value in notes.items())
    assert other.state["of no parameter"]["seen"] == 5


# Damage


def refused(path):
    other = fresh(state_dtype="int4")
    groups = [dict(group) for group in other.param_groups]
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile)):
        other.load_state(path)
    assert not other.state and [dict(group) for group in other.param_groups] == groups


def test_one_flipped_bit_in_a_name_is_noticed(tmp_path):
    path = tmp_path / "state"
    trained(state_dtype="int4").save_state(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert len(names) == 6
    for name in names:
        places = []
        at = whole.find(name.encode())
        while at >= 0:
            places += range(at, at + len(name))
            at = whole.find(name.encode(), at + 1)
        # In the local header, in the directory, and in both.
        for offset in range(len(name)):
            for bit in (0, 3, 5):
                damaged = bytearray(whole)
                for place in places[offset :: len(name)]:
                    damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                refused(path)
        damaged = bytearray(whole)
        damaged[places[-1]] ^= 4
        path.write_bytes(damaged)
        refused(path)
    path.write_bytes(whole)
    fresh(state_dtype="int4").load_state(path)


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name, content in change({name: old.read(name) for name in old.namelist()}).items():
            new.writestr(name, content)


def with_other_list(members, listed):
    """The head with something else for its list of members."""
    head = {**torch.load(io.BytesIO(members["optimizer"]), weights_only=True), "members": listed}
    content = io.BytesIO()
    torch.save(head, content)
    return {**members, "optimizer": content.getvalue()}


CHANGES = {
    "members of a tensor": lambda members: with_other_list(members, torch.ones(1).expand(1 << 40)),
    "members of a string": lambda members: with_other_list(members, "state"),
    "member of a tensor": lambda members: with_other_list(members, [torch.ones(1).expand(1 << 40)]),
    "missing member": lambda members: {k: v for k, v in members.items() if k != "state/0/exp_avg_levels"},
    "extra member": lambda members: {**members, "state/1/step": members["state/0/step"]},
    "extra file": lambda members: {**members, "readme": b"hello"},
    "no head": lambda members: {k: v for k, v in members.items() if k != "optimizer"},
    "swapped": lambda members: {**members, "optimizer": members["state/0/step"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_members_than_expected_are_refused(change, tmp_path):
    trained(state_dtype="int4").save_state(tmp_path / "state")
    rewritten(tmp_path / "state", tmp_path / "same", dict)
    fresh(state_dtype="int4").load_state(tmp_path / "same")
    rewritten(tmp_path / "state", tmp_path / "changed", change)
    refused(tmp_path / "changed")


def test_compressed_members_are_refused_unread(tmp_path, monkeypatch):
    trained(state_dtype="int4").save_state(tmp_path / "state")
    rewritten(tmp_path / "state", tmp_path / "small", dict, zipfile.ZIP_DEFLATED)
    read = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, *args, **kwargs: read.append(args))
    with pytest.raises(ValueError, match="is compressed, and save_state compresses nothing"):
        fresh(state_dtype="int4").load_state(tmp_path / "small")
    assert not read


def test_files_of_the_first_version_load(tmp_path):
    """Without a list of members, without orders and methods, with kinds that are strings and fp32 numbers of steps."""
    optimizer = trained(state_dtype="int4")
    state = optimizer.state_dict()["state"][0]
    old = {**state, "exp_avg_kind": "int4", "step": torch.tensor(2.0)}
    del old["exp_avg_order"]
    group = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k not in ("method", "backend")}
    with zipfile.ZipFile(tmp_path / "old", "w") as archive:
        for name, value in (("optimizer", {"param_groups": [group]}), *((f"state/0/{k}", v) for k, v in old.items())):
            with archive.open(name, "w") as member:
                torch.save(value, member)
    other = fresh(state_dtype="int4")
    other.load_state(tmp_path / "old")
    assert same(optimizer, other) and other.state_dict()["state"][0]["exp_avg_kind"] == FORMATS["int4"].number


def test_another_method_is_refused(tmp_path):
    trained().save_state(tmp_path / "state")
    other = Signum([torch.nn.Parameter(torch.ones(5, 8)), torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="is of the method SignAdamPP: must be of Signum"):
        other.load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "value", [collections.deque([1]), range(3), {"a": [frozenset()]}], ids=["deque", "range", "nested"]
)
def test_what_no_file_can_keep_is_refused(value, tmp_path):
    optimizer, path = trained(), tmp_path / "state"
    optimizer.save_state(path)
    before = path.read_bytes()
    optimizer.state[optimizer.param_groups[0]["params"][0]]["mine"] = value
    with pytest.raises(TypeError, match=r"state 'mine' of parameter number 0 is or holds what no file can keep"):
        optimizer.save_state(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_subclass_is_saved_as_its_numbers(tmp_path):
    class Ordinary(Tensor):
        pass

    optimizer, path = trained(), tmp_path / "state"
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["exp_avg"] = state["exp_avg"].as_subclass(Ordinary)
    optimizer.step()
    optimizer.save_state(path)
    other = fresh()
    other.load_state(path)
    loaded = other.state[other.param_groups[0]["params"][0]]["exp_avg"]
    assert type(loaded) is Tensor and same_bits(loaded, state["exp_avg"].as_subclass(Tensor))


def test_nobody_reads_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    optimizer, path = trained(), tmp_path / "state"
    optimizer.save_state(path)
    os.chmod(path, 0o600)
    seen, save = [], torch.save

    def watched(value, file):
        seen.extend(permissions(other) for other in tmp_path.iterdir())
        save(value, file)

    monkeypatch.setattr(torch, "save", watched)
    optimizer.save_state(path)
    assert set(seen) == {0o600} and permissions(path) == 0o600

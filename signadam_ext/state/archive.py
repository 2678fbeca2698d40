"""State in files: a zip file with one member for each entry, so that one tensor at a time is in memory twice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import pickle
import re
import secrets
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from ..core import checks, tensors
from . import pickles

_HEAD = "optimizer"

#: What a member's name shows of the entry's own.
_SHOWN = re.compile(r"[\w.\- ]+", re.ASCII)

#: The one member of a member, which torch.save makes a zip file of its own, that is read by running it.
_PICKLE = "data.pkl"

#: Where the records of its storages lie, by their keys.
_STORAGES = "/data/"

#: What names of files end with that are being written.
_TEMPORARY = ".tmp"

#: Flags of a member that change nothing in how it is read: a name in UTF-8, sizes behind the data.
_HARMLESS_FLAGS = 0x808

#: What zipfile raises over a damaged file, beside errors of reading it: a version or a flag that no file of ours has, a
#: place before its beginning, a name in no known letters.
_DAMAGE = (NotImplementedError, ValueError, struct.error, zipfile.BadZipFile)


@contextlib.contextmanager
def writer(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """A zip file that takes its name when it is complete, so that an interrupted write leaves the old file.

    A symbolic link is followed. A new file has the permissions that ``open`` would give it, an old one keeps its own.
    What a writer of the same file has left that was killed is removed.

    Raises:
        OSError: a path that cannot be written, or that is no regular file.
    """
    path = os.fsdecode(os.fspath(path))
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is not None:
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "not a regular file, so no state is saved to it", path)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    # Names may be as long as the file's own can be.
    prefix = f".{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}-"
    _remove_leftovers(folder, prefix)
    temporary = ""
    try:
        # Nobody reads in the meantime what the old file did not show.
        mode = 0o666 if old is None else 0o600
        while True:
            temporary = os.path.join(folder, f"{prefix}{secrets.token_hex(8)}{_TEMPORARY}")
            file = open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
            if _lock(file, temporary):
                break
            file.close()
        with file:
            archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
            try:
                yield archive
                archive.close()
            finally:
                archive.fp = None  # it has nothing more to write, also where a member was left open
            file.flush()
            os.fsync(file.fileno())
            if old is not None:
                with contextlib.suppress(OSError):  # whose it is only a privileged process may say
                    os.chown(temporary, old.st_uid, old.st_gid)
                os.chmod(temporary, stat.S_IMODE(old.st_mode))
            os.replace(temporary, path)  # before it is closed, which ends the lock
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _lock(file: IO[bytes], path: str) -> bool:
    """Locks a new file as one that is written; False where another writer had removed it before, as one that was left.

    The lock ends with the process, however that ends. A file system without locks gives none.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_leftovers(folder: str, prefix: str) -> None:
    """Removes the temporary files with that prefix whose writers are gone: nobody holds a lock on them."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefix) and name.endswith(_TEMPORARY):
                with contextlib.suppress(OSError):  # being written, somebody else's, or gone
                    _remove_unlocked(os.path.join(folder, name))


def _remove_unlocked(path: str) -> None:
    """Removes a file on which nobody holds a lock.

    Raises:
        OSError: somebody does, or nobody can say.
    """
    # No link is followed, and nothing but a file is waited for.
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)  # under the lock: whoever has just made it and waits for it sees that it is gone
    finally:
        os.close(file)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """A file of :func:`writer`, to be read.

    Raises:
        OSError, zipfile.BadZipFile: one that cannot be read.
    """
    try:
        archive = zipfile.ZipFile(os.fsdecode(path))
    except _DAMAGE as error:
        raise zipfile.BadZipFile(
            f"{os.fsdecode(path)}: {error}; it is cut short, or was not written by save_state"
        ) from error
    with archive:
        yield archive


@dataclass(frozen=True)
class Member:
    """Where a file keeps one entry of a parameter's state."""

    member: str
    number: int
    name: Any


def members_of(states: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Member]:
    """A member for each entry of each parameter's state."""
    found = []
    for number, state in states:
        for i, name in enumerate(state):
            shown = name if isinstance(name, str) and _SHOWN.fullmatch(name) else f"#{i}"
            found.append(Member(f"state/{number}/{shown}", number, name))
    return found


def write_head(archive: zipfile.ZipFile, head: dict[str, Any], members: Iterable[Member]) -> None:
    """Writes what stands before the state.

    Raises:
        TypeError: something in it that could not be read back.
    """
    listed = [(each.member, each.number, each.name) for each in members]
    for name, value in head.items():
        _readable(f"{name!r} of the optimizer", value)  # by itself, so that an error names it
    with archive.open(_HEAD, "w") as member:
        torch.save({**head, "members": listed}, member)


def write_entry(archive: zipfile.ZipFile, member: Member, value: Any) -> None:
    """Writes one entry of a parameter's state.

    Raises:
        TypeError: one that could not be read back.
    """
    is_plain = type(value) in (Tensor, torch.nn.Parameter, int, float, bool, str, type(None))
    label = f"state {member.name!r} of parameter number {member.number}"
    content = None if is_plain else _readable(label, value)
    with archive.open(member.member, "w", force_zip64=True) as file:
        if content is None:
            torch.save(value, file)  # which needs no second copy of a tensor
        else:
            file.write(content)


def _readable(label: str, value: Any) -> bytes:
    """What a member holds of a value.

    Raises:
        TypeError: one that could not be read back.
    """
    content = io.BytesIO()
    try:
        torch.save(value, content)
        _check_content(label, content.getvalue())
        content.seek(0)
        torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.PickleError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{label} is or holds what no file can keep, in a {type(value).__name__}: save_state writes tensors, "
            "numbers, strings, and lists, tuples and dicts of them, which load_state reads without running code"
        ) from error
    return content.getvalue()


def read_head(archive: zipfile.ZipFile) -> tuple[dict[str, Any], dict[int, list[Member]]]:
    """What stands before the state, and the members of each parameter's, by its number.

    Raises:
        ValueError: a file of another origin, members other than the head lists, compressed ones, whose size says
            nothing of the memory that they would need, or a head that cannot be read.
        zipfile.BadZipFile: a damaged file.
    """
    shown = archive.filename
    infos = {info.filename: info for info in archive.infolist()}
    _check_sizes(f"{shown}: member", archive, _size(archive))
    for name, info in infos.items():
        if info.flag_bits & ~_HARMLESS_FLAGS:
            raise zipfile.BadZipFile(f"{shown}: member {name!r} has flags that save_state does not set")
    if _HEAD not in infos:
        raise ValueError(
            f"{shown} was not written by save_state: load what torch.save has written by "
            "load_state_dict(torch.load(...))"
        )
    head = _read(archive, _HEAD)
    if not isinstance(head, dict) or "param_groups" not in head:
        raise ValueError(f"{shown} was not written by save_state: its head has no param_groups")
    if "members" in head:
        if not isinstance(head["members"], list):  # a tensor of any size may be gone through as well
            raise ValueError(f"{shown}: its head has {checks.shown(head['members'])} for members: must be a list")
        members = [_listed(shown, each) for each in head["members"]]
    else:  # an older version's
        parts = ((name, *name.split("/", 2)) for name in infos if name.startswith("state/"))
        members = [Member(name, int(number), entry) for name, _, number, entry in parts]
    expected, present = [_HEAD, *(each.member for each in members)], archive.namelist()
    if sorted(expected) != sorted(present):
        missing, more = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
        what = f"lacks the member {missing[0]!r}" if missing else f"has the member {(more or present)[0]!r} too many"
        raise ValueError(f"{shown} {what}: it is damaged, or was put together by another program")
    by_number: dict[int, list[Member]] = {}
    for member in members:
        by_number.setdefault(member.number, []).append(member)
    return head, by_number


def read_entries(archive: zipfile.ZipFile, members: Iterable[Member]) -> dict[Any, Any]:
    """A parameter's entries, read from a file one tensor at a time."""
    return {member.name: _read(archive, member.member) for member in members}


def _listed(shown: str | None, each: Any) -> Member:
    """A member as a head lists it.

    Raises:
        ValueError: something else.
    """
    if not isinstance(each, (tuple, list)) or len(each) != 3 or not isinstance(each[0], str):
        raise ValueError(f"{shown}: its head lists {checks.shown(each)} as a member: must be (member, number, name)")
    return Member(*each)


def _size(archive: zipfile.ZipFile) -> int:
    """The size of the whole file in bytes."""
    file: Any = archive.fp
    return file.seek(0, os.SEEK_END)


def _check_sizes(label: str, archive: zipfile.ZipFile, size: int) -> None:
    """Raises unless the members take as much memory as they have bytes in the file, which says how much is needed.

    Raises:
        ValueError: compressed ones.
        zipfile.BadZipFile: more bytes than the file has.
    """
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{label} {info.filename!r} is compressed, and save_state compresses nothing")
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > size:
        raise zipfile.BadZipFile(f"{label}s claim {claimed} bytes in a file of {size}")


def _read(archive: zipfile.ZipFile, name: str) -> Any:
    label = f"{archive.filename}: member {name!r}"
    try:
        with archive.open(name) as member:
            content = member.read()
    except _DAMAGE as error:
        raise zipfile.BadZipFile(f"{archive.filename}: {error}") from error
    try:
        _check_content(label, content)
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # Damage makes torch.load raise nearly anything; a lack of memory is no fault of the file's.
        if tensors.is_lack_of_memory(error):
            raise
        raise ValueError(f"{label} does not hold what save_state writes: {error}") from error
    pickles.check_repeated(label, value)
    if pickles.tensor_bytes(value) > len(content):
        raise ValueError(f"{label} has {len(content)} bytes, and would need more memory than that")
    return value


def _check_content(label: str, content: bytes) -> None:
    """Raises unless what torch.load does with a member reads nothing but the member and takes no more memory.

    Raises:
        ValueError, zipfile.BadZipFile: no file of torch.save, one that is compressed or would be unpacked further, or
            one whose storages have other sizes than it says.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as records:
        _check_sizes(f"{label} with the record", records, len(content))
        names = records.namelist()
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("it has two records of one name")  # of which torch might read the other
        # torch takes the folder of the first for that of all.
        storages = next(iter(names), "").partition("/")[0] + _STORAGES
        sizes = {
            info.filename.removeprefix(storages): info.file_size
            for info in records.infolist()
            if info.filename.startswith(storages)
        }
        for record in names:
            if record.endswith(_PICKLE):
                pickles.check(records.read(record), sizes)

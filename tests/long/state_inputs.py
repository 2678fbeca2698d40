"""What the fuzzer of state files makes of its bytes: an optimizer, and a state file or state dict for it to load.

The first three bytes of an input choose the optimizer whose state is damaged, the one that loads it, and how the rest
is read: as a file, as one member of a file, as the pickle and the numbers within one member, or as edits of a state
dict, which is loaded itself or from a file. Checksums are made right, so that damage gets past them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.paper_formulas import TABLE
from torch import Tensor
from torch.nn import Parameter

from signadam_ext.optimizers.base import SignOptimizer
from signadam_ext.state.checkpoint import OPTIMIZERS_OWN

#: What loading may raise, by its docstrings.
REFUSALS = (TypeError, ValueError, OSError, zipfile.BadZipFile)

PARAM_STORAGES = ("nearest", "split16", "split8", "master", "stochastic")


@dataclass(frozen=True)
class Form:
    """An optimizer whose state has one of the forms that there are."""

    name: str
    cls: type[SignOptimizer]
    options: dict[str, Any]
    dtype: torch.dtype
    reads_variance: bool = False

    def made(self) -> SignOptimizer:
        """The optimizer before its first step; the same parameters every time, one of them in columns."""
        generator = torch.Generator().manual_seed(5)
        values = [torch.randn(shape, generator=generator).to(self.dtype) for shape in ((5, 3), (33,), (2,))]
        params = [Parameter(values[0].t()), *map(Parameter, values[1:])]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.25, "maximize": True}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.cls(groups, lr=0.1, seed=3, **self.options)

    def step(self, optimizer: SignOptimizer, reads_variance: bool = False) -> None:
        """A step, in which the last parameter takes no part."""
        reads_variance = reads_variance or self.reads_variance
        generator = torch.Generator().manual_seed(9)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.empty_like(param).copy_(torch.randn(param.shape, generator=generator))
            if reads_variance:
                param.grad_variance = torch.full_like(param, 0.5, dtype=torch.float32, requires_grad=False)
        optimizer.step()

    def trained(self) -> SignOptimizer:
        """After two steps, with an entry of a user's and a scheduler's."""
        optimizer = self.made()
        for _ in range(2):
            self.step(optimizer)
        optimizer.param_groups[0]["initial_lr"] = 0.1
        optimizer.state[optimizer.param_groups[0]["params"][0]]["mine"] = {"a": [torch.ones(2), 1.5]}
        return optimizer


def _forms() -> Iterator[Form]:
    for row in TABLE:
        for state_dtype in row.state_dtypes or (None,):
            stored = {} if state_dtype is None else {"state_dtype": state_dtype}
            options = {**row.hyperparameters, **stored}
            yield Form(f"{row.id} {state_dtype}", row.optimizer, options, torch.float32, row.reads_variance)
    for param_storage in PARAM_STORAGES:
        for row in TABLE:
            if row.id in ("sign_adam_pp-adaptive", "adam", "lion"):
                options = {**row.hyperparameters, "param_storage": param_storage, "state_dtype": "bf16"}
                yield Form(f"{row.id} {param_storage}", row.optimizer, options, torch.bfloat16)


FORMS = tuple(_forms())


class Bytes:
    """An input, read from its beginning; behind its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def is_over(self) -> bool:
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def number(self, count: int = 1) -> int:
        return int.from_bytes(self.take(count), "little")

    def choose(self, options: Any) -> Any:
        return options[self.number(1 if len(options) <= 256 else 2) % len(options)]

    def rest(self) -> bytes:
        return self.take(len(self._data))


# Values that no state has


def _circle() -> list[Any]:
    circle: list[Any] = [1]
    circle.append(circle)
    return circle


def _nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32),
    *(torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16),
)
_SHAPES = ((), (1,), (2,), (33,), (3, 5), (5, 3), (0,), (1, 1), (2, 0, 3))
_NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 127.0, -128.0, 2.0**53 + 2, 1e38, math.inf, -math.inf, math.nan)


def _tensor(source: Bytes) -> Tensor:
    dtype, shape, number = source.choose(_DTYPES), source.choose(_SHAPES), source.choose(_NUMBERS)
    return (
        torch.full(shape, number, dtype=torch.float64).nan_to_num(posinf=1e38).to(dtype)
        if not (dtype.is_floating_point or dtype.is_complex)
        else torch.full(shape, number, dtype=torch.float64).to(dtype)
    )


def _wide(source: Bytes) -> Tensor:
    """A tensor of up to 2^60 elements that all lie in one place."""
    return torch.ones((), dtype=source.choose(_DTYPES)).expand(1 << source.number() % 61)


VALUES: tuple[Callable[[Bytes], Any], ...] = (
    lambda source: source.choose((None, True, False, (), [], {}, set(), b"", "", 1j, Ellipsis)),
    lambda source: int.from_bytes(source.take(source.number() % 16), "little", signed=True),
    lambda source: source.choose((-1, 0, 1, 2, 3, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**400)),
    lambda source: source.choose((*_NUMBERS, 5e-324, 1e308, 0.999, 2.5)),
    lambda source: source.choose(("fp32", "int8", "int2", "block8", "a.b", "fixed", "adaptive", "\ud800", "x" * 999)),
    lambda source: source.choose((_circle(), _nested(60), _nested(4000), [[1, 2], [3]], [0.9], (0.9,), (0.9, 0.99))),
    lambda source: source.choose((torch.float32, torch.Size((3, 5)), torch.device("cuda:7"), torch.device("meta"))),
    lambda source: collections.OrderedDict(a=1),
    _tensor,
    _tensor,
    _tensor,
    _wide,
    lambda source: torch.empty(source.choose(_SHAPES), device="meta"),
    lambda source: torch.eye(3).to_sparse(),
    lambda source: torch.eye(3).to_sparse_csr(),
    lambda source: torch._neg_view(torch.ones(source.choose(_SHAPES))),
    lambda source: torch.ones(3, dtype=torch.complex64).conj(),
    lambda source: torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8),
    lambda source: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    lambda source: Parameter(_tensor(source).float()),
    lambda source: torch._efficientzerotensor((3, 5), dtype=source.choose(_DTYPES)),
    lambda source: [VALUES[source.number() % len(VALUES)](source)] * (source.number() % 4),
    lambda source: {"x": VALUES[source.number() % len(VALUES)](source)},
)


def value(source: Bytes) -> Any:
    return source.choose(VALUES)(source)


# Edits


def _places(state_dict: Any) -> list[Any]:
    """Everything in a state dict that has entries."""
    found, open_ = [], [state_dict]
    while open_:
        each = open_.pop()
        if not isinstance(each, (dict, list)) or len(found) > 64 or any(each is other for other in found):
            continue
        found.append(each)
        open_ += each.values() if isinstance(each, dict) else each
    return found


#: Keys that loading looks for, beside those that are there.
KEYS = (
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_avg_var", "param_low"),
    *("master_param", "exp_avg_kind", "exp_avg_levels", "exp_avg_order", "exp_avg_sq_kind", "exp_avg_sq_order"),
    *("ema", "params", "method", "lr", "betas", "beta", "weights", "weight_decay", "seed", "confidence", "state"),
    *("param_groups", "param_names", "state_dtype", "initial_lr", "maximize", "eps", "mine", 0, 1, 2, 3, -1, None),
    *("param_storage", "backend", "capturable", "foreach", "members", "others", (0, "a"), 0.0, ""),
)


def _edited_tensor(source: Bytes, old: Tensor) -> Any:
    """A tensor that is nearly the old one."""
    how = source.number() % 8
    if how == 0:
        return old.to(source.choose(_DTYPES))
    if how == 1:
        return old.reshape(-1)
    if how == 2:
        return old.unsqueeze(0)
    if how == 3:
        return old.t() if old.dim() == 2 else old[:0] if old.dim() else old.expand(2)
    if how == 4 and old.numel():
        new = old.clone()
        flat = new.reshape(-1)
        flat[source.number() % old.numel()] = source.choose(_NUMBERS if old.is_floating_point() else (-128, 127, 1, 64))
        return flat.view(old.shape)
    if how == 5:
        return old.expand(3, *old.shape)
    if how == 6:
        return torch.zeros(2, *old.shape, dtype=old.dtype)[1]
    return old.numpy().tolist() if old.dtype in (torch.float32, torch.int8, torch.float64) else old


def edit(source: Bytes, state_dict: Any) -> None:
    """Changes one entry somewhere in a state dict."""
    places = _places(state_dict)
    place = source.choose(places)
    how = source.number() % 6
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = source.choose(keys) if keys else None
    if how == 0 and keys:
        del place[key]
    elif how == 1 and keys:
        place[key] = value(source)
    elif how == 2:
        if isinstance(place, dict):
            place[source.choose(KEYS)] = value(source)
        else:
            place.append(value(source))
    elif how == 3 and keys:
        if isinstance(place, dict):
            place[source.choose(KEYS)] = place.pop(key)
        else:
            place.append(place[key])
    elif how == 4 and keys and isinstance(place[key], Tensor):
        place[key] = _edited_tensor(source, place[key])
    elif how == 5 and keys:
        other = source.choose(places)
        other_keys = list(other) if isinstance(other, dict) else list(range(len(other)))
        if other_keys:
            place[key] = other[source.choose(other_keys)]


# Files


class Base:
    """A form's state, as a state dict and as a file."""

    def __init__(self, form: Form, folder: Path) -> None:
        optimizer = form.trained()
        self.state_dict = optimizer.state_dict()
        path = folder / "base"
        optimizer.save_state(path)
        self.content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            self.members = {name: archive.read(name) for name in archive.namelist()}


def packed(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these members, its checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return file.getvalue()


def _as_file(state_dict: dict[str, Any]) -> bytes | None:
    """What a state dict would be in a file, whatever is in it; None where torch cannot save that."""
    members, listed = {}, []

    def added(name: str, content: Any) -> None:
        file = io.BytesIO()
        torch.save(content, file)
        members[name] = file.getvalue()

    state = state_dict.get("state", {})
    try:
        for number, entries in state.items():
            for i, (name, content) in enumerate(entries.items()):
                member = f"state/{number}/{i}"
                added(member, content)
                listed.append((member, number, name))
        head = {name: content for name, content in state_dict.items() if name != "state"}
        added("optimizer", {"others": {}, "members": listed, **head})
        return packed(members)
    except Exception:  # of torch.save, or of a state that is no state
        return None


def _raw_file(source: Bytes, base: Base) -> bytes:
    return source.rest()


def _raw_member(source: Bytes, base: Base) -> bytes:
    name = source.choose(list(base.members))
    return packed({**base.members, name: source.rest()})


def _pickle(source: Bytes, base: Base) -> bytes:
    """One member with another pickle in it, other numbers of its first tensor, and possibly compressed."""
    name = source.choose(list(base.members))
    compression = zipfile.ZIP_DEFLATED if source.number() == 255 else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(base.members[name])) as archive:
        records = {each: archive.read(each) for each in archive.namelist()}
    pickle_ = source.take(source.number(2))
    for record in records:
        if record.endswith("/data.pkl"):
            records[record] = pickle_
        elif record.endswith("/data/0") and not source.is_over:
            records[record] = source.rest()
    return packed({**base.members, name: packed(records, compression)})


FILES: tuple[Callable[[Bytes, Base], bytes], ...] = (_raw_file, _raw_member, _pickle)
RAW_FILE, RAW_MEMBER, PICKLE, EDITED_DICT, EDITED_FILE = range(5)


class Finding(Exception):
    """Loading did what it must not."""


class Snapshot:
    """Everything an optimizer holds at one time: which objects, and copies of them."""

    def __init__(self, optimizer: SignOptimizer) -> None:
        self._optimizer = optimizer
        self._objects = self._held()
        self._copies = copy.deepcopy([held for held, _ in self._objects])

    def _held(self) -> list[tuple[Any, Any]]:
        """(a value, what tells its place), in order; a container by its entries."""
        optimizer = self._optimizer
        held: list[tuple[Any, Any]] = [(None, id(optimizer.param_groups))]
        state = vars(optimizer)["state"]
        held.append((None, id(state)))
        for group in optimizer.param_groups:
            held += [(x, name) for name, x in group.items() if name != "params"]
            for param in group["params"]:
                held.append((param.detach(), None))
                held += [(x, (id(x), name)) for name, x in state.get(param, {}).items()]
        return held

    @property
    def is_still_true(self) -> bool:
        now = self._held()
        return [place for _, place in now] == [place for _, place in self._objects] and all(
            equal(a, b) for (a, _), b in zip(now, self._copies, strict=True)
        )


def _shrunk(x: Tensor) -> Tensor:
    """One of the elements that lie in one place."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


def equal(a: Any, b: Any) -> bool:
    """Whether two values of a state are of the same type and have the same bits."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.layout != torch.strided or a.is_meta:
            return a.layout == b.layout and a.device == b.device
        if a.is_quantized:
            return torch.equal(a.int_repr(), b.int_repr())
        a, b = (_shrunk(x.resolve_conj().resolve_neg()) for x in (a, b))
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a is b or a == b


class Target:
    """Loads one input after another.

    Args:
        folder: where files are written.
        watched: what loading happens within.
    """

    def __init__(
        self, folder: Path, watched: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        self._folder = folder
        self._watched = watched
        self._bases: dict[int, Base] = {}
        self._optimizers: dict[int, tuple[SignOptimizer, Snapshot]] = {}
        self.outcomes: collections.Counter[str] = collections.Counter()

    def base(self, index: int) -> Base:
        if index not in self._bases:
            self._bases[index] = Base(FORMS[index], self._folder)
        return self._bases[index]

    def prepared(self, data: bytes) -> tuple[int, Callable[[SignOptimizer], None]] | None:
        """Which form loads, and the loading; None where the input says nothing that could be loaded."""
        source = Bytes(data)
        index = source.number() % len(FORMS)
        base, into, how = self.base(index), source.number(), source.number() % 5
        # Half of them load what they have saved.
        index = index if into >= 128 else into % len(FORMS)
        if how < EDITED_DICT:
            content: bytes | None = FILES[how](source, base)
        else:
            edited = copy.deepcopy(base.state_dict)
            for _ in range(1 + source.number() % 4):
                with contextlib.suppress(Exception):  # a value of an earlier edit that cannot be edited so
                    edit(source, edited)
            if how == EDITED_DICT:
                return index, lambda optimizer: optimizer.load_state_dict(edited)
            content = _as_file(edited)
        if content is None:
            return None
        path = self._folder / "state"
        path.write_bytes(content)
        return index, lambda optimizer: optimizer.load_state(path)

    def __call__(self, data: bytes) -> str:
        """Loads one input; returns what came of it.

        Raises:
            Finding: an exception that no docstring has, a change in spite of a refusal, or a state that is taken and
                with which no step can be taken.
        """
        prepared = self.prepared(data)
        if prepared is None:
            return "nothing to load"
        index, load = prepared
        if index not in self._optimizers:
            optimizer = FORMS[index].trained()
            self._optimizers[index] = optimizer, Snapshot(optimizer)
        optimizer, before = self._optimizers[index]
        try:
            with self._watched():
                load(optimizer)
        except REFUSALS as error:
            outcome = type(error).__name__
            if not before.is_still_true:
                raise Finding(f"refused ({error}), and yet something has changed") from error
        except Exception as error:
            raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
        else:
            outcome = "taken"
            del self._optimizers[index]
            self._check_taken(FORMS[index], optimizer)
            optimizer.load_state_dict(self.base(index).state_dict)
            self._optimizers[index] = optimizer, Snapshot(optimizer)
        self.outcomes[outcome] += 1
        return outcome

    def _check_taken(self, form: Form, optimizer: SignOptimizer) -> None:
        """Raises unless the state can be saved, loaded by another optimizer to the same bits, and be used."""
        try:
            if any(isinstance(key, int) for key in optimizer.state):
                return  # a user's, where a state dict has what it may take for a parameter's
            saved = optimizer.state_dict()
            twin = form.made()
            twin.load_state_dict(saved)
            again = twin.state_dict()
            for number, entries in saved["state"].items():
                if not isinstance(number, int):
                    continue  # of no parameter
                other = again["state"].get(number, {})
                for name in OPTIMIZERS_OWN & entries.keys():
                    if not equal(entries[name], other.get(name)):
                        raise Finding(f"taken, and saved and loaded again {name!r} of parameter {number} is another")
            form.step(optimizer, reads_variance=True)  # which may be a loaded hyperparameter
        except Finding:
            raise
        except Exception as error:
            raise Finding(f"taken, and then {type(error).__name__}: {str(error)[:300]}") from error


def seeds(target: Target) -> Iterator[tuple[str, bytes]]:
    """An undamaged input of every form and kind, by a name."""
    for index, form in enumerate(FORMS):
        yield f"{form.name} edited", bytes((index, 255, EDITED_DICT if index % 2 else EDITED_FILE, 0, 0, 5))
    for index in range(0, len(FORMS), 8):
        form, base = FORMS[index], target.base(index)
        for place, content in enumerate(base.members.values()):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
            pickle_ = records["data.pkl"]
            head = bytes((index, 255, PICKLE, place, 0)) + len(pickle_).to_bytes(2, "little")
            yield f"{form.name} pickle {place}", head + pickle_ + records.get("data/0", b"")
    for index in range(0, len(FORMS), 40):
        base = target.base(index)
        yield f"{FORMS[index].name} file", bytes((index, 255, RAW_FILE)) + base.content
        for place, content in enumerate(base.members.values()):
            yield f"{FORMS[index].name} member {place}", bytes((index, 255, RAW_MEMBER, place)) + content

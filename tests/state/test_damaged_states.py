"""What the fuzzer of states has found: each was no error of a docstring's, or took memory that no file holds."""

from __future__ import annotations

import io
import re
import struct
import zipfile

import pytest
import torch
from torch import Tensor

from signadam_ext import Lion, SignAdamPP, SignSGD
from signadam_ext.optimizers import groups
from signadam_ext.state import pickles


def trained(cls=SignAdamPP, **options):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 40).view(5, 8))
    optimizer = cls([param], lr=0.1, **options)
    param.grad = torch.ones(5, 8)
    optimizer.step()
    return optimizer


def state_of(optimizer):
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def refuses(optimizer, load, error, match):
    """Loading raises exactly that, and changes nothing."""
    groups, state = [dict(group) for group in optimizer.param_groups], dict(state_of(optimizer))
    with pytest.raises(Exception, match=match) as raised:
        load()
    assert raised.type is error
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert state.keys() == state_of(optimizer).keys() and all(state_of(optimizer)[k] is x for k, x in state.items())


def records_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def with_record(name, content):
    """A change of one record of a member."""

    def change(member):
        records = records_of(member)
        (full,) = (each for each in records if each.endswith(f"/{name}"))
        left = {each: x for each, x in records.items() if each != full}
        return packed(left if content is None else {**records, full: content})

    return change


def with_pickle(pickle):
    return with_record("data.pkl", b"\x80\x02" + pickle + b".")


DEEP = b"})" + b"\x85" * 1_000_000 + b"K\x01s"  # a dict with that key: its hash needs the stack of a million calls
DAMAGE = {
    "no zip file": lambda member: b"\x80\x02K\x01.",
    "cut": lambda member: member[: len(member) // 2],
    "compressed": lambda member: packed(records_of(member), zipfile.ZIP_DEFLATED),
    "no version": with_record("version", None),
    "a version of letters": with_record("version", b"x"),
    "no pickle": with_record("data.pkl", None),
    "a pickle that is cut": with_record("data.pkl", b"\x80\x02J\1"),
    "a storage of another size": with_record("data/0", b"\0" * 7),
    "a storage that is larger": with_record("data/0", b"\0" * 164),
    "no storage": with_record("data/0", None),
    "a bytearray of a gigabyte": with_pickle(b"c__builtin__\nbytearray\nJ\0\0\0\x40\x85R"),
    "a tensor of four gigabytes": with_pickle(b"ctorch\nTensor\nJ\0\0\0\x40\x85R"),
    "tuples in tuples": with_pickle(DEEP),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_members_that_torch_did_not_write_are_refused_by_name(damage, tmp_path):
    optimizer, path = trained(), tmp_path / "state"
    optimizer.save_state(path)
    members = records_of(path.read_bytes())
    path.write_bytes(packed({**members, "state/0/exp_avg": damage(members["state/0/exp_avg"])}))
    match = re.escape(f"{path}: member 'state/0/exp_avg'")
    refuses(optimizer, lambda: optimizer.load_state(path), ValueError, match)


def test_a_file_that_claims_more_than_it_has_is_refused_unread(tmp_path):
    optimizer, path = trained(), tmp_path / "state"
    optimizer.save_state(path)
    content = bytearray(path.read_bytes())
    (entry,) = struct.unpack("<I", content[-6:-2])  # where the directory begins, with the head's entry
    content[entry + 20 : entry + 28] = struct.pack("<II", 2_000_000_000, 2_000_000_000)
    path.write_bytes(content)
    refuses(optimizer, lambda: optimizer.load_state(path), zipfile.BadZipFile, "claim 20000.* bytes in a file of")


@pytest.mark.parametrize("how", ["dict", "file"])
def test_elements_that_share_memory_share_it_in_the_copy(how, tmp_path):
    optimizer, other = trained(), trained()
    wide = torch.tensor(3.0).expand(1 << 60)
    windows = torch.arange(9.0).as_strided((8, 2), (1, 1))
    state_of(optimizer)["mine"] = [wide, windows]
    if how == "dict":
        other.load_state_dict(optimizer.state_dict())
    else:
        optimizer.save_state(tmp_path / "state")
        other.load_state(tmp_path / "state")
    ours, theirs = state_of(optimizer)["mine"], state_of(other)["mine"]
    assert theirs[0].shape == wide.shape and theirs[0].untyped_storage().nbytes() == 4 and theirs[0][7] == 3
    assert torch.equal(theirs[1], windows) and theirs[1].stride() == windows.stride()
    for a, b in zip(ours, theirs, strict=True):
        assert a.data_ptr() != b.data_ptr()


def circle():
    found: list = []
    found.append(found)
    return found


def nested(depth):
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def repeated(depth):
    found: list = [1]
    for _ in range(depth):
        found = [found, found, found]
    return found


@pytest.mark.parametrize("value", [circle(), nested(5000), repeated(60)], ids=["circle", "depth", "repetition"])
@pytest.mark.parametrize("where", ["state", "group", "step", "lr"])
def test_containers_without_end_are_refused(value, where):
    optimizer = trained()
    saved = optimizer.state_dict()
    places = {"state": saved["state"][0], "step": saved["state"][0]}
    places.get(where, saved["param_groups"][0])[{"state": "mine", "group": "mine"}.get(where, where)] = value
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(saved)
    assert "mine" not in state_of(optimizer)


def test_tensors_without_elements_are_refused_wherever_they_are():
    optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][0]["mine"] = {"a": [torch.empty(3, device="meta")]}
    match = "state 'mine' of parameter 0 of group 0 holds a tensor on meta"
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), TypeError, match)
    del saved["state"][0]["mine"]
    saved["param_groups"][0]["mine"] = torch.eye(3).to_sparse_csr()
    match = "mine of group 0 of the checkpoint is or holds what cannot be copied"
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), TypeError, match)


def test_what_would_not_be_read_is_not_written(tmp_path):
    optimizer = trained()
    deep: tuple = ()
    for _ in range(600):
        deep = (deep,)
    for value in (bytearray(b"text"), deep):
        state_of(optimizer)["mine"] = [value]
        with pytest.raises(TypeError, match="state 'mine' of parameter number 0 is or holds what no file can keep"):
            optimizer.save_state(tmp_path / "state")


def test_several_numbers_of_levels_are_refused():
    optimizer = trained(state_dtype="int8")
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg_levels"] = torch.tensor([127, 127])
    match = r"exp_avg_levels of state 'exp_avg' of parameter 0 of group 0 is tensor\(\[127, 127\]\): must be 127"
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), ValueError, match)


@pytest.mark.parametrize("cls", [SignSGD, Lion])
def test_a_decay_that_a_rule_has_not_is_refused_when_it_is_loaded(cls):
    optimizer = trained(cls)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["beta"] = 0.9
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), TypeError, "group 0 of the checkpoint: beta=0.9: this")


def test_what_a_user_keeps_is_still_taken(tmp_path):
    """Long pickles, whose depth is counted, and values of any size of their own."""
    optimizer, other = trained(), trained()
    mine = {("a", i, (i, (i,))): [torch.full((2,), float(i)), "text" * i, {i}] for i in range(200)}
    mine["a bytearray"] = nested(300)
    state_of(optimizer)["mine"] = mine
    optimizer.save_state(tmp_path / "state")
    other.load_state(tmp_path / "state")
    assert str(state_of(other)["mine"]) == str(mine)


def test_depths_of_pickles() -> None:
    import pickle

    def depth_of(value: object) -> int:
        return pickles._depth(pickle.dumps(value, protocol=2), {})

    shared = ((1,),)
    assert depth_of(1) == depth_of([[]]) == depth_of({}) == 0
    assert depth_of(()) == 0 and depth_of((1, 2, 3, 4)) == 1 and depth_of(((1, 2), (3, (4, 5, 6)))) == 3
    assert depth_of([shared, (shared, 1)]) == 3, "what is in the memo is as deep as it was"
    assert depth_of((({"a": (1, (2,))},),)) == 2, "a dict has no hash"
    assert depth_of({(1, (2, (3,))): [4]}) == 3
    for broken in (b"\x80\x02\x85.", b"\x80\x02t.", b"\x80\x02s."):
        with pytest.raises(ValueError):
            pickles._depth(broken, {})


def storage(kind: bytes = b"ctorch\nFloatStorage\n", key: bytes = b"X\1\0\0\x000", count: bytes = b"K\5") -> bytes:
    """A pickle of one storage: 5 floats of record 0."""
    return b"\x80\x02(X\7\0\0\0storage" + kind + key + b"X\3\0\0\0cpu" + count + b"tQ."


def test_sizes_of_storages_are_those_of_their_records() -> None:
    for pickle, size in (
        (storage(), 20),
        (storage(b"ctorch\nBFloat16Storage\n"), 10),
        (storage(b"ctorch.storage\nUntypedStorage\n"), 5),
        (storage(count=b"J\0\0\1\0"), 4 * 65536),
        (storage(count=b"K\5q\0" + b"0h\0"), 20),
    ):
        pickles.check(pickle, {"0": size, "1": 3})
        for other in (0, size - 1, size + 1):
            with pytest.raises(ValueError, match=f"storage '0' has {size} bytes, and its record {other}"):
                pickles.check(pickle, {"0": other})
    for pickle, match in (
        (storage(key=b"X\1\0\0\x001"), "it has no record of storage '1'"),
        (storage(key=b"K\0"), "it holds a storage in a way that torch.save does not write"),
        (storage(count=b"\x88"), "it computes the size of storage '0'"),
        (storage(count=b"]"), "it computes the size of storage '0'"),
        (b"\x80\x02K\1Q.", "it holds a storage in a way that torch.save does not write"),
    ):
        with pytest.raises(ValueError, match=match):
            pickles.check(pickle, {"0": 20})


def test_records_that_torch_could_take_for_one_another_are_refused(tmp_path):
    optimizer, path = trained(), tmp_path / "state"
    optimizer.save_state(path)
    members = records_of(path.read_bytes())
    own = records_of(members["state/0/exp_avg"])
    (name,) = (each for each in own if each.endswith("/data/0"))
    twice = packed({**own, name.upper(): own[name]})
    path.write_bytes(packed({**members, "state/0/exp_avg": twice}))
    refuses(optimizer, lambda: optimizer.load_state(path), ValueError, "it has two records of one name")


def test_repeated_containers_are_counted() -> None:
    pickles.check_repeated("it", [list(range(pickles.MOST_REPEATED * 2))])
    pickles.check_repeated("it", repeated(11))
    with pytest.raises(ValueError, match="it has more than 1000000 entries in containers that it repeats"):
        pickles.check_repeated("it", repeated(13))
    shared = (1, 2)
    pickles.check_repeated("it", {shared: [shared, {"a": shared}, shared], "b": {shared}})
    with pytest.raises(ValueError, match="it holds a list that holds itself"):
        pickles.check_repeated("it", {"a": [(1, circle())]})


def test_a_file_of_repeated_containers_is_refused(tmp_path):
    optimizer, path = trained(), tmp_path / "state"
    optimizer.save_state(path)
    members = records_of(path.read_bytes())
    file = io.BytesIO()
    torch.save(repeated(60), file)
    path.write_bytes(packed({**members, "state/0/step": file.getvalue()}))
    match = "member 'state/0/step' has more than 1000000 entries in containers that it repeats"
    refuses(optimizer, lambda: optimizer.load_state(path), ValueError, match)


def test_memory_of_what_a_pickle_has_made() -> None:
    x = torch.ones(8)
    circle_: list = [x, (x[2:], {"a": torch.ones(3, dtype=torch.int8)}), torch.eye(2).to_sparse()]
    circle_.append(circle_)
    assert pickles.tensor_bytes(circle_) == 32 + 3
    assert pickles.tensor_bytes(Tensor.new_empty(x, 0)) == 0


def of_one_another(levels, leaf=1.5):
    """Lists that hold the one below three times: 3^levels leaves, if each were its own."""
    for _ in range(levels):
        leaf = [leaf] * 3
    return leaf


def test_what_is_one_object_in_a_state_stays_one_in_its_copy():
    tensor = torch.ones(2)
    saved = trained().state_dict()
    saved["state"][0]["mine"] = {"a": of_one_another(2, tensor), "b": tensor}
    optimizer = trained()
    optimizer.load_state_dict(saved)
    mine = state_of(optimizer)["mine"]
    (first, *others) = mine["a"]
    assert all(other is first for other in others) and mine["b"] is first[0] is first[2] is not tensor
    assert torch.equal(mine["b"], tensor)


@pytest.mark.parametrize("leaf", [1.5, torch.ones(2)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["lr", "seed", "betas", "method", "exp_avg"])
def test_errors_show_the_beginning_of_nested_values(name, leaf):
    optimizer = trained(Lion)
    saved = optimizer.state_dict()
    (saved["state"][0] if name == "exp_avg" else saved["param_groups"][0])[name] = of_one_another(10, leaf)
    with pytest.raises((TypeError, ValueError)) as raised:
        optimizer.load_state_dict(saved)
    assert "[[[...], [...], [...]]" in str(raised.value) and len(str(raised.value)) < 400


def test_names_of_parameters_are_shown_by_their_beginning():
    """They may be of any type; every plan makes labels of them."""
    group = trained().param_groups[0] | {"param_names": [of_one_another(10, torch.ones(2))]}
    assert groups.label(group, 0, 0).startswith("parameter [[[[...], [...], [...]]")

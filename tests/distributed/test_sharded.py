"""Sharded parameters: the same bits as without sharding, whatever the number of ranks; what cannot be is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from support import sharded
from support.ranks import IS_2_6, Ranks, with_fsdp2

import signadam_ext

BF16 = torch.bfloat16
FORMS = [
    (torch.float32, {}),
    (torch.float32, {"state_dtype": "bf16"}),
    (torch.float32, {"state_dtype": "int8"}),
    (torch.float32, {"state_dtype": "int4"}),
    (torch.float32, {"state_dtype": "int2"}),
    (BF16, {"param_storage": "stochastic"}),
    (BF16, {"param_storage": "stochastic", "state_dtype": "int2"}),
    (BF16, {"param_storage": "split16", "state_dtype": "int4"}),
    (BF16, {"param_storage": "split8", "state_dtype": "int8"}),
    (BF16, {"param_storage": "master", "state_dtype": "bf16"}),
    (torch.float16, {"param_storage": "stochastic", "state_dtype": "int2"}),
]
IDS = ["-".join([str(dtype).removeprefix("torch."), *map(str, options.values())]) for dtype, options in FORMS]


@pytest.mark.parametrize("dtype, options", FORMS, ids=IDS)
def test_every_form_has_the_bits_of_the_whole(ranks, dtype, options):
    assert ranks(2).run(sharded.sharded_as_alone, "SignAdamPP", {"lr": 0.01, **options}, dtype) == [None] * 2


# Thresholds that follow the gradient have tests of their own; the variance of the mini-batch is refused.
RULES = [
    ("SignSGD", {"lr": 0.01}),
    ("Signum", {"lr": 0.01}),
    ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
    ("SignAdam", {"lr": 0.01, "weight_decay": 0.1}),
    ("SignAdam", {"lr": 0.01, "second_moment": "analytic"}),
    ("SignAdamPP", {"lr": 0.01, "alpha": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": False}),
    ("MSGD", {"lr": 0.01}),
    ("SVAG", {"lr": 0.01}),
    ("MSVAG", {"lr": 0.01}),
    ("AdamStar", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
]


def rule_id(rule):
    return "-".join([rule[0], *(f"{name}={value}" for name, value in rule[1].items() if name != "lr")])


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
def test_every_rule_has_the_bits_of_the_whole(ranks, rule):
    name, options = rule
    run = ranks(2).run
    assert run(sharded.sharded_as_alone, name, options) == [None] * 2
    if name != "SignSGD":
        assert run(sharded.sharded_as_alone, name, {**options, "state_dtype": "bf16"}) == [None] * 2
    stored = {**options, "param_storage": "stochastic"}
    assert run(sharded.sharded_as_alone, name, stored, BF16) == [None] * 2


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_number_of_ranks(ranks, count, backend):
    """Uneven parts, and none at all on some ranks."""
    options = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic", "backend": backend}
    assert ranks(count).run(sharded.sharded_as_alone, "SignAdamPP", options, BF16) == [None] * count


@pytest.mark.parametrize(
    "mesh, dims", [((4,), (None,)), ((2, 2), (None, 0)), ((2, 2), (0, None)), ((2, 2), (0, 0))], ids=str
)
def test_meshes_of_two_dimensions(ranks, mesh, dims):
    options = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic"}
    assert ranks(4).run(sharded.sharded_as_alone, "SignAdamPP", options, BF16, mesh, dims) == [None] * 4


@pytest.mark.skipif(IS_2_6, reason="torch 2.6's distribute_tensor makes parts that are not contiguous")
@pytest.mark.parametrize(
    "dims, mesh", [((1,), (2,)), ((1,), (3,)), ((0, 1), (2, 2)), ((1, 0), (2, 2)), ((1, 2), (2, 2))], ids=str
)
def test_shards_on_other_dimensions(ranks, dims, mesh):
    """Uneven parts, parts without elements, and both dimensions at once."""
    count = math.prod(mesh)
    shapes = [shape for shape in ((12, 10), (7, 5), (3, 4), (5, 3, 2), (3, 4, 6)) if len(shape) > max(dims)]
    run = ranks(count).run
    for dtype, options in FORMS:
        arguments = ("SignAdamPP", {"lr": 0.01, **options}, dtype, mesh, dims, 3, shapes)
        assert run(sharded.sharded_as_alone, *arguments) == [None] * count, options
    for name, options, dtype in (
        ("SignAdam", {"lr": 0.01, "state_dtype": ("int4", "bf16"), "backend": "reference"}, torch.float32),
        ("SignAdamPP", {"lr": 0.01}, torch.float32),
        ("SignAdam", {"lr": 0.01, "param_storage": "split16"}, BF16),
        ("Lion", {"lr": 0.01, "param_storage": "master"}, BF16),
    ):
        arguments = (name, options, dtype, mesh, dims, 3, shapes)
        assert run(sharded.sharded_as_alone, *arguments) == [None] * count


@with_fsdp2
@pytest.mark.parametrize("mesh", [(), (2, 2)], ids=["sharded", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_fsdp2(ranks, dtype, mesh):
    options = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic"}
    assert ranks(4).run(sharded.fsdp_as_alone, "SignAdamPP", options, dtype, mesh) == [None] * 4


#: Modifiers of a step, whose factors are those of whole tensors. A share of entries is a sum of ones, in any order.
MODIFIED = {
    "cautious decay": ("AdamW", {"weight_decay_kind": "cautious", "lr_scale": "shape"}),
    "exact caution": ("AdamW", {"caution": "exact", "weight_decay_kind": "coupled"}),
    "delayed caution": ("Lion", {"caution": "delayed", "weight_decay": 0.1}),
    "few bits": ("SignAdamPP", {"caution": "exact", "state_dtype": "int2", "backend": "reference"}),
}


def test_averages_of_schedule_free(ranks):
    options = {"lr": 0.01, "weight_decay": 0.1, "param_storage": "split16"}
    assert ranks(3).run(sharded.averages_as_alone, "ScheduleFreeAdamW", options, BF16) == [None] * 3


@with_fsdp2
def test_frozen_matrices(ranks):
    assert ranks(2).run(sharded.frozen_as_alone, {"lr": 0.01, "beta": 0.25, "weight_decay": 0.1}) == [None] * 2


@pytest.mark.parametrize("modifier", MODIFIED)
def test_modifiers_of_whole_tensors(ranks, modifier):
    name, options = MODIFIED[modifier]
    assert ranks(3).run(sharded.sharded_as_alone, name, {"lr": 0.01, **options}) == [None] * 3


@with_fsdp2
def test_fsdp2_with_clipped_gradients(ranks):
    assert ranks(2).run(sharded.fsdp_as_alone, "SignAdam", {"lr": 0.01}, torch.float32, (), 0.1) == [None] * 2


@with_fsdp2
@pytest.mark.parametrize("accumulates", [False, True], ids=["", "accumulated"])
def test_gradients_released_in_fsdp2s_backward(ranks, accumulates):
    options = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic"}
    assert ranks(2).run(sharded.released_as_not, "SignAdamPP", options, BF16, accumulates) == [None] * 2


@with_fsdp2
def test_fsdp2_compiled(ranks):
    arguments = ("SignAdamPP", {"lr": 0.01}, torch.float32, (), None, 2, True)
    assert ranks(2).run(sharded.fsdp_as_alone, *arguments) == [None] * 2


@pytest.mark.parametrize(
    "kind",
    [
        "partial",
        "partial on a copy",
        "shard on a copy",
        "other dimension",
        "other strides",
        "still under way",
        "under way here",
    ],
)
def test_gradients_that_are_spread_otherwise(ranks, kind):
    assert ranks(2).run(sharded.odd_gradients, kind) == [None] * 2


@pytest.mark.parametrize(
    "kind, words",
    [
        ("variance", r"TypeError: parameter 0 of group 0 .*use moving averages"),
        ("samples", r"ValueError: .*has DTensors as parameters"),
        ("summands", r"TypeError: parameter 0 of group 0 .*redistribute it"),
        ("pieces", r"TypeError: parameter 0 of group 0 .*pieces that lie apart: redistribute it"),
        ("three cuts", r"TypeError: parameter 0 of group 0 .*three dimensions behind the first; redistribute it"),
        ("plain gradient", r"TypeError: the gradient of parameter 0 of group 0 is a plain tensor: must be a DTensor"),
        ("gradient elsewhere", r"ValueError: the gradient of parameter 0 .*over another mesh"),
        ("columns", r"ValueError: parameter 0 of group 0 .*must be contiguous"),
        ("accumulated release", r"RuntimeError: parameter 0 of group 0 is a DTensor.*set_requires_gradient_sync"),
        ("state file", r"TypeError: parameter 0 of group 0 is a DTensor.*torch.distributed.checkpoint"),
    ],
)
def test_what_cannot_be_is_refused_by_name(ranks, kind, words):
    for error in ranks(2).run(sharded.error_of, kind):
        assert re.match(words, error), error


def test_the_reader_in_python_takes_parts_as_the_compiled_one_does(ranks):
    options = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic"}
    assert ranks(2).run(sharded.by_python_reader, "SignAdamPP", options, BF16) == [None] * 2


@with_fsdp2
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int2"}], ids=["fp32", "int2"])
def test_fsdp2_with_tensor_parallelism(ranks, options):
    """Rows that two dimensions of the mesh cut, the first of them strided, lie side by side on each rank."""
    assert ranks(4).run(sharded.tensor_parallel_as_alone, "SignAdamPP", {"lr": 0.01, **options}) == [None] * 4


@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_the_first_fsdp(ranks, original):
    run = ranks(2).run
    assert run(sharded.first_fsdp, "fixed", original) == [None] * 2
    for confidence in ("adaptive", "adaptive_delayed"):
        for error in run(sharded.first_fsdp, confidence, original):
            assert re.match(r"parameter .*FullyShardedDataParallel.*take confidence='fixed'", error), error


@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_checkpoints_of_the_first_fsdp(ranks, original):
    """Its own state dicts take one dtype beside the number of steps; and codes only where parameters keep their names.

    docs/scaling.md says so.
    """
    served = [({}, torch.float32), ({"state_dtype": "bf16"}, torch.float32)]
    codes = [({"state_dtype": "int2"}, torch.float32), ({"state_dtype": "int8", "param_storage": "stochastic"}, BF16)]
    for options, dtype in served + codes * original:
        assert ranks(2).run(sharded.first_fsdp_resumed, options, dtype, original) == [None] * 2
    for options, dtype in codes * (not original):
        for error in ranks(2).run(sharded.first_fsdp_resumed, options, dtype, original):
            assert error == "ValueError: Cannot flatten integer dtype tensors"


THRESHOLDS = {
    "adaptive": {"confidence": "adaptive", "alpha": 0.5},
    "adaptive_delayed": {"confidence": "adaptive_delayed", "alpha": 0.5},
    "sparsity": {"confidence": "sparsity", "target": 0.3},
    "rms": {"lr_scale": "rms"},
    "coupled": {"confidence": "adaptive", "weight_decay": 0.1, "decoupled_weight_decay": False},
    "norm": {"method": "MARSAdamW", "max_norm": 1.0, "weight_decay": 0.1, "decoupled_weight_decay": False},
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_thresholds_follow_the_whole_gradient(ranks, options, backend):
    """Ranks agree to the bit; with the unsharded run up to rounding, in double, and so do its parameters here."""
    for count, mesh, dims in ((2, (), (0,)), (3, (), (0,)), (4, (2, 2), (None, 0)), (4, (2, 2), (1, 0))):
        for threshold, param in ranks(count).run(
            sharded.agreed_thresholds, {**options, "backend": backend}, torch.float32, mesh, dims
        ):
            assert threshold < 1e-13 and param == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_are_clipped_by_the_norm_of_the_whole(ranks, backend):
    """And all ranks skip a step together. Signs do not feel the last bit of the factor, AdamW hardly."""
    for count, mesh, dims in ((2, (), (0,)), (4, (2, 2), (None, 0)), (4, (2, 2), (1, 0))):
        for name in ("Signum", "AdamW"):
            options = {"lr": 2.0**-6, "backend": backend}
            for norm, param in ranks(count).run(sharded.clipped_as_alone, name, options, mesh, dims):
                assert norm < 1e-13 and param <= (0 if name == "Signum" else 2.0**-6 * 2**-20)


def test_thresholds_with_weights_that_are_split(ranks):
    options = {**THRESHOLDS["coupled"], "param_storage": "split16"}
    for threshold, param in ranks(2).run(sharded.agreed_thresholds, options, BF16):
        assert threshold < 1e-13 and param == 0


@with_fsdp2
@pytest.mark.parametrize("policy", ["mixed precision", "offload"])
def test_policies_of_fsdp2(ranks, policy):
    options = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic"}
    arguments = ("SignAdamPP", options, torch.float32, (), None, 3, False, policy)
    assert ranks(2).run(sharded.fsdp_as_alone, *arguments) == [None] * 2


@pytest.mark.parametrize("accumulates", [False, True], ids=["", "accumulated"])
def test_data_parallel(ranks, accumulates):
    assert ranks(2).run(sharded.data_parallel, {"state_dtype": "int2"}, accumulates) == [None] * 2


@pytest.mark.parametrize("name", ["SignAdamPP", "Signum"])
def test_redundancy_free_optimizer(ranks, name):
    """In fp32: in fewer bits it draws other random bits, since each rank's optimizer numbers parameters anew."""
    assert ranks(2).run(sharded.redundancy_free, name) == [None] * 2


@pytest.mark.parametrize(
    "kind, words",
    [
        ("lr", "lr of group 0 is 0.01 on rank 0; 0.02 on rank 1."),
        ("alpha", "alpha of group 0 is 0.1 on rank 0; 0.2 on rank 1."),
        ("seed", "seed of group 0 is 3 on rank 0; 4 on rank 1."),
        ("order", "parameter 0 of group 0 is (8, 3), torch.float32, (Shard(dim=0),) on rank 0; (8, 2), torch.float32"),
        ("number", "the number of sharded parameters of group 0 is 3 on rank 0; 2 on rank 1."),
        ("class", "the optimizer is SignAdamPP on rank 0; SignSGD on rank 1."),
        ("version", f"the version of signadam_ext is {signadam_ext.__version__} on rank 0; 0.0.1 on rank 1."),
        ("none", "no error"),
    ],
)
def test_ranks_that_differ_are_found_at_the_first_step(ranks, kind, words):
    for error in ranks(2).run(sharded.error_of_ranks, kind):
        assert words in error, error


def test_ranks_that_differ_are_found_by_those_that_share_no_row_with_them(ranks):
    for error in ranks(4).run(sharded.error_of_ranks, "seed", (2, 2)):
        assert "seed of group 0 is 3 on ranks 0, 2, 3; 4 on rank 1." in error, error


def test_ranks_of_two_meshes_all_find_what_differs(ranks):
    """Those that find it in their row have taken part in the comparison of the whole mesh, for which others wait."""
    errors = ranks(4).run(sharded.error_of_ranks, "two meshes", (2, 2))
    row, whole = "seed of group 0 is 3 on rank 0; 4 on rank 1.", "seed of group 0 is 3 on ranks 0, 2, 3; 4 on rank 1."
    for error, words in zip(errors, (row, row, whole, whole), strict=True):
        assert words in error, error


def test_a_step_beside_frozen_dtensors_and_a_parameter_without_dimensions(ranks):
    assert ranks(2).run(sharded.step_beside_others) == [None] * 2


@pytest.mark.parametrize("by_python", (False, True))
def test_a_parameter_whose_part_is_still_under_way(ranks, by_python):
    assert ranks(2).run(sharded.under_way, by_python) == [None] * 2


@pytest.mark.thorough
def test_triton_interpreted(tmp_path):
    """Launches that are no operations of a commit: thresholds are agreed on before all of them, and parts that are one
    run and those that are several are launches of their own."""
    pytest.importorskip("triton")
    interpreted = Ranks(2, tmp_path, TRITON_INTERPRET="1")
    options = {"lr": 0.01, "backend": "triton", "param_storage": "stochastic", "state_dtype": "int2"}
    try:
        for dims in ((0,), (1,)):
            shapes = ((7, 5), (3, 1), (2, 3))
            arguments = ("SignAdamPP", options, BF16, (), dims, 2, shapes)
            assert interpreted.run(sharded.sharded_as_alone, *arguments) == [None] * 2
        for name, dims in (("adaptive", (0,)), ("adaptive_delayed", (1,))):
            own = {**THRESHOLDS[name], "backend": "triton"}
            for threshold, param in interpreted.run(sharded.agreed_thresholds, own, torch.float32, (), dims):
                assert threshold < 1e-13 and param == 0
    finally:
        interpreted.stop()

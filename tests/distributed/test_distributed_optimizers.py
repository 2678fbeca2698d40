"""Optimizers whose workers vote on the update, against the definition and between processes."""

import copy

import pytest
import torch
from support import voting

from signadam_ext.distributed import DistributedLion, DistributedSignAdamPP, DistributedSignum

CASES = [
    ("DistributedLion", {"lr": 0.01}),
    ("DistributedLion", {"lr": 0.01, "vote": "mean", "weight_decay": 0.3, "maximize": True}),
    ("DistributedSignum", {"lr": 0.01, "beta": 0.8}),
    ("DistributedSignAdamPP", {"lr": 0.01, "alpha": 0.02}),
    ("DistributedSignAdamPP", {"lr": 0.01, "vote": "mean", "nonfinite": "abstain"}),
]


@pytest.mark.parametrize("workers", (2, 3, pytest.param(4, marks=pytest.mark.thorough)))
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_parameters_go_where_the_definition_takes_them(ranks, workers, name, options):
    assert ranks(workers).run(voting.distributed_steps, name, options) == [[]] * workers


@pytest.mark.parametrize("nonfinite", ("propagate", "abstain"))
def test_a_gradient_that_is_not_finite_on_one_worker_is_decided_alike_by_all(ranks, nonfinite):
    options = {"lr": 0.01, "nonfinite": nonfinite, "vote": "mean"}
    assert ranks(3).run(voting.distributed_steps, "DistributedLion", options, torch.float32, True) == [[]] * 3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_parameters_of_16_bits(ranks, dtype):
    assert ranks(2).run(voting.distributed_steps, "DistributedLion", {"lr": 0.01}, dtype) == [[]] * 2


def test_the_reference_backend(ranks):
    options = {"lr": 0.01, "alpha": 0.02}
    arguments = ("DistributedSignAdamPP", options, torch.float32, False, "reference")
    assert ranks(2).run(voting.distributed_steps, *arguments) == [[]] * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DistributedLion", {"lr": 1e-3, "param_storage": "stochastic", "seed": 5}),
        ("DistributedSignAdamPP", {"lr": 1e-3, "vote": "mean", "param_storage": "stochastic"}),
    ],
)
def test_parameters_stay_equal_on_all_workers_over_hundreds_of_steps(ranks, name, options):
    for equal, first, last in ranks(3).run(voting.stays_equal, name, options, 300):
        assert equal and last < first / 10


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", ("DistributedLion", "DistributedSignAdamPP"))
def test_autograd_notices_that_a_step_has_written(ranks, name, backend):
    assert ranks(2).run(voting.notices_a_step, name, backend) == [True, True]


def test_a_first_step_in_inference_mode_leaves_state_for_later_ones(ranks):
    assert ranks(2).run(voting.steps_in_inference_mode, "DistributedLion") == [True, True]


@pytest.mark.parametrize("name", ("DistributedLion", "DistributedSignum", "DistributedSignAdamPP"))
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(ranks, name):
    options = {"lr": 0.01, "param_storage": "stochastic"}
    assert ranks(2).run(voting.resumes, name, options) == [True, True]


def test_ranks_that_differ_are_found_at_the_first_step(ranks):
    for error in ranks(2).run(voting.first_step_error, "DistributedLion", [{"lr": 0.1}, {"lr": 0.2}]):
        assert "ranks do not have the same DistributedLion: lr of group 0 is 0.1 on rank 0; 0.2 on rank 1" in error
    for error in ranks(2).run(voting.first_step_error, "DistributedLion", [{"seed": 1}, {"seed": 2}]):
        assert "seed of group 0 is 1 on rank 0; 2 on rank 1" in error
    for error in ranks(2).run(voting.first_step_error, "DistributedSignum", [{}, {}], 0.5):
        assert "the sum of the bits of parameter 2 of group 0 is" in error


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistributedLion([parameter(3)], betas=(0.9,)), "betas"),
        (lambda: DistributedSignum([parameter(3)], beta=1.0), "beta=1.0"),
        (lambda: DistributedSignAdamPP([parameter(3)], alpha=-0.1), "alpha=-0.1"),
        (lambda: DistributedLion([parameter(3)], vote="maj"), "vote='maj'"),
        (lambda: DistributedLion([parameter(3)], param_storage="split16"), "param_storage='split16'"),
        (lambda: DistributedLion([parameter(3, dtype=torch.float64)]), "float64"),
        (
            lambda: DistributedLion([{"params": [parameter(3)]}, {"params": [parameter(3)], "vote": "mean"}]),
            "groups vote together",
        ),
        (lambda: DistributedLion([torch.zeros(4, 4)[:, :2].requires_grad_()]), "gaps"),
    ],
)
def test_what_cannot_be_served_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_gradient_scaler_is_refused(ranks):
    optimizer = DistributedLion([parameter(3)])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="takes no step for a GradScaler"):
        scaler.step(optimizer)


def test_copies_keep_state_and_hyperparameters():
    optimizer = DistributedSignum([parameter(3)], lr=0.25)
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["lr"] == 0.25 and twin.state_dict()["state"] == optimizer.state_dict()["state"]


def test_a_parameter_that_is_laid_out_anew_keeps_its_momentum(ranks):
    assert ranks(2).run(voting.laid_out_anew) == [True, True]


def test_a_compiled_function_breaks_its_graph_at_a_step(ranks):
    assert ranks(2).run(voting.compiled) == [True, True]


def test_memory_orders_that_differ_are_found(ranks):
    for error in ranks(2).run(voting.other_memory_order):
        assert "memory order 0 on rank 0; " in error and "memory order 1" in error


def test_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    optimizer = DistributedLion([parameter(3)], lr=0.25)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    for state in ({}, {"exp_avg": torch.zeros(1), "step": torch.tensor(1.0)}, {"exp_avg": torch.zeros(3)}):
        saved = {**DistributedLion([parameter(3)], lr=0.5).state_dict(), "state": {0: state}}
        with pytest.raises((TypeError, ValueError)):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.25 and not optimizer.state


def test_how_workers_vote_is_loaded_with_the_groups(ranks):
    assert ranks(2).run(voting.loads_vote) == [0.5, 0.5]


def test_parameters_are_rounded_by_the_bits_of_seed_number_step_and_element(ranks):
    for equal, values in ranks(2).run(voting.rounded_at_random):
        assert equal and values > 1

"""Votes between processes, against the definition applied to the gradients of all workers."""

import re

import pytest
import torch
from support import voting
from support.ranks import with_fsdp2

from signadam_ext.distributed import VoteHook

HOOKS = [
    {},
    {"alpha": 0.02},
    {"vote": "mean", "alpha": 0.02},
    {"momentum": 0.9},
    {"error_feedback": True, "vote": "mean"},
    {"momentum": 0.5, "error_feedback": True, "alpha": 0.01},
    {"alpha": 0.5, "confidence": "adaptive"},
    {"alpha": 0.5, "confidence": "adaptive", "threshold": "agreed", "confidence_beta": 0.5, "momentum": 0.9},
    {"nonfinite": "abstain", "vote": "mean"},
]


@pytest.mark.parametrize("workers", (2, 3, pytest.param(4, marks=pytest.mark.thorough)))
@pytest.mark.parametrize("options", HOOKS, ids=str)
def test_ddp_gets_the_result_of_the_vote(ranks, workers, options):
    assert ranks(workers).run(voting.ddp_votes, options) == [[]] * workers


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gradients_of_16_bits(ranks, dtype):
    assert ranks(2).run(voting.ddp_votes, {"vote": "mean", "momentum": 0.9}, dtype) == [[]] * 2


def test_gradients_that_are_no_views_of_buckets(ranks):
    assert ranks(2).run(voting.ddp_votes, {}, torch.float32, 2, False, False) == [[]] * 2


@pytest.mark.parametrize("nonfinite", ("propagate", "abstain"))
def test_a_gradient_that_is_not_finite_on_one_worker_is_decided_alike_by_all(ranks, nonfinite):
    options = {"nonfinite": nonfinite, "momentum": 0.9, "error_feedback": True}
    assert ranks(3).run(voting.ddp_votes, options, torch.float32, 3, True) == [[]] * 3


def test_one_worker_votes_with_itself(ranks):
    assert ranks(1).run(voting.ddp_votes, {"alpha": 0.01}) == [[]]


def test_a_resumed_hook_goes_on_as_the_first_would(ranks):
    options = {"momentum": 0.9, "error_feedback": True, "alpha": 0.3, "confidence": "adaptive"}
    assert ranks(2).run(voting.resumed, options) == [True, True]


def test_backward_goes_on_during_a_vote(ranks):
    for went_on, buckets in ranks(2).run(voting.overlaps):
        assert went_on and buckets > 1


def test_a_backend_without_all_to_all_gathers_whole_votes(ranks):
    assert ranks(3).run(voting.without_all_to_all, {"alpha": 0.01}) == [[]] * 3


def test_options_that_differ_are_found_on_all_ranks(ranks):
    for error in ranks(3).run(voting.error_of, [{"alpha": 0.1}, {"alpha": 0.1}, {"alpha": 0.2}]):
        assert "ranks do not have the same VoteHook: alpha is 0.1 on ranks 0, 1; 0.2 on rank 2" in error


@with_fsdp2
@pytest.mark.parametrize("options", ({}, {"vote": "mean", "alpha": 0.02}), ids=str)
def test_fsdp2_gets_its_part_of_the_result(ranks, options):
    assert ranks(2).run(voting.fsdp_votes, options) == [[]] * 2
    assert ranks(3).run(voting.fsdp_votes, options) == [[]] * 3


@with_fsdp2
def test_replicas_of_shards_vote(ranks):
    assert ranks(4).run(voting.fsdp_votes, {"alpha": 0.02}, True) == [[]] * 4


def test_a_worker_that_does_not_come_is_a_timeout(ranks):
    came, stayed_away = ranks(2).run(voting.stays_away, 3.0)
    assert re.search(r"[Tt]imed out|timeout", came), came
    assert stayed_away == "stayed away"


def test_gradients_that_no_kernel_reads_are_named(ranks):
    for error in ranks(2).run(voting.of_dtype, torch.float64):
        assert "a vote is on float32, bfloat16 or float16 gradients: got torch.float64" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vote": "mayority"}, "did you mean 'majority'"),
        ({"alpha": -1}, "alpha=-1"),
        ({"momentum": 1}, r"momentum=1: must be in \[0, 1\)"),
        ({"threshold": "agreed"}, "belongs to confidence='adaptive'"),
        ({"error_feedback": 1}, "error_feedback=1: must be True or False"),
        ({"nonfinite": "zero"}, "nonfinite='zero'"),
        ({"backend": "gpu"}, "backend='gpu'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        VoteHook(**options)


def test_a_state_that_a_hook_cannot_take_is_refused():
    hook = VoteHook(momentum=0.9)
    for state in ({}, {"votes": 1}, {"votes": [1]}, {"votes": [{"momentum": 1}]}):
        with pytest.raises(TypeError, match="no list 'votes'"):
            hook.load_state_dict(state)


def test_loading_what_was_saved_before_the_first_vote_forgets(ranks):
    assert ranks(2).run(voting.forgets) == [True, True]


@with_fsdp2
def test_a_sum_in_fsdp2_is_refused(ranks):
    for error in ranks(2).run(voting.sum_in_fsdp):
        assert "FSDP2 adds up and then divides" in error

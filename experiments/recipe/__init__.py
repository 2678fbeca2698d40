"""Which rule with at most one moment ends where AdamW ends: `python -m experiments.recipe`, on one thread.

Stage 1, the search. AdamW is torch's, betas 0.9 and 0.95. For every candidate alike: the byte-level GPT of
examples/gpt.py at 0.66M parameters on the standard library's sources, batches of 8 x 128 bytes, decoupled weight decay
0.1, gradients clipped to a global norm of 1 by `clip_grad_norm_`, a tenth of linear warm-up and a cosine to a tenth of
the learning rate; the initial weights, batches and validation windows of a seed.

A candidate is a rule with no or some changes: cautious decay, caution with the last step's share, a learning rate in
proportion to each tensor's root mean square, another beta. Not every product of them is run. Three rungs, of 300, 700
and 2,000 steps, each with the whole schedule scaled to its length: a run that was cut off would be judged at a learning
rate at which nobody stops, and small differences show only once the rate has come down.

1. The rules as they are, and then each change alone for the best of them.
2. The best candidates, at most two of one rule, and for the best rules all changes together that helped alone.
3. The best of these, at most two of one rule.

AdamW is in every rung. Ano and LaProp keep two moments: they are companions of comparison in the first rung, where they
neither take another's place nor go on. The learning rate is searched anew for each candidate in each rung among 1, 2, 3
and 6 times powers of ten, with the first seed, until both neighbours of the best rate were tried; the second seed runs
at the best rate alone, so only its loss is free of that choice. Candidates go on by the mean over both.

All of that is in a plan, which is written before the first run, with a budget in minutes of one core and what a timed
run says of the cost: `results/recipe/plan.json`. Without it, or when it says something else than this program, nothing
is run. When the budget is spent, nothing more is begun. The seeds of this stage enter no later one: a proof of what it
finds needs others, since the best of many looks better than it is.

Stage 2, the proof, begins when stage 1 has come to its end, and has a plan and a budget of its own, `proof_plan.json`:
the best three and AdamW at their rates, with ten fresh seeds; the best of them with its moment in few bits beside
weights in bf16; both it and AdamW on another text, the pages of Debian's package manpages-dev; all four on a model four
times as large.

Every finished run is one JSON file in `--runs`, as in `experiments.convergence`, whose `Problem`, `Job` and `train` it
shares; a run that was killed is begun again. Of the modules here `candidates` says what is compared, `halving` what is
run and what goes on, `proof` what is run of it afterwards; `summary`, `proof_summary` and `figures` show what came of
it.

python -m experiments.recipe --plan        write the plan of the stage to come
python -m experiments.recipe               run what is missing, then collect
python -m experiments.recipe --list        how many runs, how many minutes
python -m experiments.recipe --collect     JSON, page and picture from the runs so far
python -m experiments.recipe --quick       everything once in small, a few seconds: a test of this program
"""

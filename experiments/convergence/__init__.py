"""How well each optimizer trains: `python -m experiments.convergence`, on one thread per run.

Three problems. "gpt": a byte-level GPT of 3.1M parameters (examples/gpt.py) on the standard library's sources, 150
steps of 8 x 128 bytes. "gpt_long": the same for 1,200 steps. "digits": a small CNN on scikit-learn's digits, 12 epochs;
each seed draws its own split.

What is equal for every method: the initial weights, the batches and the validation windows of a seed; the number of
seeds; the schedule (a tenth of linear warm-up, then a cosine to 0); the decoupled weight decay; on the GPT, gradients
clipped to a global norm of 1; the search for a learning rate among 1, 2, 3 and 6 times powers of ten, with a seed of
its own that enters no result, until both neighbours of the best rate were tried.

What differs, one axis at a time: the rule, in fp32; AdamW's beta2; `alpha` and `beta` of SignAdamPP; the dtype of its
state, over bf16 weights rounded stochastically; the form of the weights, over 2-bit state; and each of these two alone.
On "gpt_long", AdamW, Lion, Signum, SignAdamPP and its 2-bit form; a search begins at three rates around the best of
"gpt".

The model computes in fp32 whatever its weights are stored in: bf16 weights are cast up for each forward pass, so their
gradients arrive rounded to bf16. Rounding keeps a gradient's sign, and with `alpha = 0` SignAdamPP reads nothing else.

Every finished run is one JSON file in `--runs`, named by what distinguishes it and written whole or not at all; what is
there with the very configuration is not run again. So the program may be killed, stopped and started at will, also
several times at once, and loses only the runs in progress. `--collect` makes of them the files in
experiments/results/convergence, and keeps the runs themselves there in runs.tar.gz, from which a fresh clone goes on.

Of its modules `methods` says what is compared, `training` on what and makes one run, `search` finds learning rates and
says which runs are missing, `summary` and `figures` show what came of them.

python -m experiments.convergence                      run what is missing, then collect
python -m experiments.convergence --workers 2          two processes of one thread each
python -m experiments.convergence --list               how many runs, how many hours
python -m experiments.convergence --collect            JSON, tables and figures from the runs so far
python -m experiments.convergence --quick              everything once in small, under a minute: a test of this program
"""

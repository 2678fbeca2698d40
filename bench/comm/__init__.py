"""What gradients cost on the wire, and what votes in their place do to training: `python -m bench.comm`.

Bytes and times. Real processes train a GPT under DDP on gloo, each in a network namespace of its own, joined by a
bridge: what an interface sends is what a worker sends, headers and acknowledgements included. Packets have the size
that Ethernet gives them. `tc` shapes each worker's link for the times. Where namespaces are not allowed, the bytes of
the loopback interface are divided by the number of workers, and times are not shaped. What no machine here can show
(100 Gbit/s, 64 and 1,024 workers, 1 and 7 billion parameters) is a formula's, and labelled so.

Training. Workers are simulated in one process, whose votes the package's own kernels cast, count and read: the
example's GPT of the preset "tiny", 2,000 steps, 4 workers. Every method has its learning rate searched among 1, 2, 3
and 6 times powers of ten, with a seed of its own that enters no result, until both neighbours of the best were tried.
Then 5 workers, of which 1 or 2 send the opposite.

Every finished training is one JSON file in `--runs`: the program may be stopped and started at will, and goes on. They
are kept in bench/results/comm/runs.tar.gz.

Of its modules `formulas` says how many bytes there should be, `wire`, `network` and `worker` count them, `methods`,
`training` and `plan` train, `pages` and `figures` show what came of it.

python -m bench.comm                        all of it, then collect
python -m bench.comm --list                 how many runs, how many hours
python -m bench.comm --wire                 bytes and times alone: minutes
python -m bench.comm --convergence          trainings alone: under an hour of one core
python -m bench.comm --collect              JSON and pictures from the runs so far
python -m bench.comm --plot                 the pictures alone, from the JSON
python -m bench.comm --quick                everything once in small: a test of this program
"""

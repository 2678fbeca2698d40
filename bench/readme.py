"""The tables of the README, which a visitor reads first."""

import json

from bench.committed import EXPERIMENTS, RESULTS, TRAININGS, cell, large_model_log, training, without_gpu
from experiments.convergence.methods import ADAMW, FEW_BITS, PLUS
from experiments.recipe.proof_summary import is_lowest
from reporting import present


def _bytes(optimizer: str, state: str, weights: str = "", gradients: str = "all", source: str = "ours") -> present.Row:
    """Measured bytes per parameter of a configuration with bf16 parameters, on the model of many tensors."""
    wanted = {"optimizer": optimizer, "state": state, "weights": weights, "gradients": gradients, "source": source}
    wanted |= {"param": "bf16", "model": "gpt"}
    rows = [row for row in without_gpu(RESULTS / "memory")["rows"] if "per_parameter" in row]
    own: present.Row = next(row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return own["per_parameter"]


MIXED = ("AdamW", "fp32 masters and moments", "", "all", "torch")
FEW = ("SignAdamPP", "int2", "stochastic")


def _speed(optimizer: str, shapes: str, dtype: str) -> present.Row:
    row = present.find(without_gpu(RESULTS), optimizer=optimizer, backend="cpu", shapes=shapes, dtype=dtype)
    assert row is not None, (optimizer, shapes, dtype)
    return row


def _trained(name: str) -> str:
    """What was trained for how long, in the words of a row."""
    report = training(name)
    size, spec = report["parameters"], report["problem"]
    model = f"CNN of {size / 1e3:.0f}k on digits" if name == "digits" else f"GPT of {size / 1e6:.1f}M"
    return f"{model}, {spec['steps']:,} steps, {spec['seeds']} seeds"


def _adamw(name: str) -> present.Row:
    """The losses of AdamW; where it was run with two betas, those of the better."""
    methods = training(name)["methods"]
    losses = [method["loss"] for key, method in methods.items() if key.startswith(ADAMW)]
    return min(losses, key=lambda loss: float(loss["mean"]))


def glance() -> str:
    """What a visitor compares first: both methods, like with like."""
    ours, theirs = _bytes(*FEW), _bytes(*MIXED)
    step = _speed("SignAdamPP", "GPT-2 small", "float32")["to_adamw"]["median"]
    few = _speed("SignAdamPP int2 stochastic", "GPT-2 small", "bfloat16")["to_adamw"]["median"]
    names = ("SignAdamPP", "AdamW fused")
    whole, own = (
        {row["optimizer"]: row[what]["median"] for row in without_gpu(RESULTS)["whole_steps"]}
        for what in ("seconds", "optimizer_seconds")
    )
    lines = [
        [
            "bytes per parameter between steps, bf16 weights; left 2-bit momentum, right fp32 masters and moments",
            *(f"{x['resident']:.2f}" for x in (ours, theirs)),
        ],
        ["the same with all gradients, in bf16", *(f"{x['resident'] + x['gradients']:.2f}" for x in (ours, theirs))],
        ["speed of an optimizer step, GPT-2 small, fp32", f"{step:.2f}x", "1x (torch, fused)"],
        ["the same, left with 2-bit momentum and bf16 weights", f"{few:.2f}x", "1x (torch, fused)"],
        [
            "training step of the example, unclipped, fp32 (of it the optimizer)",
            *(f"{present.duration(whole[name])} ({present.duration(own[name])})" for name in names),
        ],
    ]
    for name in ("gpt", "gpt_long"):
        methods = training(name)["methods"]
        losses = [present.plus_minus(loss, digits=3) for loss in (methods[FEW_BITS]["loss"], _adamw(name))]
        lines.append([f"validation loss, {_trained(name)}; left 2 bits, right fp32", *losses])
    return present.markdown(["", "SignAdamPP", "AdamW"], lines)


def quality() -> str:
    """Three comparisons, whoever is ahead."""
    lines = []
    for name in TRAININGS:
        methods = training(name)["methods"]
        losses = [
            present.plus_minus(loss, digits=3)
            for loss in (_adamw(name), *(methods[key]["loss"] for key in (PLUS, FEW_BITS)))
        ]
        lines.append([f"{_trained(name)}: validation loss", *losses])
    return present.markdown(["lower is better", "Adam(W)", "SignAdamPP", "2-bit momentum, bf16"], lines)


def recipe() -> str:
    """What the proof found of its best rule against AdamW, and what becomes of it in fewer bits and elsewhere.

    An asterisk says that the interval is one of all rules together, a dagger that the rate is the lowest tried.
    """
    report = json.loads((EXPERIMENTS / "recipe" / "stage2.json").read_text())
    parts, best = report["parts"], report["best"]
    lines = []
    for part in parts.values():
        rules = {key.partition("@")[0] for key, entry in part["contenders"].items() if entry["competes"]}
        for key, entry in part["contenders"].items():
            rule, _, form = key.partition("@")
            if rule != best:
                continue
            marks = "*" * (len(rules) > 1) + "†" * is_lowest(entry)
            words = [part["title"] + marks, *([f"{form}, bf16 weights"] if form else [])]
            size = f"{part['parameters'] / 1e6:.2f}M, {part['steps']:,} steps, {part['seeds']} seeds"
            bytes_, difference = entry["state_bytes_per_parameter"], present.between(entry["minus_adamw"], form="+.3f")
            lines.append([f"{', '.join(words)}: {size}", f"{bytes_:.2f}", difference])
    label = parts["fresh"]["contenders"][best]["label"]
    return present.markdown([f"{label}: GPT validation loss, paired by seed", "state B", "minus AdamW"], lines)


def memory() -> str:
    """Bytes per parameter of what one would choose between, with bf16 parameters."""
    rows = {
        "AdamW, fp32 masters and moments": MIXED,
        "AdamW, 8-bit (torchao)": ("AdamW8bit", "8-bit, stochastic", "", "all", "torchao"),
        "AdamW, 8-bit (bitsandbytes)": ("AdamW8bit", "8-bit", "", "all", "bitsandbytes"),
        "SignAdamPP, 8-bit momentum, exact fp32 weights (`split16`)": ("SignAdamPP", "int8", "split16"),
        "SignAdamPP, 2-bit momentum": FEW,
        "the same, gradients released in backward": (*FEW, "released"),
    }
    lines = []
    for label, wanted in rows.items():
        own = _bytes(*wanted)
        lines.append([label, *(f"{own[part]:.2f}" for part in ("weights", "state", "gradients", "peak"))])
    table = present.markdown(["bytes per parameter", "weights", "state", "gradients", "peak of a step"], lines)
    return (
        f"{table}\n\nMeasured on {_bytes_model()}, whose objects take a few hundredths; the peak is of the process. "
        f"{_large_model_short()}"
    )


def _bytes_model() -> str:
    """The model of `_bytes`."""
    row = next(row for row in without_gpu(RESULTS / "memory")["rows"] if row.get("model") == "gpt")
    return f"{row['elements'] / 1e6:.1f}M parameters in {row['tensors']} tensors"


def _large_model_short() -> str:
    """The run of 7 billion parameters in a sentence."""
    start, steps = large_model_log()
    peak, machine = max(line["peak_bytes"] for line in steps), start["machine"]
    return (
        f"A [GPT of {start['parameters'] / 1e9:.1f} billion parameters](docs/results.md#7-billion-parameters) took "
        f"{len(steps)} steps within {peak / 1e9:.2f} GB, on {machine['cores']} cores and without a GPU."
    )


def speed() -> str:
    """Six optimizers on three models, all cells measured, with the stream's bandwidth beside."""
    columns = (("1 x 50000000", "float32"), ("GPT-2 small", "float32"), ("GPT-2 small", "bfloat16"))
    names = ("SignAdamPP", "SignAdamPP adaptive_delayed", "SignAdam", "SignAdam analytic", "Signum", "SignSGD")
    lines = [[f"`{name}`", *(cell(_speed(name, shapes, dtype)) for shapes, dtype in columns)] for name in names]
    report = without_gpu(RESULTS)
    machine = report["machine"]
    note = (
        f"Speed of a step against torch's fused AdamW on fp32 parameters; {machine['cpu']}, {machine['cores']} cores "
        f"(module of commit {present.built_at(report)}, {report['date'][:10]}). In brackets GB/s of the step and of "
        "the in-place stream `a.add_(b)` in the same rounds, which a step of several arrays can pass. Part of the gain "
        "in bf16 is that of smaller weights."
    )
    after = (
        "The optimizer is a small part of a training step: memory, not speed, is the reason to use this "
        "package. [All figures](docs/results.md#speed)."
    )
    header = ["", *(f"{shapes}, {present.HALF[dtype]}" for shapes, dtype in columns)]
    return f"{note}\n\n{present.markdown(header, lines)}\n\n{after}"

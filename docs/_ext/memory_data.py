"""What the memory page computes from: the forms and what each optimizer keeps, as the package has them."""

from itertools import product
from typing import Any

from signadam_ext import memory
from signadam_ext.core.formats import BOUNDED, FORMATS, PARAM_STORAGES, RUN

#: Hyperparameters that decide what is kept, by optimizer, with what the page calls each choice.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "SignAdamPP": {
        "fixed threshold": {},
        "adaptive threshold": {"confidence": "adaptive"},
        "threshold for a given share": {"confidence": "sparsity", "target": 0.5},
    },
    "SignAdam": {"exact second moment": {}, "analytic second moment": {"second_moment": "analytic"}},
    "Adam": {"": {}, "amsgrad": {"amsgrad": True}},
    "AdamW": {"": {}, "amsgrad": {"amsgrad": True}},
    "MSVAG": {"moving average": {}, "mini-batch": {"variance": "minibatch"}},
    "AdamStar": {"moving average": {}, "mini-batch": {"variance": "minibatch"}},
}


def _kept(optimizer: str, **options: Any) -> memory.Kept | None:
    """None where the package refuses the combination."""
    state, storage = options.pop("state", None), options.pop("storage", "nearest")
    param = options.pop("param", "fp32")
    try:
        return memory.kept(optimizer, state, storage, param, None, options)
    except (TypeError, ValueError):
        return None


def data() -> dict[str, Any]:
    """All of it, as JSON takes it."""
    optimizers: dict[str, Any] = {}
    for name in memory.OPTIMIZERS:
        for label, options in VARIANTS.get(name, {"": {}}).items():
            states = {}
            for state in BOUNDED:
                # One without moments takes no form of them, and is the same whatever is asked for.
                found = _kept(name, state=state, **options) or (_kept(name, **options) if state == "fp32" else None)
                if found is not None:
                    states[state] = {"moments": [form.kind for form in found.moments], "scalars": found.scalars}
            optimizers[", ".join(filter(None, (name, label)))] = {"name": name, "options": options, "states": states}
    params: dict[str, Any] = {}
    for param, storage in product(memory.DTYPES, PARAM_STORAGES):
        found = _kept("SignAdamPP", param=param, storage=storage)
        if found is not None:
            own = params.setdefault(param, {"bytes": memory.DTYPES[param].itemsize, "storages": {}})
            own["storages"][storage] = found.residual.itemsize if found.residual is not None else 0
    # Bytes of so many elements: those of whole runs where elements share bytes, and one more a run for exponents.
    forms = {
        kind: {
            "bits": form.bits,
            "packed": form.packed,
            "each_run": form.nbytes(1) - RUN * form.bits // 8 if form.packed else 0,
        }
        for kind, form in FORMATS.items()
    }
    return {"run": RUN, "forms": forms, "optimizers": optimizers, "params": params}

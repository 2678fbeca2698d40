"""timm: once this module is imported, its factory knows the optimizers of this package, by ``--opt signadampp``.

::

    options = {"state_dtype": "int2", "param_storage": "stochastic"}
    timm.optim.create_optimizer_v2(model, "signadampp", lr=6e-4, layer_decay=0.75, **options)

timm's own names stay timm's: optimizers that timm has itself are not among them.
"""

from __future__ import annotations

import inspect

from . import CLASSES, library_of

with library_of("timm"):
    from timm.optim import OptimInfo, list_optimizers
    from timm.optim._optim_factory import default_registry

for _name, _cls in CLASSES.items():
    # timm reads what follows the last underscore, without regard to capitals.
    if _name.lower() not in list_optimizers():
        _takes = inspect.signature(_cls).parameters
        default_registry.register(
            OptimInfo(
                name=_name.lower(),
                opt_class=_cls,
                description=f"signadam_ext.{_name}",
                has_eps="eps" in _takes,
                has_betas="betas" in _takes,
            )
        )

"""axolotl: an optimizer of this package by a plugin, which a config names, with its options.

::

    plugins:
      - signadam_ext.integrations.axolotl.SignAdamPlugin
    signadam:
      name: SignAdamPP
      state_dtype: int2
      param_storage: stochastic
    learning_rate: 6.0e-4

``learning_rate`` and ``weight_decay`` stay axolotl's.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from . import class_of, library_of

with library_of("axolotl"):
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel


class SignAdamArguments(BaseModel):
    """What the plugin adds to axolotl's config.

    Attributes:
        signadam: the name of the class, SignAdamPP where none is given, and its options. ``learning_rate`` and
            ``weight_decay`` stay axolotl's.
    """

    signadam: dict[str, Any] | None = None


class SignAdamPlugin(BasePlugin):
    """Hands the trainer class and options, from which it makes the optimizer with groups of its own.

    axolotl 0.19.0 documents ``create_optimizer`` and calls it nowhere, so that the trainer is told once it is there;
    the hook itself is for versions that call it.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{SignAdamArguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        trainer.optimizer_cls_and_kwargs = _class_and_options(cfg, trainer)

    def create_optimizer(self, cfg: Any, trainer: Any) -> Optimizer:
        cls, options = _class_and_options(cfg, trainer)
        return cls(trainer.create_optimizer_grouped_parameters(trainer.model, options), **options)


def _class_and_options(cfg: Any, trainer: Any) -> tuple[Any, dict[str, Any]]:
    options = {"lr": trainer.args.learning_rate, **(cfg.get("signadam") or {})}
    return class_of(options.pop("name", "SignAdamPP")), options

"""One module per rule: its scalars, its class, its functional form."""

from .sign_adam import SignAdam, sign_adam
from .sign_adam_pp import SignAdamPP, sign_adam_pp
from .sign_sgd import SignSGD, sign_sgd
from .signum import Signum, signum

__all__ = ["SignAdam", "SignAdamPP", "SignSGD", "Signum", "sign_adam", "sign_adam_pp", "sign_sgd", "signum"]

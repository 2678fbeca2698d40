"""One module per rule or family: its scalars, its classes, their functional forms."""

from .ada_bound import AdaBound, AMSBound, ada_bound, ams_bound
from .adam import Adam, AdamW, adam
from .ademamix import AdEMAMix, ademamix
from .adopt import ADOPT, adopt
from .laprop import LaProp, laprop
from .lion import Lion, lion
from .msgd import MSGD, msgd
from .sign_adam import SignAdam, sign_adam
from .sign_adam_pp import SignAdamPP, sign_adam_pp
from .sign_sgd import SignSGD, sign_sgd
from .signum import Signum, signum
from .variance_adaptation import MSVAG, SVAG, AdamStar, adam_star, msvag, svag

__all__ = [
    "ADOPT",
    "MSGD",
    "MSVAG",
    "SVAG",
    "AMSBound",
    "AdEMAMix",
    "AdaBound",
    "Adam",
    "AdamStar",
    "AdamW",
    "LaProp",
    "Lion",
    "SignAdam",
    "SignAdamPP",
    "SignSGD",
    "Signum",
    "ada_bound",
    "adam",
    "adam_star",
    "ademamix",
    "adopt",
    "ams_bound",
    "laprop",
    "lion",
    "msgd",
    "msvag",
    "sign_adam",
    "sign_adam_pp",
    "sign_sgd",
    "signum",
    "svag",
]

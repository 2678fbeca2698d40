"""One module per rule or family: its scalars, its classes, their functional forms."""

from .adam import Adam, AdamW, adam
from .adam_s import AdamS, adam_s
from .bcos import BCOS, bcos
from .lion import Lion, lion
from .lion_k import LionK, lion_k
from .msgd import MSGD, msgd
from .sign_adam import SignAdam, sign_adam
from .sign_adam_pp import SignAdamPP, sign_adam_pp
from .sign_sgd import SignSGD, sign_sgd
from .signum import Signum, signum
from .variance_adaptation import MSVAG, SVAG, AdamStar, adam_star, msvag, svag

__all__ = [
    "BCOS",
    "MSGD",
    "MSVAG",
    "SVAG",
    "Adam",
    "AdamS",
    "AdamStar",
    "AdamW",
    "Lion",
    "LionK",
    "SignAdam",
    "SignAdamPP",
    "SignSGD",
    "Signum",
    "adam",
    "adam_s",
    "adam_star",
    "bcos",
    "lion",
    "lion_k",
    "msgd",
    "msvag",
    "sign_adam",
    "sign_adam_pp",
    "sign_sgd",
    "signum",
    "svag",
]

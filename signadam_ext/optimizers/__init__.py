"""One module per rule or family: its scalars, its classes, their functional forms."""

from .ada_momentum import AdaMomentum, ada_momentum
from .adam import Adam, AdamW, adam
from .adam_s import AdamS, adam_s
from .ano import Ano, Anolog, ano, anolog
from .bcos import BCOS, bcos
from .grams import Grams, grams
from .lion import Lion, lion
from .lion_k import LionK, lion_k
from .mars_lion import MARSLion, mars_lion
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
    "AdaMomentum",
    "Adam",
    "AdamS",
    "AdamStar",
    "AdamW",
    "Ano",
    "Anolog",
    "Grams",
    "Lion",
    "LionK",
    "MARSLion",
    "SignAdam",
    "SignAdamPP",
    "SignSGD",
    "Signum",
    "ada_momentum",
    "adam",
    "adam_s",
    "adam_star",
    "ano",
    "anolog",
    "bcos",
    "grams",
    "lion",
    "lion_k",
    "mars_lion",
    "msgd",
    "msvag",
    "sign_adam",
    "sign_adam_pp",
    "sign_sgd",
    "signum",
    "svag",
]

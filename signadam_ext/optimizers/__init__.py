"""One module per rule or family: its scalars, its classes, their functional forms."""

from .ada_bound import AdaBound, AMSBound, ada_bound, ams_bound
from .ada_momentum import AdaMomentum, ada_momentum
from .adam import Adam, AdamW, adam
from .adam_s import AdamS, adam_s
from .ademamix import AdEMAMix, ademamix
from .adopt import ADOPT, adopt
from .ano import Ano, Anolog, ano, anolog
from .bcos import BCOS, bcos
from .focus import FOCUS, focus
from .grams import Grams, grams
from .laprop import LaProp, laprop
from .lion import Lion, lion
from .lion_k import LionK, lion_k
from .mars_adamw import MARSAdamW, mars_adamw
from .mars_lion import MARSLion, mars_lion
from .msgd import MSGD, msgd
from .schedule_free import ScheduleFreeAdamW, ScheduleFreeSign, schedule_free_adamw, schedule_free_sign
from .sign_adam import SignAdam, sign_adam
from .sign_adam_pp import SignAdamPP, sign_adam_pp
from .sign_sgd import SignSGD, sign_sgd
from .signum import Signum, signum
from .variance_adaptation import MSVAG, SVAG, AdamStar, adam_star, msvag, svag

__all__ = [
    "ADOPT",
    "BCOS",
    "FOCUS",
    "MSGD",
    "MSVAG",
    "SVAG",
    "AMSBound",
    "AdEMAMix",
    "AdaBound",
    "AdaMomentum",
    "Adam",
    "AdamS",
    "AdamStar",
    "AdamW",
    "Ano",
    "Anolog",
    "Grams",
    "LaProp",
    "Lion",
    "LionK",
    "MARSAdamW",
    "MARSLion",
    "ScheduleFreeAdamW",
    "ScheduleFreeSign",
    "SignAdam",
    "SignAdamPP",
    "SignSGD",
    "Signum",
    "ada_bound",
    "ada_momentum",
    "adam",
    "adam_s",
    "adam_star",
    "ademamix",
    "adopt",
    "ams_bound",
    "ano",
    "anolog",
    "bcos",
    "focus",
    "grams",
    "laprop",
    "lion",
    "lion_k",
    "mars_adamw",
    "mars_lion",
    "msgd",
    "msvag",
    "schedule_free_adamw",
    "schedule_free_sign",
    "sign_adam",
    "sign_adam_pp",
    "sign_sgd",
    "signum",
    "svag",
]

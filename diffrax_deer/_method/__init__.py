from .base import AbstractMethod as AbstractMethod
from .deer import DEER as DEER

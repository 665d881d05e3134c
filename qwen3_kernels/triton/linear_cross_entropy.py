from __future__ import annotations

import functools

from ..ops import _through_logits
from . import cross_entropy

chunk = functools.partial(_through_logits.chunk, cross_entropy)

"""Functions with a code object of their own, for torch.compile.

torch keeps what it compiled by code object, at most eight of each, and without a word runs the rest as it is (or, with
`fullgraph`, refuses it): whatever shares a code object uses these up together.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def with_own_code(function: Callable[..., Any], name: str) -> Any:
    """The function or bound method, with a new code object of that name."""
    if isinstance(function, types.MethodType):
        return types.MethodType(with_own_code(function.__func__, name), function.__self__)
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)

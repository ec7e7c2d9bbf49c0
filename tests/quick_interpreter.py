"""Triton's interpreter, less what it repeats: importing this halves the time it takes.

At every call of one jitted function by another it looks through ``triton.language`` for what it
has to replace, and has replaced already. Here that happens once, for all of the process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    try:
        return self.rewrite()(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


# Private names: where another Triton has others, it takes its time.
if hasattr(interpreter, "_LangPatchScope"):
    # Kernels see ``tl``; the functions of triton.language that are jitted themselves, its core.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter.InterpretedFunction.__call__ = _call

"""Ctrl-C at any line of some modules."""

from __future__ import annotations

import dis
import sys

from packedcomm.errors import PackedCommError

__all__ = ["Interrupt"]


class Interrupt:
    """Raises `KeyboardInterrupt` at the n-th line that a thread runs in some modules, once; or, in
    some functions of theirs, at the n-th place where the interpreter would run a signal's handler:
    after calls."""

    def __init__(self, modules, number, functions=()):
        self._files = {module.__file__ for module in modules}
        self._functions = functions
        self._event = "opcode" if functions else "line"
        self._last = {}
        self._left = number
        self.where = None

    def run(self, function):
        """Call it, interrupted or not; returns what it raised."""
        sys.settrace(self._call)
        try:
            function()
        except (KeyboardInterrupt, PackedCommError) as error:
            return error
        finally:
            sys.settrace(None)
        return None

    def _call(self, frame, event, argument):
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        if self._functions:
            if code.co_name not in self._functions:
                return None
            frame.f_trace_opcodes = True
            self._last.pop(id(frame), None)
        return self._line

    def _line(self, frame, event, argument):
        if event == "opcode":
            # By frame, where it was: `with` must not be interrupted before it is inside.
            last, self._last[id(frame)] = self._last.get(id(frame)), frame.f_lasti
            if last is None or not dis.opname[frame.f_code.co_code[last]].startswith("CALL"):
                return self._line
        if event == self._event and self.where is None:
            self._left -= 1
            if not self._left:
                self.where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

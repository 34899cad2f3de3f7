"""Ctrl-C at any line of some modules."""

from __future__ import annotations

import sys

from packedcomm.errors import PackedCommError

__all__ = ["Interrupt"]


class Interrupt:
    """Raises `KeyboardInterrupt` at the n-th line that a thread runs in some modules, once."""

    def __init__(self, modules, number):
        self._files = {module.__file__ for module in modules}
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
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame, event, argument):
        if event == "line" and self.where is None:
            self._left -= 1
            if not self._left:
                self.where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

"""What a manifest's attributes say of a LoRA adapter: its ranks and scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packedcomm.errors import ManifestError, listed

__all__ = ["LoraAttributes"]


# Ways to make or train an adapter that change nothing of what it computes.
_PLAIN_VARIANTS = (None, "mica")


@dataclass(frozen=True, slots=True)
class LoraAttributes:
    """The `lora` attribute of a manifest, checked.

    Args:
        adapter: its name; None if the manifest doesn't say.
        modules: for each adapted module its rank (None if not declared) and its scaling.
        parameters: for modules that hold several parameters, the adapted one's name.
        fold: whether the receiver multiplies B by the scaling. False where the sender has, or the
            engine scales by itself.
    """

    adapter: str | None = None
    modules: Mapping[str, tuple[int | None, float]] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    fold: bool = True

    @classmethod
    def read(cls, attributes: Mapping[str, Any], *, fold_scaling: bool) -> LoraAttributes:
        """Read the attributes of a manifest.

        Args:
            attributes: `{"lora": {"adapter": str, "scaling_folded": bool, "modules": {module:
                {"r": int, "alpha": float, "scaling": float}}}}`, where "parameter" names the one
                that is adapted of several and "variant" says that the module isn't plain LoRA;
                without "lora" nothing is known.
            fold_scaling: whether B is to hold the scaling in the end.

        Raises:
            ManifestError: something is malformed, or a module is DoRA's or another variant's, which
                computes more than `scaling * B @ A`; all are listed, up to ten.
        """
        lora = attributes.get("lora", {})
        if not isinstance(lora, dict):
            raise ManifestError('manifest attribute "lora" must be an object')
        adapter, folded = lora.get("adapter"), lora.get("scaling_folded", False)
        modules = lora.get("modules", {})
        problems = []
        if adapter is not None and not isinstance(adapter, str):
            problems.append(f'"adapter" {adapter!r} is not text')
        if type(folded) is not bool:
            problems.append(f'"scaling_folded" {folded!r} is not true or false')
        if not isinstance(modules, dict):
            problems.append('"modules" is not an object')
            modules = {}
        read, parameters = {}, {}
        for module, found in modules.items():
            entry = found if isinstance(found, dict) else {}
            rank, scaling = entry.get("r"), _number(entry.get("scaling"))
            if not (rank is None or type(rank) is int) or scaling is None:
                problems.append(f"module {module!r} has no valid rank and scaling")
            elif entry.get("variant") not in _PLAIN_VARIANTS:
                problems.append(
                    f"module {module!r} is of the variant {entry['variant']!r}, which is more than "
                    f"scaling * B @ A, all that slots can hold"
                )
            elif entry.get("dora"):
                problems.append(f"module {module!r} is DoRA's, whose magnitude slots can't hold")
            else:
                read[module] = (rank, scaling)
                if isinstance(entry.get("parameter"), str):
                    parameters[module] = entry["parameter"]
        if problems:
            raise ManifestError(f"manifest attribute lora: {listed(problems)}")
        return cls(adapter, read, parameters, fold_scaling and not folded)

    def rank(self, module: str) -> int | None:
        """The declared rank; None if there is none."""
        return self.modules.get(module, (None, 1.0))[0]

    def scale(self, module: str) -> float | str:
        """The factor for a module's B, or what keeps it from being known."""
        if not self.fold:
            return 1.0
        if module not in self.modules:
            return 'its scaling is not among the manifest\'s attributes "lora"'
        return self.modules[module][1]


def _number(value: Any) -> float | None:
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    return float(value)

"""LoRA pairs and stacked tensors, made for tests."""

from __future__ import annotations

import torch

from packedcomm.targets.lora_slots import LoraSlots
from tests.helpers.delivery import counting

PREFIX = "base_model.model."
SLOTS, LIMIT = 3, 8


def stacked(*shapes, experts=1, slots=SLOTS):
    """A module's stacked tensors, full of NaN, from `(rank rows, inputs, outputs, rank columns)` of
    each slice."""
    return LoraSlots(
        tuple(
            torch.full((slots, experts, rows, inputs), float("nan"))
            for rows, inputs, _, _ in shapes
        ),
        tuple(
            torch.full((slots, experts, outs, columns), float("nan"))
            for _, _, outs, columns in shapes
        ),
    )


def attributes(scaling=2.0, folded=False, modules=(), **more):
    described = {
        m: {"r": r, "alpha": r * scaling, "scaling": scaling} for m, r in dict(modules).items()
    }
    return {"lora": {"adapter": "default", "scaling_folded": folded, "modules": described} | more}


def pair(module, rank, inputs, outputs, start=0):
    return {
        f"{PREFIX}{module}.lora_A.weight": counting(rank, inputs, start=start + 1),
        f"{PREFIX}{module}.lora_B.weight": counting(outputs, rank, start=start + 501),
    }


def slot_of(matrix, rows, columns):
    """A matrix in the corner of a zeroed slot."""
    slot = torch.zeros(rows, columns)
    slot[: matrix.shape[0], : matrix.shape[1]] = matrix
    return slot

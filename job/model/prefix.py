"""A frozen prefix's result on one micro-batch: read, or computed, or some of it of either kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Prefix:
    """Hidden states [t, d] before block `block`; behind the last one those that are read, [r, d].

    Attributes:
        states: what is used; None until `settle` was called.
        known: states of which some rows are known, and bool [t], which they are: those are what the
            training is about, and computed ones, which differ in their last bits, are not used.
        earlier: what is known before an earlier block: there computing begins; None where it begins
            with the tokens.
    """

    block: int
    states: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None
    earlier: Prefix | None = None
    computed: bool = False

    @torch.no_grad()
    def settle(self, computed: Tensor) -> Tensor:
        """What is used instead of computed states."""
        self.computed = True
        if self.known is None:
            self.states = computed
        else:
            states, which = self.known
            self.states = torch.where(which[:, None], states, computed)
        return self.states

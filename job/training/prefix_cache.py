"""The frozen blocks' states, kept on disk: computed once, and read from then on.

What is written first is the truth for a run, so that it gives the same bits however often it is
interrupted. Which entries a step sees does therefore not depend on when they came onto the disk:

- those that were there when the run began (`given`), whoever wrote them;
- the run's own of earlier epochs, all of which are committed when an epoch begins;
- its own of the very step, which it is to compute again after an interruption;
- an evaluation sees its own of evaluations, in which sequences always lie in the same packing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from job.data.packing import Batch, Packer
from job.data.state_shards import EVALUATION, GIVEN, Seen, Shards, Stored, Writer
from job.distributed.world import World
from job.model.packed_layout import Reads
from job.model.prefix import Prefix
from job.run.directory import RunDirectory
from job.training.cache_boundary import Boundary, wanted
from job.training.cache_choice import (
    LEAST_SECONDS,
    DiskRates,
    Work,
    training_share,
    work_left,
)
from job.training.cache_record import RECORD, Record
from job.training.cache_rows import Rows, put_states
from job.training.data import CriticData
from job.training.earlier_states import EarlierStates
from job.training.read_ahead import Known, ReadAhead
from job.training.state_reader import StateReader

CHOSEN_AFTER = 60.0  # seconds, so that steps have their usual time
_log = logging.getLogger("job.train")


class PrefixCache:
    """The states of one run's sequences, as one of its ranks reads and writes them.

    Args:
        earlier: from which they can be computed; None where that begins with the tokens.
    """

    def __init__(
        self,
        boundary: Boundary,
        shards: Shards,
        writer: Writer,
        record: Record,
        world: World,
        run: RunDirectory,
        earlier: EarlierStates | None = None,
    ) -> None:
        self._boundary, self._shards, self._writer = boundary, shards, writer
        self._earlier = earlier
        self.record, self._world, self._run = record, world, run
        self._reader = StateReader(boundary, shards, world)
        self._began = time.monotonic()
        self._ahead = ReadAhead(self._read)
        self._epoch_from, self._entered, self._foreseen = -1, -1, -1  # steps; see `enter`
        self._rows, self._rows_spared = 0, 0.0  # since they were last asked for

    def enter(self, step: int, packer: Packer, sequences: int, seed: int) -> None:
        """Begin a training step; what it and the next one need is read from now on.

        Every rank must take part.
        """
        epoch_from = packer.steps_before_epoch(step, sequences)
        is_next = epoch_from == self._epoch_from and step == self._entered + 1
        if epoch_from != self._epoch_from:
            self._writer.commit()
            self._world.gather(None)  # all are committed
            self.record.take_in(self._shards)
            self._epoch_from = epoch_from
        if not is_next:  # of another epoch, or after steps that are passed over
            self._forget(step)
            self._foreseen = step - 1
        self._entered = step
        for coming in (step, step + 1):
            in_epoch = packer.steps_before_epoch(coming, sequences) == epoch_from
            if coming == self._foreseen + 1 and in_epoch:
                plan = packer.plan(coming, sequences, seed)
                self._expect(list(map(packer.stored_of, plan)), coming)
                self._foreseen = coming

    def evaluate(self, packer: Packer) -> list[bool]:
        """Begin an evaluation: which of its micro-batches some rank must compute."""
        coming = [packer.stored_of(units) for units in packer.everything]
        self._forget(EVALUATION)
        self._writer.commit()
        self.record.take_in(self._shards)
        self._expect(coming, EVALUATION)
        return [n > 0 for n in self._world.sum([self.lacks(one, EVALUATION) for one in coming])]

    def leave_out(self, data: CriticData, step: int, sequences: int) -> int:
        """How many blocks, and the embeddings, a training from `step` on can do without.

        All of those before the boundary, where the states of all sequences are there; else those
        before the earlier one, or none. Every rank must take part.
        """
        self._epoch_from = data.train.steps_before_epoch(step, sequences)
        sets = ((data.train, step), (data.validation, EVALUATION))
        lacking = any(self.lacks(wanted(packer), at) for packer, at in sets)
        self._epoch_from = -1
        self._reader.left_out = not self._world.sum([lacking])[0]
        block = self._boundary.block if self._reader.left_out else self._computed_from
        if block and self._world.is_main:
            text = "prefix cache: all states before block %d are there: what comes before it, "
            _log.info(text + "embeddings included, is not loaded", block)
        return block

    def rewind(self) -> None:
        """Begin anew from an earlier step."""
        self._epoch_from = -1

    def commit(self) -> None:
        """Return when everything that was kept is on the disk."""
        self._writer.commit()

    def close(self) -> None:
        if self._earlier is not None:
            self._earlier.close()
        self._ahead.close()
        self._writer.close()
        self._shards.close()

    def share(self) -> float:
        """Which share of the frozen blocks' work reading has spared since this was last asked; NaN
        without any.
        """
        rows, spared = self._world.sum([self._rows, self._rows_spared])
        self._rows, self._rows_spared = 0, 0.0
        return spared / rows if rows else float("nan")

    # Choosing

    def choose_evaluations(self, seconds: float, left: int) -> None:
        """Settle whether the states of evaluations are kept, where that is still open.

        Every rank must take part.

        Args:
            seconds: that an evaluation has taken, with no states of its own.
            left: how many will come, of which the first one writes.
        """
        if self.record.validation is None:
            spared = self._boundary.block - self._computed_from
            reads = max(0, left - 1)
            saved = reads * seconds * spared / (self._boundary.n_blocks - self._computed_from)
            self.record.validation = self._world.main_decides(lambda: saved > LEAST_SECONDS)
            self._settled(
                "states of evaluations",
                self.record.validation,
                f"{seconds:.1f} s an evaluation, {left} to come, {saved:,.0f} s saved",
            )

    def choose_training(
        self, packer: Packer, sequences: int, *, step: int, last: int, seconds: float
    ) -> None:
        """The same for training data, after some minutes: `step` of `last` steps are done.

        Args:
            seconds: of a step without states of its own.
        """
        if self.record.training is not None:
            return
        late = self._world.main_decides(lambda: time.monotonic() - self._began > CHOSEN_AFTER)
        if not late:
            return
        assert packer.stored is not None
        rows = sequences * float(packer.stored.rows.mean()) / self._world.size
        frozen, n_blocks = self._boundary.block, self._boundary.n_blocks
        work = work_left(
            step=step,
            last=last,
            epoch=-(-int(np.count_nonzero(packer.units >= 0)) // sequences),
            seconds=seconds,
            prefix_share=training_share(frozen - self._computed_from, n_blocks - frozen),
            step_bytes=rows * self._boundary.row_bytes,
        )
        self.record.training, why = self._world.main_decides(lambda: self._weigh(work))
        self._settled("states of training data", self.record.training, why)

    def _weigh(self, work: Work) -> tuple[bool, str]:
        if work.reads <= 0:
            return False, "no epoch comes after this one"
        try:
            disk = DiskRates.measured(self._shards.folder, self._world.size)
        except OSError as error:
            return False, f"{self._shards.folder}: {error.strerror}"
        return work.saved(disk) > 0, work.told(disk)

    def _settled(self, what: str, kept: bool, why: str) -> None:
        self._run.write_json(RECORD, vars(self.record))
        if self._world.is_main:
            _log.info("prefix cache: %s are %s: %s", what, "kept" if kept else "not kept", why)

    # Reading

    def lacks(self, stored: Stored | None, step: int) -> bool:
        """Whether the states of some of these sequences must be computed."""
        return stored is not None and bool((self._find(stored, step) < 0).any())

    def take(self, batch: Batch, reads: Reads, step: int, *, compute: bool) -> Prefix:
        """What is known of a micro-batch's states; see `StateReader.prefix`."""
        known = None
        if batch.stored is not None:
            known = self._ahead.get(batch.stored, step)
            self._count(known, batch.stored, step)
        prefix = self._reader.prefix(batch, reads, known, compute=compute)
        if self._earlier is not None and prefix.states is None:
            prefix.earlier = self._earlier.take(batch, reads, step)
        return prefix

    @property
    def _computed_from(self) -> int:
        """The block at which computing begins; 0 where that is with the tokens."""
        return 0 if self._earlier is None else self._earlier.block

    def _expect(self, coming: Sequence[Stored | None], step: int) -> None:
        """Have the states of these micro-batches read, and earlier ones of what they lack."""
        self._ahead.expect(coming, step)
        if self._earlier is not None:
            lacking = [one for one in coming if one is not None and self.lacks(one, step)]
            self._earlier.expect(lacking, step)

    def _forget(self, step: int) -> None:
        self._ahead.forget(step)
        if self._earlier is not None:
            self._earlier.forget(step)

    def _count(self, known: Known | None, stored: Stored, step: int) -> None:
        if step != EVALUATION:
            rows, read = int(stored.rows.sum()), 0 if known is None else int(known[1].sum())
            self._rows += rows
            self._rows_spared += read + (rows - read) * self._computed_from / self._boundary.block

    def _read(self, stored: Stored, step: int) -> Known | None:
        return self._reader.read(stored, self._find(stored, step))

    def _find(self, stored: Stored, step: int) -> NDArray[np.int64]:
        return self._reader.find(stored, self._sees(step))

    def _sees(self, step: int) -> Seen:
        epoch_from = self._epoch_from
        if step == EVALUATION:
            return lambda steps: (steps == GIVEN) | (steps == EVALUATION)
        return lambda steps: (
            (steps == GIVEN) | (steps == step) | ((steps >= 0) & (steps < epoch_from))
        )

    # Writing

    def keep(self, batch: Batch, reads: Reads, prefix: Prefix, step: int) -> None:
        """Write the states that had to be computed, where they are to be kept."""
        is_kept = self.record.validation if step == EVALUATION else self.record.training
        if not is_kept or batch.stored is None or prefix.states is None or not prefix.computed:
            return
        rows = Rows.of(batch, reads, of_read_rows=self._boundary.of_read_rows)
        states, found = rows.of_sequences(prefix.states), self._find(batch.stored, step)
        put_states(self._writer, batch.stored, states, step, found)

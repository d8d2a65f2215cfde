"""SIGTERM and Ctrl-C end a run after its step, with a checkpoint, on all its processes together."""

import os
import signal

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point


class StopSignal:
    """SIGTERM or Ctrl-C: the run finishes its step and saves. A second Ctrl-C does not wait.

    With several processes, a signal to one stops all of them after the same step. There jax handles SIGTERM: it
    informs the other processes, and they agree on the call of `after_step` that is to be the last.
    """

    def __init__(self):
        self.number = None  # of the signal that has come
        self.calls = 0
        self.alone = jax.process_count() == 1
        signal.signal(signal.SIGINT, self._remember)
        if self.alone:
            signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number, _):
        if self.alone:
            self.number = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
            # An exit in Python would wait for the other processes.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def after_step(self) -> bool:
        """True where the run is to end here. Every process must call it after each step."""
        self.calls += 1
        # jax reports the signal once. It counts from 0 in each process: with the run's steps, a signal before the
        # first call would set the end at step 1, which a resumed run has passed.
        if not self.alone and self.number is None and reached_preemption_sync_point(self.calls):
            self.number = signal.SIGTERM
        return self.number is not None

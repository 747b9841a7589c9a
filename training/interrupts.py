"""Ctrl-C and SIGTERM: a run stops between two steps, never inside one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_interrupts(repeatable: bool, compiling: bool) -> Iterator[list[int]]:
    """Inside the block, a first signal is only appended to the yielded list. After it, signals interrupt at once.

    A second signal inside the block interrupts too, unless `repeatable`: torchrun sends its processes a signal that
    they have received from the terminal already. While `compiling`, the compiler's processes receive the signal too,
    and what they raise then counts as an interrupt.
    """
    received: list[int] = []

    def receive(number: int, _) -> None:
        received.append(number)
        if not repeatable:
            signal.signal(number, signal.default_int_handler)

    for number in SIGNALS:
        signal.signal(number, receive)
    try:
        yield received
    except RuntimeError:
        if compiling and received:
            raise KeyboardInterrupt from None
        raise
    for number in SIGNALS:  # not in a `finally`: after an exception the process ends, and no signal may disturb that
        signal.signal(number, signal.default_int_handler)

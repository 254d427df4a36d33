"""SIGTERM and Ctrl-C: the work is given up in order, one line is said, and the exit status is that of shells.

    return ended(lambda: work(), "start again to go on")        # 130 after Ctrl-C, 143 after SIGTERM

While the work is given up (files are closed, temporary ones removed), more SIGTERMs change nothing, since launchers
send several; a second Ctrl-C ends the process at once, which costs no more than kill -9 does.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

BOTH = (signal.SIGINT, signal.SIGTERM)


def ended(run: Callable[[], int], said: str) -> int:
    """Returns run()'s exit status, or 128 + N where signal N ended it, with the line "stopped; ...; SAID" on stderr.

    said: how to go on.  The signal raises KeyboardInterrupt in run, whose text, if something adds one, is in the line.
    Outside the main thread, where Python hears no signals, it is run() alone.
    """
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        ending(said)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {one: signal.signal(one, hear) for one in BOTH} if main else {}
    try:
        return run()
    except KeyboardInterrupt as stop:
        print("; ".join(filter(None, ("stopped", str(stop), said))), file=sys.stderr, flush=True)
        return 128 + (heard[0] if heard else signal.SIGINT)
    finally:
        for one, handler in before.items() if not heard else ():  # else the process is about to end
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


def ending(said: str) -> None:
    """From here on SIGTERM changes nothing, and Ctrl-C ends the process at once with 130 and a line."""

    def leave(*_: object) -> None:
        os.write(2, f"stopped at once; {said}\n".encode())
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, leave)

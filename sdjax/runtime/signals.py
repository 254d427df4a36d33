"""SIGTERM and Ctrl-C: stops the work cleanly, prints one line, and returns the shells' exit status.

    return ended(lambda: work(), "start again to go on")        # 130 after Ctrl-C, 143 after SIGTERM

During the clean-up (closing files, removing temporary ones), further SIGTERMs have no effect, since launchers send
several.  A second Ctrl-C ends the process at once; this is no worse than kill -9.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

BOTH = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.01  # seconds after which a signal whose exception was ignored is sent again


def ended(run: Callable[[], int], said: str) -> int:
    """Returns run()'s exit status, or 128 + N after signal N, with the line "stopped; ...; SAID" on stderr.

    said: how to continue.  The signal raises KeyboardInterrupt in run; if run raises it again with a text, the line
    includes the text.
    Outside the main thread, where Python handles no signals, it only calls run.
    """
    heard: list[int] = []

    def hear(number: int, _: FrameType | None) -> None:
        heard.append(number)
        ending(said)
        raise KeyboardInterrupt

    def ignored(about: Any) -> None:
        """Python ignores exceptions in finalizers and callbacks of the garbage collector, this one too."""
        if not heard or about.exc_type is not KeyboardInterrupt:
            return hook(about)
        for one in BOTH:
            signal.signal(one, hear)
        threading.Timer(AGAIN, os.kill, (os.getpid(), heard.pop())).start()

    main, hook = threading.current_thread() is threading.main_thread(), sys.unraisablehook
    before = {one: signal.signal(one, hear) for one in BOTH} if main else {}
    if main:
        sys.unraisablehook = ignored
    try:
        return run()
    except KeyboardInterrupt as stop:
        print("; ".join(filter(None, ("stopped", str(stop), said))), file=sys.stderr, flush=True)
        return 128 + (heard[0] if heard else signal.SIGINT)
    finally:
        if main:
            sys.unraisablehook = hook
        for one, handler in before.items() if not heard else ():  # after a signal, the process is about to end
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


def ending(said: str) -> None:
    """Makes SIGTERM have no effect, and Ctrl-C end the process at once with a line and status 130."""

    def leave(*_: object) -> None:
        os.write(2, f"stopped at once; {said}\n".encode())
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, leave)

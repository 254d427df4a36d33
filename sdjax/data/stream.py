"""Batches of examples that threads or other processes prepare before they are asked for.

for batch in batched(example, first=0, count=4, threads=2, workers=0): ...      # example(0) to example(3), stacked
"""

from collections.abc import Callable, Iterator
from typing import Any

WAITING = 8  # batches that threads prepare ahead
LAST = 1 << 40  # the end of a stream that nobody reaches


def batched(
    example: Callable[[int], dict[str, Any]], first: int, count: int, threads: int, workers: int
) -> Iterator[dict[str, Any]]:
    """Yields example(first), example(first + 1), ..., stacked in batches of `count`, in this order.

    threads: that prepare them ahead, in each process; 0 prepares a batch when it is asked for.
    workers: processes that prepare them, each other batches; 0 prepares all in this process.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=WAITING * count if threads else 0)
    stream = grain.MapDataset.range(first, LAST).map(example).batch(count).to_iter_dataset(options)
    if workers:
        _parse_flags()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    return iter(stream)


def _parse_flags():
    """Parses absl's flags, which grain reads, in a program that is none of absl's."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

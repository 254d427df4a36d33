"""Batches of examples that threads or other processes prepare ahead of time.

for batch in batched(example, first=0, count=4, threads=2, workers=0): ...      # example(0) to example(3), stacked
"""

from collections.abc import Callable, Iterator
from typing import Any

WAITING = 8  # batches that threads prepare ahead
LAST = 1 << 40  # end of the stream, never reached


def batched(
    example: Callable[[int], dict[str, Any]], first: int, count: int, threads: int, workers: int
) -> Iterator[dict[str, Any]]:
    """Yields example(first), example(first + 1), ..., stacked in batches of `count`, in this order.

    threads: threads per process that prepare batches ahead; 0 prepares a batch when it is needed.
    workers: processes among which the batches are divided; 0 for this process only.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=WAITING * count if threads else 0)
    stream = grain.MapDataset.range(first, LAST).map(example).batch(count).to_iter_dataset(options)
    if workers:
        _parse_flags()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    return iter(stream)


def _parse_flags():
    """Marks absl's flags as parsed, since grain reads them and this program does not use absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

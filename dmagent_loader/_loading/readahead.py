"""Reading rows in background threads, ahead of the samples."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from dmagent_loader._loading.config import ReadingConfig
from dmagent_loader.mixture.segment import Located
from dmagent_loader.shards import RawSample, RowSource

_ROWS_PER_TASK = 16
_Key = tuple[int, int]


class Readahead:
    """Rows that are being read in the background, by domain and draw.

    Args:
        collection: The shards.
        num_threads: Reading threads, at least 1.
        num_rows: Rows requested at a time.
    """

    def __init__(self, collection: RowSource, num_threads: int, num_rows: int) -> None:
        self._collection, self.num_rows = collection, num_rows
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dmagent-read")
        self._pending: dict[_Key, tuple[Future[list[RawSample | Exception]], int]] = {}

    @classmethod
    def configured(cls, collection: RowSource, config: ReadingConfig) -> Readahead | None:
        """The reading threads of a configuration, if any."""
        return cls(collection, config.num_threads, config.num_rows) if config.num_threads else None

    def request(self, located: Located) -> None:
        """Starts reading rows that have not been requested yet."""
        if len(self._pending) > 4 * self.num_rows:
            self._pending.clear()
        wanted = [
            number
            for number, key in enumerate(zip(located.domain.tolist(), located.draw.tolist(), strict=True))
            if key not in self._pending
        ]
        for first in range(0, len(wanted), _ROWS_PER_TASK):
            chosen = wanted[first : first + _ROWS_PER_TASK]
            rows = [(int(located.domain[i]), int(located.shard[i]), int(located.row[i])) for i in chosen]
            future = self._pool.submit(self._read, rows)
            for number, i in enumerate(chosen):
                self._pending[int(located.domain[i]), int(located.draw[i])] = (future, number)

    def has_any(self, located: Located) -> bool:
        """Whether any of these rows was requested, and not taken yet."""
        keys = zip(located.domain.tolist(), located.draw.tolist(), strict=True)
        return not self._pending.keys().isdisjoint(keys)

    def take(self, domain: int, draw: int, shard: int, row: int) -> RawSample:
        """A row: from the background if it was requested, otherwise read here."""
        pending = self._pending.pop((domain, draw), None)
        if pending is None:
            return self._collection.read(domain, shard, row)
        future, number = pending
        found = future.result()
        if number >= len(found):
            return self._collection.read(domain, shard, row)
        raw = found[number]
        if isinstance(raw, Exception):
            raise raw
        return raw

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, rows: list[tuple[int, int, int]]) -> list[RawSample | Exception]:
        """Reads rows up to the first that cannot be read, whose error comes last."""
        found: list[RawSample | Exception] = []
        for row in rows:
            try:
                found.append(self._collection.read(*row))
            except Exception as error:
                return [*found, error]
        return found

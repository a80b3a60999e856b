"""What share of `dmagent filter --near-duplicates` is the comparison, which one process does whatever the workers.

    python benchmarks/near_duplicates.py --data ../shared/data --documents 60000

All documents of DATA in the order of their files, one process and one thread. Of one document in ten, a copy with
another last word is added. The CPU time of the comparison (`DocumentFilter.decide`: digests and MinHash against all
earlier documents) is set beside that of the whole command, at several numbers of documents, because an index may slow
down as it grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmagent_loader.labelling.documents import FileDocuments
from dmagent_loader.labelling.filter_files import filter_domains
from dmagent_loader.labelling.filtering import DocumentFilter, FilterConfig
from dmagent_loader.training.data.corpus import read_documents

COPIES = 10
FOLDERS = ("source", "target_math", "target_code")


class TimedFilter(DocumentFilter):
    """Adds up the CPU time of the comparison."""

    seconds = 0.0

    def decide(self, *arguments: Any) -> list[str | None]:
        began = time.process_time()
        reasons = super().decide(*arguments)
        self.seconds += time.process_time() - began
        return reasons


def texts_of(data: Path) -> Iterator[str]:
    """All texts, with copies."""
    files = itertools.chain.from_iterable(sorted((data / folder).glob("*.jsonl.gz")) for folder in FOLDERS)
    for number, text in enumerate(text for path in files for text in read_documents(path)):
        yield text
        if number % COPIES == 0:
            yield f"{text.rstrip()} copied"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of text")
    parser.add_argument("--documents", type=int, default=60_000, help="(default: %(default)s)")
    args = parser.parse_args()
    print("| documents | MB | near duplicates | CPU seconds | in the comparison | share |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in (args.documents // 16, args.documents // 4, args.documents):
        texts = list(itertools.islice(texts_of(args.data), count))
        with tempfile.TemporaryDirectory() as folder:
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            (Path(folder) / "all.jsonl").write_text("".join(lines), encoding="utf-8")
            documents = {"source/all": FileDocuments("source/all", [Path(folder) / "all.jsonl"])}
            checked = TimedFilter(FilterConfig(near_duplicates=0.8))
            began = time.process_time()
            found = filter_domains(documents, Path(folder) / "out", checked, progress=False)["source/all"]
            seconds = time.process_time() - began
        print(
            f"| {len(texts):,} | {sum(len(text.encode()) for text in texts) / 1e6:.0f} | {found['near duplicate']:,} | "
            f"{seconds:.0f} | {checked.seconds:.1f} | {checked.seconds / seconds:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

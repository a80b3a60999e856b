"""Labels documents with one of the 26 topics and trains a tokenizer: the input of `dmagent shard` for 52 domains.

A linear classifier is trained on documents of known topics (files named after their topic), and its accuracy on
held-out documents is printed. Then:

    python examples/label_topics.py --labelled DATA/source --input DATA/target_math --output WORK
    PACK="--tokenizer WORK/tokenizer.json --sequence-length 128 --output WORK/shards"
    dmagent shard --input DATA/source --field source $PACK
    dmagent shard --input WORK/target --field target $PACK
    python examples/huggingface_trainer.py --shards WORK/shards ...
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path

from dmagent_loader.training import TopicClassifier, TopicClassifierConfig, read_documents, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=Path, required=True, help="folder of <topic>.jsonl.gz with the column text")
    parser.add_argument("--input", type=Path, required=True, help="folder of .jsonl.gz files to label")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--piece",
        type=int,
        default=600,
        help="characters per label, because a page may cover several topics (default: %(default)s)",
    )
    parser.add_argument("--vocabulary", type=int, default=4096, help="size of the tokenizer (default: %(default)s)")
    args = parser.parse_args()

    labelled = {path.name.split(".")[0]: list(read_documents(path)) for path in sorted(args.labelled.glob("*.jsonl*"))}
    whole = [text for path in sorted(args.input.glob("*.jsonl*")) for text in read_documents(path)]
    documents = [text[i : i + args.piece] for text in whole for i in range(0, len(text), args.piece)]
    classifier = TopicClassifier(labelled, TopicClassifierConfig())
    print(f"accuracy on {classifier.num_held_out} held-out documents: {classifier.accuracy:.3f}")

    print(f"{len(whole)} documents in {len(documents)} pieces of up to {args.piece} characters")
    names = [classifier.topics[number] for number in classifier.predict(documents)]
    folder = args.output / "target"
    folder.mkdir(parents=True, exist_ok=True)
    for topic, count in Counter(names).most_common():
        with gzip.open(folder / f"{topic}.jsonl.gz", "wt", encoding="utf-8") as out:
            for text, name in zip(documents, names, strict=True):
                if name == topic:
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        print(f"{topic:28} {count:6} pieces")

    sample = [text for texts in labelled.values() for text in texts[:400]] + documents[::4]
    tokenizer = train_tokenizer(iter(sample), args.vocabulary)
    tokenizer.save(str(args.output / "tokenizer.json"))
    print(f"wrote {folder} and {args.output / 'tokenizer.json'}")


if __name__ == "__main__":
    main()

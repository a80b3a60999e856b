"""Writes shards from the data that people have, as raw text or as tokenised and packed rows.

A job has two halves. First, pieces of the inputs become chunks of documents (`collecting`). Then the documents of a
domain, in their order, become shards (`assembling`). `running` runs both, `refusals` and `output` look after the folder
of the shards. The bytes depend only on the documents and the settings, not on the number of processes or on kills.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dmagent_loader._files import only_writer
from dmagent_loader._tasks import Workers, check_workers
from dmagent_loader.errors import DomainError
from dmagent_loader.shards.inputs.chat import load_template
from dmagent_loader.shards.inputs.finding import check_names, find_inputs
from dmagent_loader.shards.inputs.pieces import PIECE_BYTES
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord, manifest_text
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.job import Job
from dmagent_loader.shards.writing.output import earlier_entries, earlier_record, joined_record, publish
from dmagent_loader.shards.writing.packing import TextTokenizer
from dmagent_loader.shards.writing.place import place_of
from dmagent_loader.shards.writing.refusals import refuse_other_files, refuse_other_rows, refuse_own_shards
from dmagent_loader.shards.writing.running import Run

logger = logging.getLogger(__name__)


def shard_files(
    domains: Mapping[str, Sequence[str | os.PathLike[str]]],
    output: str | os.PathLike[str],
    config: ShardingConfig | None = None,
    *,
    append: bool = False,
    work_dir: str | os.PathLike[str] | None = None,
    workers: Workers = 0,
    progress: bool = True,
) -> dict[str, DomainRecord]:
    """Writes shards for every domain: ``OUTPUT/<field>/<domain>/<domain>-000000.tar`` and ``OUTPUT/manifest.json``.

    Later calls can add domains to the same folder, or shards to its domains. A call that fails or is killed adds
    nothing; what it has done so far stays in ``OUTPUT/.partial``, and a call with the same inputs and settings goes on
    from there. While it runs, a job needs about as much space again as its shards. Files that an earlier call did not
    write are never replaced or removed.

    With the URL of an object store, the work is done in a local folder, which needs twice the space of the shards, and
    uploaded at the end, the manifest last.

    Args:
        domains: Domain, such as ``"source/Science"`` -> files, globs, folders, fsspec URLs, or ``hf:`` and the name of
            a data set. The endings of files say how they are read; the guide lists them.
        output: Folder of the shards, created if missing, or URL of an object store, such as ``s3://bucket/shards``.
        config: Settings; None: raw text with the defaults.
        append: Add shards to domains that the folder holds; False: such domains are an error. Inputs that were added
            with the same settings before are left out with a warning, so a call can be repeated, also with more inputs;
            those that have changed since are added whole.
        work_dir: Local folder for the work in progress of a store; None: a folder in that of the caches.
        workers: Number of processes, 0: this one, in which the tokenizer uses all cores; or `RayWorkers`.
        progress: Show progress bars.

    Returns:
        A record of each domain, of all its shards; without those that are left out because they have no rows.

    Raises:
        DomainError: A name is not ``field/domain``, or the folder already holds the domain.
        ConfigurationError: The folder cannot be written to, another process writes to it, it holds files of a domain
            that its manifest does not name, or rows of another kind: text beside packed rows, or packed rows of another
            length or tokenizer.
        ShardNotFoundError: A path matches no file.
        ShardError: An input cannot be used, more of its records are bad than `config` allows, or the store refuses
            access or cannot be reached.
        EmptyShardError: A domain has no rows, and is not to be left out; or none has.
        MissingExtraError: A kind of input needs a package that is not installed.
    """
    config = config or ShardingConfig()
    check_workers(workers)
    place = place_of(output, work_dir)
    check_names(domains)
    inputs = {domain: find_inputs(domain, paths, config.reading) for domain, paths in domains.items()}
    tokenizer = (
        TextTokenizer.load(config.tokenizer, config.eos_token, parse_special_tokens=config.parse_special_tokens)
        if config.tokenizer is not None
        else None
    )
    settings = _settings(config, tokenizer)
    refuse_own_shards(place, inputs)
    with only_writer(place.work, "shards"):
        kept = earlier_entries(place)
        earlier = {domain: kept[domain] for domain in domains if domain in kept}
        job = Job(place, inputs, config, {**settings, "piece_bytes": PIECE_BYTES})
        done = {
            domain: entry
            for domain, entry in earlier.items()
            if job.digests[domain].items() <= entry.get("inputs", {}).items()
        }
        # A job that was killed after it wrote the manifest holds all its domains, but those that it left out as small.
        was_written = done.keys() == earlier.keys() and job.folder.exists()
        if append or (done and was_written):
            for domain, entry in earlier.items():
                inputs[domain] = job.new_inputs(domain, inputs[domain], entry.get("inputs", {}))
            inputs = {domain: items for domain, items in inputs.items() if items}
            if not inputs:
                job.remove()
                return {domain: earlier_record(entry) for domain, entry in done.items()}
        elif earlier:
            raise DomainError(
                f"{str(place)!r} holds the domain(s) {list(earlier)} already: add to them (--append, append=True), "
                f"choose another folder, or remove them from the folder and its {MANIFEST_NAME}"
            )
        refuse_other_rows(place, kept, settings, earlier)
        refuse_other_files(place, [domain for domain in inputs if domain not in kept], job.published())
        place.check_access()
        job.announce()
        run = Run(config, tokenizer, workers, progress, PIECE_BYTES)
        try:
            parts = run.write(job, inputs, earlier, may_be_empty=bool(done))
            publish(job, parts, kept, progress=progress)
            records = {
                domain: joined_record(kept.get(domain), job, domain, parts[domain], settings) for domain in parts
            }
            others = {domain: entry for domain, entry in kept.items() if domain not in records}
            place.write(MANIFEST_NAME, manifest_text(records, others).encode())
        except BaseException:
            if not job.has_work:
                job.remove()
            raise
        job.remove()
    return {
        domain: records[domain] if domain in records else earlier_record(done[domain])
        for domain in domains
        if domain in records or domain in done
    }


def _settings(config: ShardingConfig, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    load_template.cache_clear()  # the file may have changed since the last call
    template = load_template(config.chat_template).sha256 if config.chat_template is not None else None
    order = {
        "text_key": config.reading.document_key,
        "chat_template": template,
        "shuffle_seed": config.shuffle_seed,
    }
    if tokenizer is None:
        return {"format": "text", **order, "keep_columns": list(config.keep_columns)}
    return {
        "format": "packed",
        **order,
        "tokenizer": os.path.basename(os.path.normpath(config.tokenizer or "")),
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "parse_special_tokens": config.parse_special_tokens,
        "sequence_length": config.sequence_length,
        "dtype": tokenizer.dtype.name,
    }

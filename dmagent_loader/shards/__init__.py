"""WebDataset tar shards with random access: index, reader, decoders, writer."""

from dmagent_loader._tasks import RayWorkers
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.compositions import Composition, load_compositions, load_start_state
from dmagent_loader.shards.decode import Decoder, RawSample, decode_npy, make_decoder
from dmagent_loader.shards.manifest import Manifest, load_manifest
from dmagent_loader.shards.packed import PackedRows, PackingAccount, PackText
from dmagent_loader.shards.row_source import RowSource
from dmagent_loader.shards.summary import ShardSummary
from dmagent_loader.shards.tar import ShardDamage
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.writer import shard_files

__all__ = [
    "Composition",
    "Decoder",
    "Manifest",
    "PackText",
    "PackedRows",
    "PackingAccount",
    "RawSample",
    "RayWorkers",
    "RowSource",
    "ShardCollection",
    "ShardDamage",
    "ShardSummary",
    "ShardingConfig",
    "decode_npy",
    "load_compositions",
    "load_manifest",
    "load_start_state",
    "make_decoder",
    "shard_files",
]

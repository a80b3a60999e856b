"""Only `shards/sources` opens shards for reading, or sockets: one place for limits, retries and error messages."""

from __future__ import annotations

import ast
from pathlib import Path

from dmagent_loader import shards

ROOM = Path(shards.__file__).parent
OPENS = {"open", "os.open", "os.preadv", "os.pread", "os.read", "io.open", "tarfile.open", "mmap.mmap"}
NETWORK = {"aiohttp", "asyncio", "fsspec", "http", "requests", "socket", "ssl", "urllib.request"}


def opened(tree: ast.Module) -> set[str]:
    """Functions that open files, and imports that reach a network."""
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names & OPENS | {name for name in imports if any(f"{name}.".startswith(f"{used}.") for used in NETWORK)}


def test_only_sources_opens_shards_or_sockets() -> None:
    files = {file.relative_to(ROOM).as_posix(): opened(ast.parse(file.read_text())) for file in ROOM.rglob("*.py")}
    assert files["sources/local.py"] == {"os.open", "os.preadv"}
    assert files["sources/remote.py"] == {"fsspec"}
    others = {name for name, found in files.items() if found and not name.startswith("sources/")}
    assert others == {"inputs/text.py"}, "it reads the texts that shards are made of"

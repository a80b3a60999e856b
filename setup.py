"""What `setup.cfg` cannot say: the compiled loops, and the links that follow from the address of the project."""

from __future__ import annotations

import configparser
import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path(__file__).resolve().parent
_IMAGE = re.compile(r'<img src="([^":]+)"([^>]*?) alt="([^"]*)">')
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")


def compiled_loops() -> list[Extension]:
    """The loops in C, in one file each for all versions of Python.

    They are optional: without a compiler, the package does the same in Python. ``DMAGENT_PURE_PYTHON=1`` leaves them
    out, for a wheel that fits any machine, and so does a Python without the interpreter lock, which has no stable
    interface. The options make overflow and rounding those of numpy, because samples must not depend on the machine.
    """
    if os.environ.get("DMAGENT_PURE_PYTHON", "") not in ("", "0") or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return []
    options = [] if sys.platform == "win32" else ["-O2", "-fwrapv", "-ffp-contract=off"]
    return [
        Extension(
            ".".join(source.with_suffix("").parts),
            [str(source)],
            depends=["dmagent_loader/_module.h", "dmagent_loader/mixture/_columns.h"],
            extra_compile_args=options,
            py_limited_api=True,
            optional=True,
        )
        for source in map(Path("dmagent_loader").joinpath, ("mixture/_order.c", "mixture/_rows.c", "shards/_reading.c"))
    ]


def package_page(readme: str, address: str) -> str:
    """README.md for readers outside the repository, where relative links lead nowhere.

    Args:
        readme: Text with relative links.
        address: Public address of the repository; "": links become plain text, and images their descriptions.
    """
    if not address:
        return _LINK.sub(r"\1", _IMAGE.sub(r"(Figure: \3)", readme))
    absolute = _IMAGE.sub(rf'<img src="{address}/raw/HEAD/\1"\2 alt="\3">', readme)
    return _LINK.sub(rf"[\1]({address}/blob/HEAD/\2)", absolute)


def project_urls(address: str) -> dict[str, str]:
    """Links beside the package's page."""
    if not address:
        return {}
    return {
        "Source": address,
        "Documentation": f"{address}/blob/HEAD/docs/quickstart.md",
        "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


if __name__ == "__main__":
    settings = configparser.ConfigParser()
    settings.read(FOLDER / "setup.cfg", encoding="utf-8")
    address = settings["dmagent-loader"]["repository"].rstrip("/")
    loops = compiled_loops()
    setup(
        long_description=package_page((FOLDER / "README.md").read_text(encoding="utf-8"), address),
        long_description_content_type="text/markdown",
        project_urls=project_urls(address),
        ext_modules=loops,
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if loops else {},
    )

"""The modules of a Python installation by subject: the domains of the demo's own corpus.

Only packages that the demo itself needs (directly or through torch, transformers and matplotlib) are listed. Two
machines with the same versions therefore collect the same text. A package that is not installed is left out.
"""

from __future__ import annotations

STDLIB_GROUPS: dict[str, str] = {
    "language": """__future__ abc ast bdb code codeop collections compileall contextlib copy copyreg dataclasses dis
        distutils doctest enum functools importlib imp inspect keyword lib2to3 modulefinder opcode operator pkgutil
        profile cProfile pstats py_compile pyclbr pydoc reprlib runpy symtable tabnanny timeit token tokenize trace
        traceback tracemalloc types typing unittest warnings weakref zipimport""",
    "numeric": """_pydecimal _strptime bisect calendar colorsys datetime decimal fractions graphlib hashlib heapq hmac
        ipaddress numbers random secrets statistics uuid zoneinfo _collections_abc sched""",
    "text_and_data": """base64 binhex bz2 cgi chunk codecs configparser csv dbm difflib email fileinput gettext gzip
        html json lzma mailbox mailcap mimetypes netrc pickle pickletools plistlib pprint quopri re sre_compile
        sre_parse shelve sqlite3 string stringprep tarfile textwrap tomllib uu wave xdrlib xml zipapp zipfile aifc
        sunau sndhdr imghdr _compression _markupbase""",
    "systems": """_pyio concurrent contextvars crypt ctypes filecmp fnmatch genericpath getpass glob io linecache locale
        logging multiprocessing ntpath os pathlib pipes platform posixpath pty queue shlex shutil signal site stat
        subprocess sysconfig tempfile threading tty venv _aix_support _osx_support""",
    "network": """asyncio asynchat asyncore cgitb ftplib http imaplib nntplib nturl2path poplib selectors smtpd smtplib
        socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc""",
    "interfaces": "argparse cmd curses getopt idlelib optparse pdb rlcompleter tkinter turtle turtledemo",
}
"""Modules of the standard library by subject; unlisted modules (tables, shims, tests) are not used."""

DOCUMENTATION_DOMAINS: dict[str, str] = {
    "language": "source/language",
    "numeric": "source/numeric",
    "text_and_data": "source/text_and_data",
    "systems": "source/systems_and_network",
    "network": "source/systems_and_network",
    "interfaces": "source/graphics_and_interfaces",
    "machine_learning": "source/machine_learning",
}

CODE_DOMAINS: dict[str, str] = {group: f"target/{group}" for group in STDLIB_GROUPS}

PACKAGE_GROUPS: dict[str, str] = {
    "language": "typing_extensions",
    "numeric": "numpy sympy mpmath networkx",
    "text_and_data": "jinja2 markupsafe yaml regex tokenizers packaging dateutil pyparsing fontTools",
    "systems": "fsspec filelock psutil tqdm",
    "network": "huggingface_hub urllib3 requests httpx httpx2 webdataset",
    "interfaces": "matplotlib PIL cycler rich click typer",
    "machine_learning": "torch transformers accelerate safetensors",
}
"""Installed packages by subject; their documentation is read, their code is not used."""

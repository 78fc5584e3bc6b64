"""Print docs/configuration.md, made from `sgpo_lib.config`: `python tools/configuration_table.py`.

With `--write` the file is replaced. tests/test_config.py compares it with what this prints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sgpo_lib import config

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

<!-- Written by tools/configuration_table.py from sgpo_lib/config.py. Change the docstrings there, then run it with
     --write. -->

Every field of a run, with its default. A profile and a method (`sgpo_lib/recipes.py`) set some of them; parameters of
notebooks and `-p name=value` override both. A name may be short (`steps=60`) or dotted (`train.steps=60`); `seed` and
`profile` have no section. The effective values of a run are in its `config.yaml`.

| Field | Default | Meaning |
| --- | --- | --- |
"""


def page() -> str:
    """The whole file as Markdown."""
    rows = []
    for name, text in config.field_docs().items():
        if name in config.SECTIONS:
            continue
        section, _, leaf = name.rpartition(".")
        defaults = config.RunConfig()
        value = getattr(getattr(defaults, section) if section else defaults, leaf)
        rows.append(f"| `{name}` | `{shown(value)}` | {' '.join(text.split()).replace('|', chr(92) + '|')} |")
    return HEAD + "\n".join(rows) + "\n"


def shown(value: object) -> str:
    """A default as one would write it as a parameter."""
    return json.dumps(value) if isinstance(value, str | dict) else repr(value)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        TARGET.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")

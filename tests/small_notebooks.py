"""Small notebooks for tests of the runner."""

from pathlib import Path

import nbformat

PARAMETERS = "steps = 3\nlr = 1e-3\nname = 'a # b = c'\nflag = True\nseed = None\nmethod = 'sgpo'\noverrides = {}"


def write_notebook(folder: Path, *cells: str, name: str = "trial", parameters: str = PARAMETERS) -> Path:
    """A small notebook: a heading, the parameters cell, then code."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell("# A trial\nwith $\\alpha(q)$"),
                nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *(nbformat.v4.new_code_cell(c) for c in cells)]
    path = folder / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path

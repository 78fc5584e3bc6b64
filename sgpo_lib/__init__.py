"""Strategy-Guided Policy Optimization (arXiv 2606.24064): the library behind the notebooks.

Importing the package or its configuration loads neither torch nor vllm nor ray; each module
imports only from those above it in the list of docs/design.md, which a test checks.
"""

__version__ = "0.1.0"

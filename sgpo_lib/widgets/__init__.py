"""Notebook widgets (anywidget): Python, plain ESM and CSS; no bundler, nothing fetched from a network."""

"""Where problems come from: files, the hub, packages, and the shipped collection. One record type: `Problem`."""

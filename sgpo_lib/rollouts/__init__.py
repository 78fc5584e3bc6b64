"""Sampling engines behind one interface: `sample(requests) -> samples`."""

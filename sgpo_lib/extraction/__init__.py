"""From strong responses to strategies: ask, read, score, check for leaks, choose, keep everything."""

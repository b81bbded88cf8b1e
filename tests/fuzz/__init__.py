"""Fuzzers of everything that comes from outside: each case is a law about one damaged or hostile input."""

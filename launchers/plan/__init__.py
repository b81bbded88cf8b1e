"""The plan of a chain: what it will need in time, memory, disk and traffic."""

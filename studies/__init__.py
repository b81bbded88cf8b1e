"""Studies that compare many ordinary runs. Each is a command: `python -m studies.NAME`, with arm, distill, semi or tables."""

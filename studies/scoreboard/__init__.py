"""The scoreboard: what the chain reaches on several data sets and label regimes, beside what simpler means reach."""

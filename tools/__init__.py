"""What a person runs: one module per verb of the `sightline` command."""

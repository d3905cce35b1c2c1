"""What a rank pays as ranks and samples grow: the project's own code, one process standing for a rank."""

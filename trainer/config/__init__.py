"""A run's configuration: the recipe's schema, reading a recipe from YAML, and its error messages."""

"""The record of the data that was trained on: a line for each batch, and the audit over all restarts."""

"""Scripts that run in another program's environment and import nothing of this project: ASKER JOBS OUT.

JOBS: [{"name", "directory", "adapter" or null, "modes", "questions": [{"image", "question"}, ...], "tokens"}, ...]
OUT:  {name: {mode: [answer, ...] or the last line of what the program raised}}
"""

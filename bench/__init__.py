"""The evidence: every claim about speed, memory and accuracy, and the command that reproduces it.

    humanline bench                # or python -m bench, from a checkout: the quick suite
    humanline bench --help

What is where, what was measured and how to repeat it: README.md beside this file.
"""

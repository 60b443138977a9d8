"""Files that lie, built when a test runs: a hostile file is never committed.

Each module has a table of cases: a name, how to build it in a folder, and what the error must say. `jail` uses such a file
in a process of its own with little memory, little time and eyes on what is written.
"""

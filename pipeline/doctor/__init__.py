"""`deit-cli doctor`: what the commands rely on, looked at before they do.

Nothing is imported here: its modules must work where packages are broken or missing.
"""

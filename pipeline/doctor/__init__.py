"""`deit-cli doctor`: checks of packages, hardware, folders and label sets before a long run.

This file must import nothing: the doctor also runs where packages are broken or missing.
"""

"""`deit-cli labels verify`: checks of every file, row, image and stored answer of a label set."""

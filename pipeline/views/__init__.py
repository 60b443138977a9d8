"""What a view is: recipe, draws, pixels, partners."""

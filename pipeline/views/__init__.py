"""Views: the recipe, random draws, rendering, and mixing of partners."""

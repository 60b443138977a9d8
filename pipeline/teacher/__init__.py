"""The frozen networks that answer for views, and their identity."""

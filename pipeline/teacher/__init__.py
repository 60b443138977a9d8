"""The teacher: frozen networks that label views, their loading and their identity."""

"""What a person sees of a label set: its facts, its dataset card, and its views as a picture."""

"""Stage 2: replay the views, stream the stored labels, train and evaluate the student. No teacher is ever loaded.

order -> stream -> mixing -> student -> losses -> optim -> checkpoint -> evaluate
"""

"""Sharing of label sets: push, pull, merge, sign, and manifests of parts."""

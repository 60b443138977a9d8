"""Processes and hardware: loader processes, threads, ranks, progress and timing."""

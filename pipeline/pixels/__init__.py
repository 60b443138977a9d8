"""The pixels of views: the definition of docs/views-v2.md on CPUs and GPUs, and the older renderer 1."""

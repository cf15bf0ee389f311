"""Large memories beside FAISS: time to build, open and search, RAM, disk, recall (``python -m benchmarks.index``)."""
